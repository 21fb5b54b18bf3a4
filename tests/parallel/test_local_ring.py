"""The ring over threads equals dense attention, and the comparison notices a broken ring."""

from functools import partial

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import causal_attention
from sglang_mm.parallel import ring
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.ring import Piece, attend_pieces, ring_pieces
from sglang_mm.types import BatchLayout, Run
from tests.parallel.prompts import (
    CACHED,
    ONE_CACHED,
    SHORT,
    assert_ring_equals_dense,
    batch,
    make_prompts,
    mixed,
    ring_attention,
    ring_errors,
)

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
RANKS = range(1, 9)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("ranks", RANKS)
def test_ring_equals_dense_in_fp64_to_1e_12(ranks):
    prompts = make_prompts(batch(ranks), ranks, torch.float64)
    outputs = run_ranks(lambda transport: ring_attention(prompts, transport), ranks)
    assert_ring_equals_dense(prompts, outputs)
    assert max(error for error, _ in ring_errors(prompts, outputs)) < 1e-12


@pytest.mark.parametrize("ranks", RANKS)
def test_ring_equals_dense_in_fp32(ranks):
    prompts = make_prompts(batch(ranks), ranks, torch.float32)
    assert_ring_equals_dense(prompts, run_ranks(lambda transport: ring_attention(prompts, transport), ranks))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_every_backend_and_dtype(backend, dtype):
    """GQA with an odd head dim; bf16 is rounded once, at the end."""
    prompts = make_prompts(batch(3), 3, dtype, heads=(6, 2, 17))
    assert_ring_equals_dense(prompts, run_ranks(lambda transport: ring_attention(prompts, transport, backend), 3))


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_prompts_shorter_than_the_ranks(ranks):
    """Some ranks have no row at all and still pass every piece on."""
    prompts = make_prompts([SHORT, ONE_CACHED], ranks, torch.float64)
    outputs = run_ranks(lambda transport: ring_attention(prompts, transport), ranks)
    assert ranks == 2 or any(len(out) == 0 for out in outputs)
    assert_ring_equals_dense(prompts, outputs)


def test_a_request_does_not_see_its_neighbours():
    """The same requests in another order give the same answers."""
    prompts = make_prompts([mixed(3), CACHED, SHORT], 3, torch.float64)
    turned = [2, 0, 1]
    other = type(prompts)(
        BatchLayout(tuple(prompts.layout.requests[i] for i in turned)),
        *([tensors[i] for i in turned] for tensors in (prompts.q, prompts.k, prompts.v)),
    )
    answers = []
    for ordered in (prompts, other):
        outputs = run_ranks(partial(ring_attention, ordered), 3)
        answers.append([[out[s] for s in ordered.layout.segments(rank)] for rank, out in enumerate(outputs)])
    for rank in range(3):
        for place, request in enumerate(turned):
            assert torch.equal(answers[0][rank][request], answers[1][rank][place])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_control_a_dropped_remote_piece_is_noticed(dtype):
    prompts = make_prompts([mixed(4)], 4, dtype)

    def keep(piece):  # rank 3 drops its own, the others a remote one
        return piece.source != 3

    errors = ring_errors(prompts, run_ranks(lambda transport: ring_attention(prompts, transport, keep=keep), 4))
    assert errors[0][0] > 10 * errors[0][1]


def test_control_a_lost_prefix_is_noticed():
    prompts = make_prompts([mixed(4), CACHED], 4, torch.float32)
    cached = prompts.k[1][:300].clone()
    prompts.k[1][:300] = 0
    outputs = run_ranks(lambda transport: ring_attention(prompts, transport), 4)
    prompts.k[1][:300] = cached
    (whole, allowed), (lost, tolerated) = ring_errors(prompts, outputs)
    assert whole <= allowed and lost > 10 * tolerated


