"""Whatever befalls one rank, the others name it within the deadline and a second, let go of everything, and go on."""

import pytest

from tests.faults.matrix import RANKS, Judge, Matrix, all_cases, few_cases
from tests.faults.pool import Answer
from tests.faults.ranks import DEADLINE_S, FAULTS, MOMENTS, Case, Report
from tests.faults.report import WHERE_ORDER, Row, page, read, record
from tests.faults.stack import SCHEDULES


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    with Matrix(tmp_path_factory.mktemp("matrix")) as matrix:
        yield matrix


def cases():
    few = few_cases()
    for case in all_cases():
        marks = [] if case in few else [pytest.mark.slow]
        yield pytest.param(case, marks=marks, id=f"{case.fault}, {case.moment}, {case.schedule}".replace(" ", "-"))


@pytest.mark.parametrize("case", list(cases()))
def test_survivors_know_whom_and_go_on(matrix, case):
    row, broken = matrix.run(case)
    assert not broken, f"{row}{matrix.pool.tails()}"


def test_the_same_processes_served_all_cases(matrix):
    """Only the killed ones were replaced. Runs after the others: pytest keeps the order of a file."""
    died = matrix.deaths
    assert matrix.number and matrix.pool.started <= RANKS + died
    assert len(matrix.pool.pids()) == RANKS


def test_the_cases_are_all_there():
    assert len(set(all_cases())) == len(FAULTS) * len(MOMENTS) * len(SCHEDULES) == 63
    few = few_cases()
    assert sorted(case.fault for case in few) == sorted(FAULTS)
    assert {case.moment for case in few} == set(MOMENTS) and {case.schedule for case in few} == set(SCHEDULES)
    assert {case.culprit for case in few} == set(range(RANKS))


def test_the_page_has_the_newest_row_of_each_case(tmp_path):
    lines = tmp_path / "build" / "faults.jsonl"
    record(Row("Engine and server", "SIGKILL", "middle layer", "ring", by="parent", first_s=9.0), lines)
    record(Row("Bare ranks", "exit", "first layer", "ring", by="rank 2", all_s=0.204, seen="a | b\nc"), lines)
    record(Row("Engine and server", "SIGKILL", "middle layer", "ring", by="parent", first_s=0.5), lines)
    text = page(read(lines))
    assert "| exit | first layer | ring | rank 2 |  | 0.20 | a \\| b c |  |" in text
    assert "| SIGKILL | middle layer | ring | parent | 0.50 |  |  |  |" in text and "9.0" not in text
    assert text.index("## Bare ranks") < text.index("## Engine and server"), WHERE_ORDER


def forged(culprit: int = 1, **changes) -> Judge:
    """A case that kept all rules, but for what is changed in the report of rank 2."""
    case = Case("SIGKILL", "middle layer", "ring", culprit)
    held = {"descriptors": 20, "threads": 4, "tensors": 0, "MiB": 300}
    right = {"error": "RingBroken", "named": culprit, "layer": 3, "raised_at": 100.1, "named_at": 100.2}
    right |= {"before": held, "after": held}
    answers = {rank: Answer(result=Report(**right)) for rank in range(RANKS)}
    answers[2] = Answer(result=Report(**right | changes))
    answers[culprit] = Answer(exit_code=-9, notes=[100.0])
    return Judge(case, answers, 100.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"named": 0}, "names rank 0"),
        ({"layer": 1}, "says layer 1"),
        ({"error": "RuntimeError"}, "raised RuntimeError"),
        ({"error": ""}, "raised nothing"),
        ({"named_at": 100.0 + DEADLINE_S + 1.01}, "knew after"),
        ({"worst": 1e-3}, "error 1.0e-03"),
        ({"worst": float("nan")}, "error nan"),
        ({"after": {"descriptors": 21, "threads": 4, "tensors": 0, "MiB": 300}}, "holds more descriptors"),
        ({"after": {"descriptors": 20, "threads": 4, "tensors": 1, "MiB": 400}}, "holds more tensors, MiB"),
    ],
)
def test_a_broken_rule_is_seen(changes, words):
    assert forged().broken() == []
    (broken,) = forged(**changes).broken()
    assert broken.startswith("rank 2") and words in broken
