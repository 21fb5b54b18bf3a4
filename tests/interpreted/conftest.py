"""Triton kernels run by Triton's interpreter, on the CPU. Triton reads TRITON_INTERPRET when it is imported, so these
tests have processes of their own: `TRITON_INTERPRET=1 pytest tests/interpreted`, or tests/kernels/test_interpreted.py.

The interpreter runs instances one after another, with fp32 products, and without shared memory: it shows wrong
indices, masks and arithmetic, and no races. Arithmetic on bf16 is wrong in it; loads, stores and casts are right.
"""

import os
from pathlib import Path

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Files named on the command line are collected all the same."""
    here = Path(__file__).parent
    if not IS_INTERPRETED and any(here in item.path.parents for item in items):
        raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment, before Python starts")
