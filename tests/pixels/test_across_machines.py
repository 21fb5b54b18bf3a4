"""Reading from another machine: a process that was told it runs on one asks the store, for its own rows alone."""

import multiprocessing
import os
import pickle

import msgspec
import pytest
import torch
import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.pixels import PatchStore, PixelsGone, Scaling, StoredPatches, asking, wire
from tests.pixels.test_store import PLAIN, WIDTH, bytes_of, written

HALF = Scaling((0.5,), (0.5,), 1 / 255)
PATIENCE_S = 60


@pytest.fixture
def elsewhere(monkeypatch):
    """From here on this process runs on another machine."""
    monkeypatch.setenv(wire.MACHINE, "another machine")


def _read_elsewhere(pipe):
    os.environ[wire.MACHINE] = "another machine"
    while True:
        try:
            handle, first, last = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            pipe.send_bytes(pickle.dumps((handle.pixels(first, last), [file._open_file for file in handle.files])))
        except PixelsGone as error:
            pipe.send_bytes(pickle.dumps((str(error), None)))


@pytest.fixture
def reader():
    """ask(handle, first, last): what a process on another machine reads."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_elsewhere, args=(theirs,))
    process.start()
    theirs.close()

    def ask(*question):
        ours.send_bytes(pickle.dumps(question))
        assert ours.poll(PATIENCE_S)
        return pickle.loads(ours.recv_bytes())

    yield ask
    ours.close()
    process.join(PATIENCE_S)
    assert process.exitcode == 0


def test_two_processes(tmp_path, reader):
    with PatchStore(tmp_path) as store:
        lease, data = store.lease(), bytes_of(1000)
        handle = StoredPatches.of([written(lease, data[:600], 100), written(lease, data[600:], 100)], HALF)
        for first, last in ((0, 1), (590, 610), (999, 1000), (0, 1000)):
            found, opened = reader(handle, first, last)
            assert opened == [None, None], "it had no file of its own"
            assert torch.equal(found, HALF.floats(data[first:last]))
        assert store._answering.answered == 6  # one question for each file that the rows are in
        lease.release()
        told, _ = reader(handle, 0, 1)
        assert "sent no pixels: their request has ended" in told


def test_large_reads_come_in_several_answers(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(asking, "ANSWER_BYTES", 10 * WIDTH)
    with PatchStore(tmp_path) as store:
        lease, data = store.lease(), bytes_of(95)
        handle = StoredPatches.of([written(lease, data)], PLAIN)
        assert torch.equal(handle.rows(1, 95), data[1:])
        assert store._answering.answered == 10


def test_a_store_that_does_not_answer(elsewhere, monkeypatch):
    monkeypatch.setattr(asking, "ANSWER_DEADLINE_S", 0.2)
    context = zmq.Context()
    silent = context.socket(zmq.ROUTER)
    port = silent.bind_to_random_port("tcp://127.0.0.1")
    try:
        for _ in range(2):  # the second finds a fresh socket
            with pytest.raises(PixelsGone, match=rf"tcp://127.0.0.1:{port} did not send pixels within 0.2 s"):
                asking.read(f"tcp://127.0.0.1:{port}", "a" * 32, 0, 1, WIDTH, memoryview(bytearray(WIDTH)))
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    "question",
    [
        b"", b"\xc1", b"hello", pickle.dumps({"name": "a" * 32}), msgspec.msgpack.encode({"name": "a" * 32}),
        *(
            msgspec.msgpack.encode({"name": "a" * 32, "first": 0, "rows": 1, "width": WIDTH, **wrong})
            for wrong in ({"name": "../lock"}, {"name": "lock"}, {"rows": 0}, {"first": -1}, {"rows": 1 << 40},
                          {"width": 1 << 40, "rows": 1 << 20}, {"name": "b" * 32}, {"first": 9})
        ),
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_the_next_is_answered(tmp_path, question):
    with PatchStore(tmp_path) as store, zmq.Context() as context, context.socket(zmq.REQ) as socket:
        lease = store.lease()
        name = written(lease, bytes_of(4)).name
        (store.directory / name).rename(store.directory / ("a" * 32))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(store.address)
        for data, frames in ((question, 1), (msgspec.msgpack.encode(wire.Read("a" * 32, 1, 2, WIDTH)), 2)):
            socket.send(data)
            assert socket.poll(PATIENCE_S * 1000)
            head, *rest = socket.recv_multipart()
            assert bool(msgspec.msgpack.decode(head, type=wire.Answer).refused) == (frames == 1)
            assert len(rest) == frames - 1
        assert rest[0] == bytes_of(4)[1:3].numpy().tobytes()


def test_it_listens_on_loopback_unless_told_otherwise(tmp_path):
    with PatchStore(tmp_path) as store:
        assert store.address.startswith("tcp://127.0.0.1:")
    with PatchStore(tmp_path, "127.0.0.2") as store:
        assert store.address.startswith("tcp://127.0.0.2:")
    with pytest.raises(ConfigError, match=r"host 203\.0\.113\.7 for pixels"):
        PatchStore(tmp_path, "203.0.113.7")
    assert list(tmp_path.iterdir()) == []


def test_this_machine_is_itself():
    assert wire.machine() == wire.machine() and wire.Home(wire.machine(), "").machine == wire.machine()
