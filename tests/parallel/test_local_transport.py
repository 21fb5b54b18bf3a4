"""The transport's four verbs over threads, and what happens when a rank fails, hangs or disagrees."""

import threading
import time

import pytest
import torch

from sglang_mm.errors import ConfigError, RankMismatch, RingBroken
from sglang_mm.parallel.distributed import DistributedTransport
from sglang_mm.parallel.local import run_ranks

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
RANKS = range(1, 9)


def rows_sent(source: int, destination: int) -> int:
    """Uneven, with empty messages, and nothing at all between some ranks."""
    return (3 * source + 5 * destination) % 4


def message(source: int, destination: int) -> torch.Tensor:
    return torch.full((rows_sent(source, destination), 2), 10.0 * source + destination)


@pytest.mark.parametrize("ranks", RANKS)
def test_shift_brings_the_tensors_of_the_rank_before(ranks):
    def two_shapes(transport):
        def sent_by(rank):
            return [torch.full((rank, 3), float(rank)), torch.full((2,), rank, dtype=torch.int64)]

        before = (transport.rank - 1) % ranks
        transfer = transport.shift(sent_by(transport.rank), [(before, 3), (2,)])
        for got, want in zip(transfer.wait(), sent_by(before), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        return True

    assert all(run_ranks(two_shapes, ranks))


@pytest.mark.parametrize("ranks", RANKS)
def test_all_to_all_is_uneven(ranks):
    def exchange(transport):
        send = [message(transport.rank, other) for other in range(ranks)]
        got = transport.all_to_all(send, [rows_sent(other, transport.rank) for other in range(ranks)])
        for source, tensor in enumerate(got):
            torch.testing.assert_close(tensor, message(source, transport.rank), rtol=0, atol=0)
        return True

    assert all(run_ranks(exchange, ranks))


@pytest.mark.parametrize("ranks", RANKS)
def test_sum_is_in_place_and_the_same_bits_everywhere(ranks):
    parts = torch.randn(ranks, 3, 5, generator=torch.Generator().manual_seed(0))

    def add(transport):
        held = parts[transport.rank].clone()
        returned = transport.sum_(held.T)
        assert returned.data_ptr() == held.data_ptr()
        return held

    sums = run_ranks(add, ranks)
    assert all(torch.equal(held, sums[0]) for held in sums)
    torch.testing.assert_close(sums[0].double(), parts.double().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_equal_numbers_pass(number):
    assert run_ranks(lambda transport: transport.check_equal(number, "plan"), 3) == [None] * 3


def test_a_differing_number_raises_on_every_rank_and_names_all():
    def check(transport):
        with pytest.raises(RankMismatch) as caught:
            transport.check_equal(2**64 - 1 if transport.rank == 1 else 7, "layout digest")
        return str(caught.value)

    for text in run_ranks(check, 3):
        assert "layout digest" in text
        assert "rank 0: 0x0000000000000007, rank 1: 0xffffffffffffffff, rank 2: 0x0000000000000007" in text


def test_messages_keep_the_order_in_which_they_were_posted():
    """A shift under way while another collective runs: each wait gets what was posted with it."""

    def overlap(transport):
        before = (transport.rank - 1) % 3
        first = transport.shift([torch.full((1,), 1.0 + transport.rank)], [(1,)])
        second = transport.shift([torch.full((2,), 11.0 + transport.rank)], [(2,)])
        total = transport.sum_(torch.ones(1))
        assert second.wait()[0].tolist() == [11.0 + before] * 2 and first.wait()[0].tolist() == [1.0 + before]
        return total.item()

    assert run_ranks(overlap, 3) == [3.0] * 3


def test_a_sent_tensor_may_change_after_the_wait():
    def overwrite(transport):
        mine = torch.full((2,), float(transport.rank))
        (got,) = transport.shift([mine], [(2,)]).wait()
        mine.fill_(-1)
        transport.check_equal(0, "everyone has overwritten")
        return got.tolist()

    assert run_ranks(overwrite, 3) == [[2.0] * 2, [0.0] * 2, [1.0] * 2]


def test_results_come_in_rank_order():
    assert run_ranks(lambda transport: time.sleep(0.02 * (4 - transport.rank)) or transport.rank, 4) == [0, 1, 2, 3]


def test_the_first_error_is_raised_not_its_consequences():
    def fail(transport):
        if transport.rank == 1:
            raise ValueError("broken kernel")
        transport.sum_(torch.ones(1))

    began = time.monotonic()
    with pytest.raises(ValueError, match="broken kernel"):
        run_ranks(fail, 4, deadline_s=20)
    assert time.monotonic() - began < 5, "the other ranks waited for a rank that had failed"


def test_a_late_rank_breaks_the_ring_within_the_deadline():
    release = threading.Event()

    def hang(transport):
        if transport.rank == 2:
            release.wait(20)
        transport.shift([torch.ones(1)], [(1,)], "hop 1").wait()

    began = time.monotonic()
    with pytest.raises(RingBroken) as caught:
        run_ranks(hang, 3, deadline_s=0.5)
    release.set()
    assert (caught.value.rank, caught.value.stage) == (2, "hop 1")
    assert caught.value.waited_s >= 0.5 and time.monotonic() - began < 0.5 + 1 + 0.5


def test_several_late_ranks_share_one_deadline_and_are_all_named():
    release = threading.Event()

    def hang(transport):
        if transport.rank in (1, 3):
            release.wait(20)
            return
        with pytest.raises(RingBroken) as caught:
            transport.all_to_all([torch.ones(1)] * 4, [1] * 4, "sum")
        release.set()
        return caught.value

    first, _, third, _ = run_ranks(hang, 4, deadline_s=0.5)
    for error in (first, third):
        assert (error.rank, error.silent, error.stage) == (1, (1, 3), "sum")
        assert 0.5 <= error.waited_s < 0.99, "one after the other would take 1 s"


def test_a_thread_that_never_waits_for_others_cannot_hang_the_caller():
    release = threading.Event()
    with pytest.raises(RingBroken, match="rank 0 did not answer during run_ranks"):
        run_ranks(lambda transport: release.wait(20), 1, deadline_s=0.2)
    release.set()


def test_ranks_that_disagree_on_a_shape_are_told():
    def shift(transport):
        transport.shift([torch.ones(2)], [(3,) if transport.rank == 0 else (2,)]).wait()

    with pytest.raises(RankMismatch, match=r"expected \[\(3,\)\] from rank 1 in shift, got \[\(2,\)\]"):
        run_ranks(shift, 2)


@pytest.mark.parametrize("send, rows", [([1], [1, 1]), ([1, 1], [1]), ([2, 1], [1, 1])])
def test_tables_that_do_not_fit_the_ring_are_refused(send, rows):
    def exchange(transport):
        transport.all_to_all([torch.ones(n) for n in send] if transport.rank == 0 else [torch.ones(1)] * 2, rows)

    with pytest.raises(ConfigError, match="build both tables from one layout"):
        run_ranks(exchange, 2)


def test_a_ring_of_one_needs_no_process_group():
    transport = DistributedTransport(None, [5], "cpu", deadline_s=1.0)
    tensor = torch.arange(3.0)
    assert (transport.rank, transport.size) == (0, 1)
    assert torch.equal(transport.shift([tensor], [(3,)]).wait()[0], tensor)
    assert torch.equal(transport.all_to_all([tensor], [3])[0], tensor)
    assert torch.equal(transport.sum_(tensor.clone()), tensor)
    transport.check_equal(3, "anything")
