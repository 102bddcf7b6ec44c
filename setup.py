"""Maps the folders of the checkout to import names under `linearize`; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# linearize/_checkout.py serves the same names from a checkout that is not installed.
FOLDERS = {
    "linearize": "linearize",
    "linearize.kernels": "kernels",
    "linearize.distill": "distill",
    "linearize.benchmarks": "benchmarks",
}

packages = set(FOLDERS)
for name, folder in FOLDERS.items():
    # Namespace packages, so that folders of data (recipes) count as packages and ship.
    found = find_namespace_packages(folder, exclude=["*__pycache__*", "results*"])
    packages |= {f"{name}.{sub}" for sub in found}

setup(packages=sorted(packages), package_dir=FOLDERS)
