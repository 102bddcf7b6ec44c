"""`python -m linearize` is the `linearize` command."""

from linearize.cli import main

if __name__ == "__main__":
    main()
