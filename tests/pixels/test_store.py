"""Files of media: written once, read through handles, gone with their requests and with their server."""

import copy
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import time

import pytest
import torch

from sglang_mm.errors import ConfigError, SglangMMError
from sglang_mm.pixels import DIRECTORY, NoRoom, PatchStore, PixelsGone, Scaling, StoredPatches, store, wire, writing
from sglang_mm.pixels.stored import PatchFile

WIDTH = 12
PLAIN = Scaling((0.0,), (1.0,), 1.0, rescale=False, normalize=False)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A store, in whose environment this process is."""
    with PatchStore(tmp_path) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def lease(kept):
    return kept.lease()


def bytes_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def written(lease, data: torch.Tensor, piece: int = 3) -> PatchFile:
    with lease.writer(len(data), data.shape[1], "a video") as writer:
        for part in data.split(piece):
            writer.append(part)
        return writer.finish()


def test_rows_come_back_from_any_part(kept):
    lease = kept.lease()
    first, second = bytes_of(7), bytes_of(5, 1)
    handle = StoredPatches.of([written(lease, first), written(lease, second)], PLAIN)
    whole = torch.cat([first, second])
    assert handle.shape == (12, WIDTH) and len(handle) == 12
    for low in range(12):
        for high in range(low + 1, 13):
            assert torch.equal(handle.rows(low, high), whole[low:high])
            part = handle.part(low, high)
            assert len(part) == high - low and torch.equal(part.rows(0, len(part)), whole[low:high])
            assert len(part.files) == (1 if high <= 7 or low >= 7 else 2)
    assert torch.equal(handle.pixels(3, 9, dtype=torch.float64), whole[3:9].double())
    assert torch.equal(handle.all_pixels(at_once=5), whole.float())


def test_rows_that_are_not_there(lease):
    handle = StoredPatches.of([written(lease, bytes_of(4))], PLAIN)
    for wrong in (lambda: handle.rows(2, 5), lambda: handle.part(4, 5), lambda: handle.part(2, 9)):
        with pytest.raises(PixelsGone, match="4 stored ones"):
            wrong()


def test_the_hash_tells_contents_places_and_scaling_apart(kept):
    lease, data = kept.lease(), bytes_of(8)

    def key(data, scaling=PLAIN, low=0, high=None, piece=3):
        return StoredPatches.of([written(lease, data, piece)], scaling).part(low, high or len(data)).hash

    other = data.clone()
    other[5, 5] ^= 1
    assert key(data) == key(data, piece=8)
    keys = [key(data), key(other), key(data, low=1), key(data, high=7), key(data, Scaling((0.0,), (1.0,), 1.0))]
    assert len(set(keys)) == len(keys)
    assert key(data.view(4, 2 * WIDTH)) != key(data)


def test_a_handle_is_small_and_names_no_path(kept, lease):
    handle = StoredPatches.of([written(lease, bytes_of(5000))], PLAIN)
    sent = pickle.dumps(handle)
    assert len(sent) < 1000 and str(kept.directory).encode() not in sent
    assert torch.equal(pickle.loads(sent).rows(4000, 4500), handle.rows(4000, 4500))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "lock", "0" * 31, "0" * 33, "G" * 32, 7, ""])
def test_a_name_is_never_a_path(kept, name):
    with pytest.raises(PixelsGone, match="32 hexadecimal digits"):
        PatchFile(name, 1, WIDTH, "", kept.home)


def test_a_link_is_not_followed(kept, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * WIDTH)
    (kept.directory / ("a" * 32)).symlink_to(secret)
    with pytest.raises(PixelsGone):
        PatchFile("a" * 32, 1, WIDTH, "", kept.home).read(0, 1, torch.empty(1, WIDTH, dtype=torch.uint8))


def test_only_this_user_can_look_inside(kept, lease):
    file = written(lease, bytes_of(1))
    assert stat.S_IMODE(kept.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((kept.directory / file.name).stat().st_mode) == 0o600


def test_files_end_with_their_lease(kept):
    lease, other = kept.lease(), kept.lease()
    copied, deep = copy.copy(lease), copy.deepcopy(lease)
    assert copied is not None and deep is lease
    files = [written(lease, bytes_of(2)), written(lease, bytes_of(3))]
    staying = written(other, bytes_of(4))
    assert sorted(file.name for file in [*files, staying]) == kept.files()
    gc.disable()
    try:
        del copied, deep, lease
        assert kept.files() == [staying.name], "without the garbage collector"
    finally:
        gc.enable()
    other.release()
    assert kept.files() == [] and not other.alive


def test_a_handle_that_was_opened_reads_on_when_the_file_is_gone(kept):
    """As a rank that is told to prefill a retracted request again."""
    lease, data = kept.lease(), bytes_of(6)
    opened = pickle.loads(pickle.dumps(StoredPatches.of([written(lease, data)], PLAIN)))
    lease.release()
    assert torch.equal(opened.rows(0, 6), data)
    late = pickle.loads(pickle.dumps(opened))  # unpickling is harmless
    with pytest.raises(PixelsGone, match="their request has ended"):
        late.rows(0, 1)


def test_a_copy_of_an_open_handle_is_open(kept):
    lease, data = kept.lease(), bytes_of(6)
    handle = StoredPatches.of([written(lease, data)], PLAIN)
    lease.release()
    for copied in (copy.copy(handle), copy.deepcopy(handle), copy.deepcopy({"feature": handle})["feature"]):
        assert torch.equal(copied.rows(0, 6), data)


def test_files_linger_for_ranks_that_are_behind(tmp_path, monkeypatch):
    with PatchStore(tmp_path, linger_s=1.5) as made:
        monkeypatch.setenv(DIRECTORY, made.environment[DIRECTORY])
        lease, unheard, data = made.lease(), made.lease(), bytes_of(6)
        sent = pickle.dumps(StoredPatches.of([written(lease, data)], PLAIN))
        written(unheard, data)
        unheard.discard()
        assert len(made.files()) == 1 and not unheard.alive, "of which no rank has heard"
        del lease
        ended = time.monotonic()
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv(wire.MACHINE, "another machine")
            assert torch.equal(pickle.loads(sent).rows(0, 6), data), "through the store"
        late = pickle.loads(sent)
        while made.files():
            assert time.monotonic() - ended < 30
            time.sleep(0.02)
        assert time.monotonic() - ended > 1.4
        assert torch.equal(late.rows(0, 6), data)


def test_nothing_is_written_for_a_request_that_has_ended(kept):
    lease = kept.lease()
    writer = lease.writer(4, WIDTH, "a video")
    writer.append(bytes_of(2))
    lease.release()
    with pytest.raises(PixelsGone, match="has ended"):
        writer.append(bytes_of(2))
    with pytest.raises(PixelsGone, match="has ended"):
        lease.writer(1, WIDTH, "a video")
    assert kept.files() == []


def test_a_lease_stays_behind_when_its_request_is_pickled(kept):
    assert pickle.loads(pickle.dumps({"lease": kept.lease()})) == {"lease": ""}


def test_rows_must_be_as_announced(lease):
    with lease.writer(2, WIDTH, "a video") as writer:
        for wrong in (bytes_of(1).float(), bytes_of(1)[:, :5], bytes_of(1)[0]):
            with pytest.raises(SglangMMError, match="rows of 12 bytes"):
                writer.append(wrong)
        writer.append(bytes_of(1))
        with pytest.raises(SglangMMError, match="1 rows were written where 2 are due"):
            writer.finish()


def test_a_full_disk_is_told_before_anything_is_read(kept, lease):
    free = shutil.disk_usage(kept.directory).free
    with pytest.raises(NoRoom, match=r"a video, whose [\d,]+ patches take [\d,]+ bytes\. Allowed: [\d,]+ bytes, which"):
        lease.writer(free // WIDTH, WIDTH, "a video")


def test_a_disk_that_fills_up_meanwhile(lease, monkeypatch):
    """Room is made for all of a file at once, so that two long videos cannot both be half way when it is full."""
    monkeypatch.setattr(writing.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(NoRoom, match="--media-dir can name a larger disk"):
        lease.writer(4, WIDTH, "a video")


def test_room_is_made_at_once(kept, lease):
    with lease.writer(1000, WIDTH, "a video") as writer:
        assert (kept.directory / writer.name).stat().st_size == 1000 * WIDTH


def test_closing_removes_everything(tmp_path):
    made = PatchStore(tmp_path)
    lease = made.lease()
    written(lease, bytes_of(2))
    made.close()
    made.close()
    assert list(tmp_path.iterdir()) == [] and not lease.alive
    lease.release()


def test_a_directory_that_cannot_be_written_to(tmp_path):
    with pytest.raises(ConfigError, match=r"--media-dir .*nowhere"):
        PatchStore(tmp_path / "nowhere")


def _hold(parent, pipe):
    made = PatchStore(parent)
    written(made.lease("r"), bytes_of(2))
    pipe.send(made.directory.name)
    signal.pause()


def test_the_next_server_removes_what_a_killed_one_left(tmp_path):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    killed = context.Process(target=_hold, args=(tmp_path, theirs))
    killed.start()
    assert pipe.poll(60)
    name = pipe.recv()
    with PatchStore(tmp_path) as beside:
        assert beside.removed == [] and (tmp_path / name).is_dir(), "a living server's is left alone"
    killed.kill()
    killed.join(30)
    (tmp_path / name / store.LOCK).stat()
    with PatchStore(tmp_path) as after:
        assert after.removed == [name] and [path.name for path in tmp_path.iterdir()] == [after.directory.name]
    assert os.environ.get(DIRECTORY) is None
