"""Lists of all ranks, joined on each: the same as one rank's own."""

from functools import partial

import pytest
import torch

from sglang_mm.parallel.local import run_ranks
from sglang_mm.patterns.boundary import Boundary2D, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import Blocks, Dense, Grid
from sglang_mm.patterns.chosen import BlockSet, Nothing, Panel, Selection, Unit
from sglang_mm.patterns.select import Alone, select
from sglang_mm.patterns.select.shared import share_blocks
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.planted import Line, Noise, plant
from tests.patterns.ranks import ThreadPeers, random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(80, 4, 6), Text(30))
GRID = Grid(axis="frame", sink=8, window=64)
PLANS = [
    ((0,), NoBoundary(Blocks(0.5))),
    ((1,), QBoundary(video=GRID)),
    ((2,), QBoundary(text=Blocks(0.3), video=Blocks(0.7))),
    ((3,), Boundary2D({"video-video": Blocks(0.4), "text-video": Blocks(0.6)})),
]


def shared(plans, q, k, rows, keys, peers):
    selection, _ = select(plans, q, k, rows, keys, scale=1.0, theta=1e-9, peers=peers)
    return selection, share_blocks(selection, peers)


def lists(selection):
    """Per panel with lists: {row block: key blocks}."""
    panels = [panel.chosen for unit in selection.units for panel in unit.panels if isinstance(panel.chosen, BlockSet)]
    return [
        dict(zip(each.row_blocks.tolist(), map(torch.Tensor.tolist, each.key_blocks.tensor_split(each.ptr[1:-1]))))
        for each in panels
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_rank_holds_what_one_rank_would(ranks):
    q, k = plant(TOKENS, [Noise(), Line(Axis.FRAME, 7), Noise(), Noise()], noise=3.0)
    q, k = q.double(), k.double()
    ((_, expected),) = spread(partial(shared, PLANS), q, k, TOKENS, random_shards(len(TOKENS), 1))
    assert [len(each) for each in lists(expected)] == [16, 2, 16, 2, 16]
    for own, joined in spread(partial(shared, PLANS), q, k, TOKENS, random_shards(len(TOKENS), ranks)):
        assert lists(joined) == lists(expected)
        assert joined.digest() == own.digest() == expected.digest()
        assert [unit.heads for unit in joined.units] == [heads for heads, _ in PLANS]
        assert joined.units[1].panels == own.units[1].panels


def blocks_of(table):
    """A BlockSet from {row block: key blocks}."""
    rows = sorted(table)
    ptr = torch.tensor([0, *(len(table[row]) for row in rows)]).cumsum(0)
    key_blocks = torch.tensor([block for row in rows for block in table[row]], dtype=torch.int64)
    return BlockSet(torch.tensor(rows, dtype=torch.int64), ptr, key_blocks)


def of_tables(tables):
    """A unit per table, with a panel beside it that has no lists."""
    beside = Panel(Modality.TEXT, None, Dense(), Nothing())
    panels = [Panel(Modality.VIDEO, None, Blocks(), blocks_of(table)) for table in tables]
    return Selection(tuple(Unit((n,), (beside, panel)) for n, panel in enumerate(panels)), group=1)


@pytest.mark.parametrize(
    "tables",
    [
        [[{0: [0], 9: [0, 8, 9]}, {}], [{9: [0, 8, 9], 300: [7, 255, 256, 300]}, {4: [4]}], [{}, {}]],
        [[{70000: [0, 69999, 70000]}], [{5: []}]],
        [[{}], [{}]],
        [[{0: []}], [{1: []}]],
    ],
    ids=["some ranks without", "far out", "nobody has any", "empty lists"],
)
def test_by_hand(tables):
    ranks = len(tables)
    expected = [{row: each[panel][row] for each in tables for row in each[panel]} for panel in range(len(tables[0]))]
    for joined in run_ranks(lambda link: share_blocks(of_tables(tables[link.rank]), ThreadPeers(link)), ranks):
        assert lists(joined) == [dict(sorted(each.items())) for each in expected]


class Counting(Alone):
    """One of two ranks that hold the same; counts the gathers."""

    size = 2

    def __init__(self):
        self.gathers = 0

    def gather(self, tensor):
        self.gathers += 1
        return torch.stack([tensor, tensor])


@pytest.mark.parametrize("tables, gathers", [([], 0), ([{3: [0, 3]}], 2), ([{3: [0, 3]}] * 28, 2)])
def test_two_gathers_for_all_panels_together(tables, gathers):
    peers = Counting()
    assert lists(share_blocks(of_tables(tables), peers)) == tables
    assert peers.gathers == gathers