def test_control_merging_without_lse_weights_is_noticed(monkeypatch):
    def average(out, lse, out_i, lse_i):
        seen, seen_i = (~x.isinf().T.unsqueeze(-1) for x in (lse, lse_i))
        out.mul_(seen).add_(out_i).div_((seen.int() + seen_i.int()).clamp(min=1))
        torch.logaddexp(lse, lse_i, out=lse)

    monkeypatch.setattr(ring, "merge", average)
    prompts = make_prompts([mixed(4)], 4, torch.float32)
    errors = ring_errors(prompts, run_ranks(lambda transport: ring_attention(prompts, transport), 4))
    assert errors[0][0] > 10 * errors[0][1]


def test_pieces_come_own_first_then_backwards_around_the_ring():
    rows = [3, 0, 2, 5]

    def collect(transport):
        k = torch.full((rows[transport.rank], 2, 8), float(transport.rank))
        return [(piece.source, piece.k, piece.v) for piece in ring_pieces(k, -k, rows, transport)]

    for rank, pieces in enumerate(run_ranks(collect, 4)):
        assert [source for source, _, _ in pieces] == [(rank - hop) % 4 for hop in range(4)]
        for source, k, v in pieces:
            assert torch.equal(k, torch.full((rows[source], 2, 8), float(source))) and torch.equal(v, -k)


def test_the_next_piece_travels_while_the_caller_computes():
    """Every rank's hop 1 can arrive although no rank has asked for its second piece."""
    posted = []

    def watch(transport):
        exchange = transport.exchange
        transport.exchange = lambda *message: posted.append(message[2]) or exchange(*message)
        pieces = ring_pieces(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), [2, 2, 2], transport)
        seen = []
        for _ in pieces:
            transport.check_equal(0, "turn")
            seen.append([stage for stage in posted if stage.startswith("ring")])
            transport.check_equal(1, "turn")
        return [len(stages) for stages in seen]

    assert run_ranks(watch, 3) == [[3, 6, 6]] * 3


def test_any_iterator_of_pieces_is_a_schedule():
    """Pieces that all rest here, in any order, from a list."""
    prompts = make_prompts(batch(3), 3, torch.float64)
    pieces = [Piece(rank, prompts.shard(prompts.k, rank), prompts.shard(prompts.v, rank)) for rank in (2, 0, 1)]
    outputs = [
        attend_pieces(prompts.shard(prompts.q, rank), prompts.layout, rank, pieces, scale=0.25, prefix=prompts.prefix)
        for rank in range(3)
    ]
    assert_ring_equals_dense(prompts, outputs)


def test_one_rank_is_one_kernel_call():
    prompts = make_prompts([[Run(0, 300)]], 1, torch.float32)
    (out,) = run_ranks(lambda transport: ring_attention(prompts, transport), 1)
    positions = torch.arange(300)
    direct = causal_attention(prompts.q[0], prompts.k[0], prompts.v[0], positions, positions, scale=0.25)[0]
    torch.testing.assert_close(out, direct, rtol=0, atol=0)


def test_tensors_that_do_not_fit_the_layout_are_refused():
    layout = BatchLayout((make_layout([Run(4, 6)], 2),))
    q, k = torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)
    with pytest.raises(ConfigError, match="q with 2 rows"):
        attend_pieces(q[:2], layout, 0, [], scale=1.0)
    with pytest.raises(ConfigError, match=r"prefix of request 0 with 0 rows.*Allowed: 4"):
        attend_pieces(q, layout, 0, [], scale=1.0)
    with pytest.raises(ConfigError, match="piece of rank 1 with 2 rows"):
        attend_pieces(q, layout, 0, [Piece(1, k[:2], k[:2])], scale=1.0, prefix=lambda _: (torch.zeros(4, 2, 8),) * 2)
    with pytest.raises(ConfigError, match="take rows from the batch's holdings"):
        run_ranks(lambda transport: list(ring_pieces(k, k, [3, 4], transport)), 2)
