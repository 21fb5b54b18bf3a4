"""Toy sizes are slower with many threads than with one, and far slower where something else runs beside them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_thread_in_every_process(one_thread):
    """This process has started, and `one_thread` sees to it; processes that the tests start read the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
