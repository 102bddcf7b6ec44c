"""The arrangement of folders, import names and packages keeps working.

Folders at the root are imported as `linearize.*`, without an `__init__.py` of their own, and one of them shares its
name with a library that transformers looks for. These tests pin what that arrangement promises: the same imports from
a checkout, an editable install and a wheel, and no effect on other libraries.
"""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import linearize
from linearize import _checkout

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "linearize": "linearize",
    "linearize.kernels": "kernels",
    "linearize.distill": "distill",
    "linearize.benchmarks": "benchmarks",
}
MAPPED = {name: folder for name, folder in FOLDERS.items() if name != "linearize"}


def source_files(root: Path, folder: str) -> Iterator[Path]:
    """The files of a folder that belong in a package, relative to `root`."""
    for path in sorted((root / folder).rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and "__pycache__" not in relative.parts and relative.parts[:2] != ("benchmarks", "results"):
            yield relative


def literal(source: Path, name: str) -> object:
    """The literal assigned to `name` at the top of a source file."""
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{source.name} assigns no {name}")


def python(*args: str, cwd: Path, path: Path | None = None, exe: str | Path = sys.executable) -> str:
    """Run a Python process and return what it printed; `path` is its whole PYTHONPATH."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(exe), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the rules a source file must keep ---------------------------------------------------------------------------


def test_setup_and_finder_name_the_same_folders() -> None:
    assert literal(ROOT / "setup.py", "FOLDERS") == FOLDERS
    assert set(MAPPED) == _checkout.FOLDERS
    grafted = re.findall(r"^graft (\w+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    assert set(grafted) == {*FOLDERS.values(), "tests"}


@pytest.mark.parametrize("folder", [*MAPPED.values(), "tests"])
def test_folder_has_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", MAPPED.values())
def test_no_module_takes_the_place_of_a_folder(folder: str) -> None:
    # In a wheel the folder lies there. A leftover folder without Python files is harmless (tested below).
    assert not (ROOT / "linearize" / f"{folder}.py").exists()
    assert not list((ROOT / "linearize").glob(f"{folder}/**/*.py"))


def test_no_folder_of_tests_is_named_after_a_library() -> None:
    # pytest would import tests/kernels/__init__.py under the name `kernels`.
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.parametrize("folder", MAPPED.values())
def test_no_module_is_named_after_a_library(folder: str) -> None:
    # A script run by its path puts its own folder first on sys.path.
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = metadata["optional-dependencies"].values()
    required = {Requirement(line).name for group in [metadata["dependencies"], *extras] for line in group}
    libraries = {name.replace("-", "_") for name in required} | {"fla", "kernels", "linearize", "numpy", "yaml"}
    names = {path.stem for path in (ROOT / folder).rglob("*") if path.suffix == ".py" or path.is_dir()}
    top = {path.stem for path in (ROOT / folder).glob("*") if path.suffix == ".py" or path.is_dir()}
    assert not names & libraries
    assert not top & sys.stdlib_module_names


@pytest.mark.parametrize("folder", [*FOLDERS.values(), "tests"])
def test_imports_name_their_package(folder: str) -> None:
    wrong = []
    for relative in source_files(ROOT, folder):
        if relative.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((ROOT / relative).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["" if node.level else node.module or ""]
                if node.level >= len(relative.parts):
                    wrong.append(f"{relative}:{node.lineno}: a relative import leaves {folder}/")
            else:
                continue
            for name in names:
                if name.split(".")[0] in MAPPED.values():
                    wrong.append(f"{relative}:{node.lineno}: write linearize.{name}")
    assert not wrong, "\n".join(wrong)


def test_type_checkers_see_the_folders() -> None:
    for folder in MAPPED.values():
        link = ROOT / "typings" / "linearize" / folder
        assert link.resolve() == ROOT / folder, f"{link} should be a symbolic link to {folder}/"


# --- the public names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", linearize.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(linearize, name) is not None
    assert name in dir(linearize)


def test_public_names_are_the_same_for_type_checkers() -> None:
    homes = literal(ROOT / "linearize" / "__init__.py", "_EXPORTS")
    tree = ast.parse((ROOT / "linearize" / "__init__.py").read_text())
    checked = {}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                assert isinstance(node, ast.ImportFrom)
                checked |= {alias.asname: f"linearize.{node.module}" for alias in node.names}
    assert homes == checked
    assert set(linearize.__all__) == {*checked, "__version__"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = linearize.no_such_name


def test_import_is_light() -> None:
    script = (
        "import json, sys, time\n"
        "start = time.perf_counter()\n"
        "import linearize\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = [name for name in ('transformers', 'fla', 'triton') if name in sys.modules]\n"
        "print(json.dumps([seconds, heavy]))"
    )
    # Without torch first, the time bounds the cost over torch from above and the test takes no time; only if that
    # bound fails is torch, whose import is not ours to judge, taken out.
    for before in ("", "import torch\n"):
        runs = [json.loads(python("-c", before + script, cwd=ROOT)) for _ in range(3)]
        assert all(heavy == [] for _, heavy in runs)
        cost_s = statistics.median(seconds for seconds, _ in runs)
        if cost_s < 0.3:
            break
    assert cost_s < 0.3


# --- versions --------------------------------------------------------------------------------------------------


def test_changelog_has_the_version() -> None:
    assert f"\n## {linearize.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_pinned_versions_are_allowed() -> None:
    """constraints.txt pins every dependency but lm-eval, at versions that pyproject.toml allows."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [group for name, group in metadata["optional-dependencies"].items() if name != "eval"]
    for line in [line for group in [metadata["dependencies"], *extras] for line in group]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line


# --- a checkout that is not installed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with small modules and data of its own, and with files that must not ship."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in [*FOLDERS.values(), "tests"]:
        for relative in source_files(ROOT, folder):
            (copy / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / relative, copy / relative)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    files = {
        "README.md": "# linearize\n",
        "linearize/convert.py": "def convert():\n    return 'converted'\n\n\ndef revert():\n    return 'reverted'\n",
        "kernels/probe.py": "from .probe_sub import VALUE as VALUE\n",
        "kernels/probe_sub/__init__.py": "VALUE = 42\n",
        "distill/probe_data/probe.yaml": "value: 42\n",
        "benchmarks/probe.py": "from linearize.kernels.probe import VALUE\n\nprint(VALUE, __name__)\n",
        "benchmarks/results/old.json": "{}",
        "kernels/__pycache__/probe.cpython-311.pyc": "",
    }
    for name, text in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    return copy


# Prints where everything came from; any failing import fails the process.
IMPORTS = """
import json, pathlib, importlib, importlib.resources
import linearize
from linearize.kernels.probe import VALUE
homes = [str(pathlib.Path(entry).resolve()) for name in (
    "linearize", "linearize.kernels", "linearize.distill", "linearize.benchmarks", "linearize.kernels.probe_sub",
) for entry in importlib.import_module(name).__path__]
data = (importlib.resources.files("linearize.distill") / "probe_data" / "probe.yaml").read_text()
assert (VALUE, data) == (42, "value: 42\\n")
print(json.dumps(homes))
"""


def check_imports(home: Path, cwd: Path, path: Path | None = None, exe: str | Path = sys.executable) -> None:
    """Import everything in a fresh process, as modules and with -m, and compare where it came from."""
    homes = json.loads(python("-c", IMPORTS, cwd=cwd, path=path, exe=exe))
    assert homes
    assert all(Path(entry).is_relative_to(home) for entry in homes), homes
    assert python("-m", "linearize.benchmarks.probe", cwd=cwd, path=path, exe=exe) == "42 __main__\n"


def test_imports_from_the_root(checkout: Path) -> None:
    check_imports(checkout, cwd=checkout)


def test_imports_by_pythonpath(checkout: Path, tmp_path: Path) -> None:
    check_imports(checkout, cwd=tmp_path, path=checkout)
    printed = python("benchmarks/probe.py", cwd=checkout, path=checkout)
    assert printed == "42 __main__\n"


def test_leftover_folder_is_harmless(checkout: Path) -> None:
    leftover = checkout / "linearize" / "kernels" / "__pycache__"
    leftover.mkdir(parents=True)
    try:
        check_imports(checkout, cwd=checkout)
    finally:
        shutil.rmtree(leftover.parent)


def test_public_name_wins_over_submodule(checkout: Path) -> None:
    script = (
        "import linearize.convert, linearize\n"
        "from linearize.convert import revert\n"
        "from linearize import convert\n"
        "assert convert() == linearize.convert() == 'converted'\n"
        "assert linearize.revert is revert"
    )
    python("-c", script, cwd=checkout)


# --- the library named `kernels` ---------------------------------------------------------------------------------


@pytest.fixture
def kernels_library(tmp_path: Path) -> Path:
    """A folder with a stand-in for the library `kernels`, at a version that transformers accepts."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "1.0")
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (site / f"kernels-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (site / f"kernels-{version}.dist-info" / "METADATA").write_text(text)
    return site


ASK_TRANSFORMERS = """
from transformers.utils import is_kernels_available
available = is_kernels_available()
import importlib, json, sys
home = importlib.import_module("kernels").__file__ if available else None
print(json.dumps([available, home]))
"""


def test_transformers_does_not_see_our_folder(tmp_path: Path) -> None:
    assert python("-c", ASK_TRANSFORMERS, cwd=ROOT) == python("-c", ASK_TRANSFORMERS, cwd=tmp_path)


def test_transformers_sees_the_library_from_the_root(kernels_library: Path) -> None:
    available, home = json.loads(python("-c", ASK_TRANSFORMERS, cwd=ROOT, path=kernels_library))
    assert available
    assert Path(home).is_relative_to(kernels_library)


# --- wheels, source distributions, editable installs ---------------------------------------------------------------


def build(kind: str, source: Path, out: Path, settings: dict[str, str] | None = None) -> Path:
    """Call one hook of the build backend, as pip and build do, without a network."""
    out.mkdir(parents=True, exist_ok=True)
    script = "import json, sys; from setuptools import build_meta as b; "
    if kind == "sdist":
        script += "print(b.build_sdist(sys.argv[1]))"
    else:
        script += f"print(b.build_{kind}(sys.argv[1], json.loads(sys.argv[2])))"
    printed = python("-W", "ignore", "-c", script, str(out), json.dumps(settings), cwd=source)
    return out / printed.split()[-1]


def installed(wheel: Path, target: Path) -> Path:
    """Unpack a wheel into a new, empty environment and return the environment's Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(target)
    base = {"base": str(target), "platbase": str(target)}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sysconfig.get_path("purelib", scheme="venv", vars=base))
    return Path(sysconfig.get_path("scripts", scheme="venv", vars=base)) / Path(sys.executable).name


