"""Set-up shared by all tests."""

import os

# Read when the libraries are imported, so they come first.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Idle threads sleep instead of spinning: on few cores they would take time from the tests' subprocesses.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when triton is imported, which importing torch does not do: tests marked interpret run kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors in tests are tiny, where more threads cost time; a smaller OMP_NUM_THREADS still counts.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU, and those marked interpret where kernels cannot run at all."""
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpret") and not (HAS_GPU or interpreter):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or a GPU"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted models have the projections by slices on every machine, whichever product is the faster one there."""
    monkeypatch.setattr("linearize.projections.product_ms", lambda threads: (2.0, 1.0))


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    """Triton's interpreter as `tests/interpreter.py` mends it, for tests marked interpret."""
    if request.node.get_closest_marker("interpret") and not HAS_GPU:
        from tests.interpreter import install

        install()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU, in the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")
