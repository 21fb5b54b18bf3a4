"""The pool itself: processes are used again, dead ones replaced, and nothing that hangs outlives the deadline."""

import re

import psutil
import pytest

from tests.faults import jobs
from tests.faults.pool import Pool

WAIT_S = 40.0


@pytest.fixture
def pool(tmp_path):
    with Pool(2, tmp_path) as pool:
        yield pool


def test_processes_are_used_again_and_a_dead_one_is_replaced(pool):
    before = pool.pids()
    answers = pool.run(jobs.which, [(), ()], WAIT_S)
    assert [answers[rank].result for rank in range(2)] == before
    assert "ValueError: as planned" in pool.run(jobs.fail, [(), ()], WAIT_S)[1].failure
    died = pool.run_on([1], jobs.die_after_a_word, [(), ()], WAIT_S)[1]
    assert died.exit_code == 7 and died.notes == ["farewell"]
    assert pool.restore() == [1] and pool.restore() == [] and pool.started == 3
    after = pool.run(jobs.which, [(), ()], WAIT_S)
    assert after[0].result == before[0] and after[1].result == pool.pids()[1] != before[1]


def test_a_job_that_hangs_ends_in_an_assertion_with_the_logs_and_nothing_is_left(pool):
    pids = pool.pids()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were still running after 2 s") as caught:
        pool.run(jobs.hang_with_a_child, [(), ()], 2.0)
    children = [int(pid) for pid in re.findall(r"child (\d+) runs", str(caught.value))]
    assert len(children) == 2, "the logs are in the assertion"
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in [*pids, *children] if psutil.pid_exists(pid)], 5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert pool.restore() == [0, 1]
