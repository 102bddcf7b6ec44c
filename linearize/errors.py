"""The one exception that users are meant to see."""

__all__ = ["LinearizeError"]


class LinearizeError(ValueError):
    """A wrong input. The message is one line that names the value, the limit and the way out.

    The command line prints it without a traceback and exits with status 2.
    """