def contents(wheel: Path) -> set[str]:
    """The files of a wheel without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


@pytest.fixture
def source(checkout: Path, tmp_path: Path) -> Path:
    """A copy of the checkout to build in: a leftover build/ would add its files to the next wheel."""
    return Path(shutil.copytree(checkout, tmp_path / "source"))


@pytest.mark.slow
def test_wheel_holds_the_source_files(source: Path, tmp_path: Path) -> None:
    expected = {
        str(Path("linearize", *relative.parts)) if folder != "linearize" else str(relative)
        for folder in FOLDERS.values()
        for relative in source_files(source, folder)
    }
    wheel = build("wheel", source, tmp_path / "dist")
    assert contents(wheel) == expected
    assert "linearize/py.typed" in expected
    exe = installed(wheel, tmp_path / "env")
    check_imports(tmp_path / "env", cwd=tmp_path, exe=exe)
    script = (
        "from importlib.metadata import version; import linearize; print(version('linearize'), linearize.__version__)"
    )
    assert python("-c", script, cwd=tmp_path, exe=exe).split() == [linearize.__version__] * 2


@pytest.mark.slow
def test_sdist_rebuilds_the_wheel(source: Path, tmp_path: Path) -> None:
    sdist = build("sdist", source, tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "tests" / "test_layout.py").is_file()
    assert not (unpacked / "benchmarks" / "results").exists()
    assert contents(build("wheel", unpacked, tmp_path / "again")) == contents(build("wheel", source, tmp_path / "dist"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_editable_install(mode: str, source: Path, tmp_path: Path) -> None:
    settings = None if mode == "default" else {"editable_mode": mode}
    exe = installed(build("editable", source, tmp_path / "dist", settings), tmp_path / "env")
    outside = tmp_path / "outside"
    outside.mkdir()
    for cwd, path in [(outside, None), (source, None), (outside, source)]:
        check_imports(source, cwd=cwd, path=path, exe=exe)


@pytest.mark.slow
def test_root_wins_over_another_editable_checkout(checkout: Path, source: Path, tmp_path: Path) -> None:
    exe = installed(build("editable", source, tmp_path / "dist"), tmp_path / "env")
    check_imports(checkout, cwd=checkout, exe=exe)
