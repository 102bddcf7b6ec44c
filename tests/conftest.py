"""Set-up shared by all tests."""

import os

# Read when the libraries are imported, so they come first. TRITON_INTERPRET is left as the caller set it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Idle threads sleep instead of spinning: on few cores they would take time from the tests' subprocesses.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Tensors in tests are tiny, where more threads cost time; a smaller OMP_NUM_THREADS still counts.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)
