"""Jobs in processes of their own: what they find comes back, and what ends a process ends that job alone."""

import os
import signal
import time
from functools import partial

import pytest
import torch

from benchmarks.gpu_suite.apart import Job, run_apart, run_here
from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.ceilings import measure_ceilings
from benchmarks.gpu_suite.facts import gather_facts
from benchmarks.gpu_suite.report import Report
from benchmarks.gpu_suite.sizes import REHEARSAL
from benchmarks.gpu_suite.suite import DeviceLost, Suite

CPU = torch.device("cpu")


@pytest.fixture
def suite(tmp_path):
    budget = Budget(100)
    report = Report(gather_facts(CPU, "abc"), "rehearsal", budget, tmp_path)
    return Suite(CPU, REHEARSAL, budget, report, green=("good", "bad"))


def visit(suite, ending):
    """Every green backend finds its process; `bad` ends it."""
    for name in suite.timed:
        with suite.trying(name, "a failure"):
            suite.report.add("visit", {"backend": name, "process": os.getpid()})
            if name == "bad":
                ending()


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    time.sleep(60)


def lose_device():
    try:
        raise RuntimeError("illegal memory access")
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


def fail():
    raise ValueError("it fails")


def stop_unnamed(suite):
    suite.report.add("visit", {"backend": "none"})
    crash()


def visitors(suite):
    return [each.where["backend"] for each in suite.report.measurements if each.step == "visit"]


def test_what_a_job_finds_comes_back_from_another_process(suite):
    found = run_apart(suite, Job("ceilings", measure_ceilings))
    assert set(found.ceilings) == {"copy", "bf16 matmul"} and not suite.ceilings
    assert (suite.report.folder / "rehearsal.json").exists()
    found = run_apart(found, Job("visit", partial(visit, ending=int)))
    assert visitors(found) == ["good", "bad"]
    assert os.getpid() not in [each.where["process"] for each in found.report.measurements[-2:]]
    assert found.lost == () and not found.report.red and not found.report.failures


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (crash, f"its process ended with exit code -{int(signal.SIGSEGV)}"),
        (hang, "it said nothing for 2 s, and was ended"),
        (lose_device, "the device was lost: illegal memory access"),
    ],
)
def test_a_job_is_repeated_without_what_ended_its_process(suite, ending, why):
    found = run_apart(suite, Job("visit", partial(visit, ending=ending)), silence_s=2)
    assert visitors(found) == ["good"]
    assert (found.lost, found.timed) == (("bad",), ("good",))
    assert [(check.what, check.backend, check.why) for check in found.report.red] == [("visit", "bad", why)]


def test_what_fails_in_words_is_reported_and_the_rest_goes_on(suite):
    suite.green = ("bad", "good")
    job = Job("visit", partial(visit, ending=fail))
    found = run_apart(suite, job)
    run_here(suite, job)
    for each in (found, suite):
        assert visitors(each) == ["bad", "good"] and not each.lost
        assert each.report.failures == [("a failure", "ValueError: it fails")]


def test_a_process_that_ends_with_nobody_at_work_leaves_what_it_found(suite):
    found = run_apart(suite, Job("stop", stop_unnamed))
    assert visitors(found) == ["none"]
    assert found.report.failures == [("stop", f"its process ended with exit code -{int(signal.SIGSEGV)}")]
