"""What all tests share: the GPU marker, and fixtures that make numbers repeatable.

Files named *_properties.py need hypothesis. They are left out where it is missing, so that on a GPU machine with
torch and pytest alone `pytest -m gpu tests/parallel` collects.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `pytest` without `python -m`, without an installed package


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu(count=1): needs this many CUDA devices; deselected where there are fewer")


def pytest_ignore_collect(collection_path):
    if collection_path.name.endswith("_properties.py") and importlib.util.find_spec("hypothesis") is None:
        return True
    return None


def pytest_collection_modifyitems(config, items):
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    beyond = [item for item in items if _gpus_needed(item) > devices]
    if beyond:
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if _gpus_needed(item) <= devices]


def _gpus_needed(item) -> int:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return 0
    return marker.args[0] if marker.args else 1


@pytest.fixture(scope="module")
def nan_poison():
    """torch.empty and its kin hand out NaN, so a row that nobody writes shows in every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Threads that stand for ranks must not each open a pool of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
