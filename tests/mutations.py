"""Negative controls: a copy of a module with one line changed, to show that a test notices."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

_numbers = itertools.count()


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of `module` in which `old`, which must occur exactly once in its source, is `new`.

    The copy lies in `folder`: Triton reads the source of its kernels from a file. Relative imports work as in the
    original.
    """
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    name = f"{module.__name__}_mutant_{next(_numbers)}"
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[name]
    return copy


def replace_kernels(monkeypatch: pytest.MonkeyPatch, launcher: ModuleType, mutant: ModuleType, original: ModuleType):
    """Make `launcher` launch the mutant's kernels in place of those it imported from `original`."""
    for name, value in vars(original).items():
        if vars(launcher).get(name) is value and hasattr(value, "fn"):
            monkeypatch.setattr(launcher, name, getattr(mutant, name))
