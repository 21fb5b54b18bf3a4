"""Cached keys that rest on all ranks: they travel with the new ones, or queries travel to them. Both are exact."""

import pytest
import torch

from sglang_mm.errors import ConfigError, RingBroken
from sglang_mm.kernels import causal_attention
from sglang_mm.parallel.gather import GatherTables, attend_gathered
from sglang_mm.parallel.holdings import Holdings
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.pass_q import attend_resting, travels
from sglang_mm.parallel.ring import Piece, attend_pieces, ring_pieces
from sglang_mm.types import BatchLayout, Residence, Run
from tests.parallel.prompts import SCALE, Prompts, batch, make_prompts, ring_errors

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
RANKS = [1, 2, 3, 4, 5, 8]
FEW_CACHED = [Run(3, 40)]  # some ranks keep no key of three


def prompts_of(ranks: int) -> Prompts:
    return make_prompts([*batch(ranks), FEW_CACHED], ranks, torch.float64, heads=(6, 2, 16))


def kept(prompts: Prompts, residence: Residence, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = residence.positions(0, prompts.layout.requests[request].start)
    return prompts.k[request][positions], prompts.v[request][positions]


def brought(prompts: Prompts, residence: Residence) -> list[torch.Tensor]:
    """k, v of a rank: per request what rests with it, then the keys of the rows it computes."""
    sides = []
    for side, whole in enumerate((prompts.k, prompts.v)):
        new = prompts.shard(whole, residence.rank)
        parts = []
        for request, rows in enumerate(prompts.layout.segments(residence.rank)):
            parts += [kept(prompts, residence, request)[side], new[rows]]
        sides.append(torch.cat(parts))
    return sides


def keys_travel(schedule: str, prompts: Prompts, transport, page: int):
    residence = Residence(transport.size, transport.rank, page)
    holdings = Holdings(prompts.layout, residence)
    q, (k, v) = prompts.shard(prompts.q, transport.rank), brought(prompts, residence)
    if schedule == "gather":
        return attend_gathered(q, k, v, GatherTables(prompts.layout, "cpu", holdings), transport, scale=SCALE)
    pieces = ring_pieces(k, v, holdings.counts, transport)
    return attend_pieces(q, prompts.layout, transport.rank, pieces, holdings=holdings, scale=SCALE)


def queries_travel(schedule: str, prompts: Prompts, transport, page: int, keep=lambda rank: True):
    rank, layout = transport.rank, prompts.layout
    residence = Residence(transport.size, rank, page)

    def attend_here(queries, source):
        out, lse = [], []
        for request, rows in enumerate(layout.segments(source)):
            k, v = kept(prompts, residence, request)
            k, v = (k, v) if keep(rank) else (k[:0], v[:0])
            seen = torch.arange(len(k))
            mine = torch.full((rows.stop - rows.start,), len(k))
            partial = causal_attention(queries[rows], k, v, mine, seen, scale=SCALE)
            out.append(partial[0]), lse.append(partial[1])
        return torch.cat(out), torch.cat(lse, dim=1)

    q, k, v = (prompts.shard(tensors, rank) for tensors in (prompts.q, prompts.k, prompts.v))
    rows = [layout.rows(each) for each in range(transport.size)]
    state = attend_resting(q, rows, transport, attend_here)
    if schedule == "gather":
        return attend_gathered(q, k, v, GatherTables(layout, "cpu"), transport, scale=SCALE, state=state)
    return attend_pieces(q, layout, rank, ring_pieces(k, v, rows, transport), scale=SCALE, state=state)


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("attend", [keys_travel, queries_travel])
@pytest.mark.parametrize("ranks", RANKS)
def test_equals_dense(attend, schedule, ranks):
    prompts = prompts_of(ranks)
    outputs = run_ranks(lambda transport: attend(schedule, prompts, transport, 8 * ranks), ranks)
    assert max(error for error, _ in ring_errors(prompts, outputs)) < 1e-12


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("attend", [keys_travel, queries_travel])
def test_equals_dense_on_two_nodes(attend, schedule):
    prompts = prompts_of(4)
    outputs = run_ranks(lambda transport: attend(schedule, prompts, transport, 32), 4, nodes=2)
    assert max(error for error, _ in ring_errors(prompts, outputs)) < 1e-12


@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_control_a_rank_that_forgets_its_keys_is_noticed(schedule):
    prompts = prompts_of(3)
    outputs = run_ranks(
        lambda transport: queries_travel(schedule, prompts, transport, 24, keep=lambda rank: rank != 1), 3
    )
    assert max(error for error, _ in ring_errors(prompts, outputs)) > 1e-3


def test_a_piece_without_the_keys_that_rest_is_refused():
    prompts = make_prompts([[Run(64, 40)]], 2, torch.float64)
    q, (k, v) = prompts.shard(prompts.q, 0), (prompts.shard(side, 1) for side in (prompts.k, prompts.v))
    holdings = Holdings(prompts.layout, Residence(2, 0, 16))
    with pytest.raises(ConfigError, match=r"piece of rank 1 with 20 rows.*52 rows"):
        attend_pieces(q, prompts.layout, 0, [Piece(1, k, v)], holdings=holdings, scale=SCALE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_holdings_are_all_keys_once(ranks):
    layout = BatchLayout((make_layout([Run(70, 33)], ranks), make_layout([Run(0, 9)], ranks)))
    holdings = Holdings(layout, Residence(ranks, 0, 4 * ranks))
    for request, own in enumerate(layout.requests):
        positions = torch.cat([holdings.positions(rank, request) for rank in range(ranks)])
        assert positions.sort().values.tolist() == list(range(own.start + own.length))
    for rank in range(ranks):
        assert holdings.rows(rank) == sum(len(holdings.positions(rank, request)) for request in range(2))
        piece = torch.cat([holdings.positions(rank, request) for request in range(2)])
        new = torch.cat([own.rows[rank] for own in layout.requests])
        assert torch.equal(piece[holdings.new_rows(rank)], new)


def test_a_rank_that_does_not_answer_breaks_the_exchange():
    def attend(transport):
        if transport.rank == 1:
            return
        nothing = torch.zeros(2, 2, 4), torch.zeros(2, 2)
        attend_resting(nothing[0], [2, 2, 2], transport, lambda queries, source: nothing)

    with pytest.raises(RingBroken, match="pass_q"):
        run_ranks(attend, 3, deadline_s=0.5)


def test_what_is_fewer_bytes_travels():
    """7B: 2 KiB of K/V a row, 7 KiB of queries, 14 KiB of results; a question of 500 rows, or a second video."""
    sizes = {"kv_bytes": 2048, "query_bytes": 7168, "state_bytes": 14336}
    assert not travels(1 << 20, 500, **sizes) and travels(5000, 500, **sizes) and travels(1 << 20, 100_000, **sizes)
