"""Serves `linearize.kernels`, `linearize.distill` and `linearize.benchmarks` from a checkout.

In a wheel these packages lie inside `linearize/`. In a checkout they are the folders `kernels/`, `distill/` and
`benchmarks/` beside it, without an `__init__.py`: a regular top-level package named `kernels` would hide the library
of that name, which transformers looks for. Neither the default import path nor an editable install finds packages
arranged like that, so a checkout gets a finder of its own.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# The nested names of setup.py; the last part of a name is its folder.
FOLDERS = frozenset({"linearize.kernels", "linearize.distill", "linearize.benchmarks"})


class CheckoutFinder:
    """Finds the packages in `FOLDERS` at the root of the checkout, and nothing else."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a package in `FOLDERS`, or None to let the next finder answer."""
        return PathFinder.find_spec(fullname, [str(ROOT)]) if fullname in FOLDERS else None


# Both files together mean a checkout: a site-packages folder has neither.
if (ROOT / "setup.py").is_file() and (ROOT / "MANIFEST.in").is_file():
    # First, so that neither an editable install of another checkout nor a leftover linearize/kernels/ answers before.
    sys.meta_path.insert(0, CheckoutFinder)
