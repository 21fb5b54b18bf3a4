"""A stub that answers and fails on demand, and the batch as a call."""

import json
import threading
from contextlib import contextmanager

import pytest

from sglang_mm.batch import __main__ as batch
from sglang_mm.batch import client, run, server
from tests.batch import with_stub
from tests.batch.stub import Stub


@contextmanager
def served(stub: Stub):
    threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


@pytest.fixture
def serving():
    """Serves a stub of the test's own, as a context manager."""
    return served


@pytest.fixture
def stub():
    with served(Stub()) as stub:
        yield stub


@pytest.fixture
def hurried(monkeypatch):
    """The own server is the stub, and pauses are short."""
    for where, name in ((server.OwnServer, "_command"), (client, "FIRST_PAUSE_S"), (run, "SETTLE_S")):
        monkeypatch.setattr(where, name, getattr(where, name))  # put back at the end
    monkeypatch.setattr(server, "STOP_DEADLINE_S", server.STOP_DEADLINE_S)
    with_stub.hurry()


@pytest.fixture
def asked(tmp_path, hurried, capsys):
    """asked(questions or None for those of before, *flags): exit code, lines of the output, what was printed."""

    def ask(questions: list | None, *flags: str):
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        if questions is not None:
            lines = [line if isinstance(line, dict) else {"question": line} for line in questions]
            source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = batch.main([str(source), str(out), *flags])
        printed = capsys.readouterr()
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return code, lines, printed.out + printed.err

    return ask
