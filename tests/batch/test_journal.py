"""OUT and OUT.part: what is kept of them, and who may write them."""

import json
import os

import pytest

from sglang_mm.batch.journal import Journal
from sglang_mm.errors import ConfigError


def record(name: str, answer: str | None = "yes") -> dict:
    error = None if answer else {"code": "timeout", "message": "none"}
    return {"id": name, "answer": answer, "error": error, "request_id": f"batch_req_{name}"}


def test_what_was_added_is_there_after_a_crash(tmp_path):
    out = tmp_path / "out.jsonl"
    journal = Journal(out)
    journal.add(record("a"))
    journal.add(record("b", "zwei\u2028 \ud800"))
    journal._file.close()  # as a crash does; nothing of __exit__ runs
    with (tmp_path / "out.jsonl.part").open("ab") as part:
        part.write(b'{"id": "torn')
    with Journal(out) as journal:
        assert sorted(journal.started) == ["batch_req_a", "batch_req_b"]
        assert json.loads(journal.started["batch_req_b"]) == record("b", "zwei\u2028 \ud800")
        journal.add(record("c"))
    with Journal(out) as journal:
        assert sorted(journal.started) == ["batch_req_a", "batch_req_b", "batch_req_c"]
        journal.finish(journal.started[f"batch_req_{name}"] for name in "cab")
    assert [json.loads(line)["id"] for line in out.read_bytes().split(b"\n")[:-1]] == ["c", "a", "b"]
    assert os.listdir(tmp_path) == ["out.jsonl"]
    with Journal(out) as journal:
        assert sorted(journal.finished) == ["batch_req_a", "batch_req_b", "batch_req_c"] and journal.foreign == 0


def test_answers_win_over_errors(tmp_path):
    with Journal(tmp_path / "out") as journal:
        for answer in (None, "yes", None, "no"):
            journal.add(record("a", answer))
    with Journal(tmp_path / "out") as journal:
        assert json.loads(journal.started["batch_req_a"])["answer"] == "no"
    (tmp_path / "out").write_bytes(
        b"".join(json.dumps(record("a", answer)).encode() + b"\n" for answer in ("yes", None))
    )
    with Journal(tmp_path / "out") as journal:
        assert json.loads(journal.finished["batch_req_a"])["answer"] == "yes"


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "out.jsonl"
    with Journal(out) as journal:
        journal.add(record("a"))
        with pytest.raises(ConfigError, match="another run is writing"):
            Journal(out)
    with Journal(out) as journal:
        assert sorted(journal.started) == ["batch_req_a"]


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"notes\n", b'{"id": "a"}\n', b'{"error": null, "id": "a"}\n', b"[]\n"]
)
def test_what_no_batch_wrote_is_noticed(tmp_path, content):
    (tmp_path / "out").write_bytes(content)
    with Journal(tmp_path / "out") as journal:
        assert (journal.foreign, journal.finished) == (1, {})


def test_nothing_is_left_of_a_run_without_answers(tmp_path):
    with Journal(tmp_path / "out"):
        assert os.listdir(tmp_path) == ["out.part"]
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    for out in (tmp_path, tmp_path / "no" / "out"):
        with pytest.raises(ConfigError, match="OUT"):
            Journal(out)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far" / "out")
    with Journal(tmp_path / "out") as journal:
        journal.finish([b"x\n"])
    assert (tmp_path / "far" / "out").read_bytes() == b"x\n" and (tmp_path / "out").is_symlink()
