"""Runs each file of tests/interpreted in a process with Triton's interpreter."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))
DEADLINE = 300
"""Seconds; a file takes some ten, and test-all some more."""


def run_interpreted(file: Path, marks: str, folder: Path, deadline: float = DEADLINE) -> dict[str, int]:
    """How many tests of `file` had which outcome. What the process printed is printed here, shown where a test fails.

    marks: for pytest's -m. Raises AssertionError where the process failed or no test passed, TimeoutExpired where it
    took more than `deadline` seconds.
    """
    report = folder / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        str(file),
        "-m",
        marks,
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", f"faulthandler_timeout={0.8 * deadline}"]  # where it hangs, it says where
    with (folder / "output.txt").open("w+") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=deadline
            )
        finally:
            output.seek(0)
            print(output.read())
    assert done.returncode == 0, f"{file.name}: pytest ended with {done.returncode}"
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    assert counts["passed"] > 0, f"{file.name}: {counts}"
    assert not counts["skipped"], f"{file.name}: {counts}. What is skipped here is run nowhere"
    return counts


@pytest.fixture(scope="module")
def running(request, tmp_path_factory):
    """file -> its folder and its outcome to come: all that were selected, side by side; each keeps a core busy."""
    chosen = {
        item.callspec.params["file"] for item in request.session.items if item.name.startswith("test_interpreted[")
    }
    folders = {file: tmp_path_factory.mktemp(file.stem) for file in FILES if file in chosen}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        marks = request.config.option.markexpr
        yield {file: (folder, pool.submit(run_interpreted, file, marks, folder)) for file, folder in folders.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file, running):
    folder, outcome = running[file]
    try:
        outcome.result()
    finally:
        print((folder / "output.txt").read_text())


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def no_test(): pass", "ended with 5"),
        ("import os, signal\ndef test(): os.kill(os.getpid(), signal.SIGSEGV)", "ended with -11"),
        ("import pytest\ndef test(): pytest.skip('for no reason')", "'passed': 0"),
        ("import pytest\ndef test_it(): pass\ndef test(): pytest.skip('for no reason')", "'skipped': 1"),
    ],
    ids=["nothing collected", "crash", "all skipped", "one skipped"],
)
def test_a_file_that_proves_nothing_is_red(text, message, tmp_path):
    (tmp_path / "test_it.py").write_text(text)
    with pytest.raises(AssertionError, match=message):
        run_interpreted(tmp_path / "test_it.py", "", tmp_path)


MARKED = """
import os
import pytest

def test_here():
    assert os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.slow
def test_slow():
    assert False
"""


def test_marks_are_passed_on(tmp_path):
    (tmp_path / "test_it.py").write_text(MARKED)
    assert run_interpreted(tmp_path / "test_it.py", "not slow", tmp_path)["tests"] == 1


def test_a_file_that_hangs_is_ended(tmp_path):
    (tmp_path / "test_it.py").write_text("import time\ntime.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired):
        run_interpreted(tmp_path / "test_it.py", "", tmp_path, deadline=1)
