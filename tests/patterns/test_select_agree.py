"""A rank that holds another selection is named on every rank, before anything runs on it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sglang_mm.errors import RankMismatch
from sglang_mm.patterns.catalog import Blocks, Grid
from sglang_mm.patterns.chosen import BlockSet
from sglang_mm.patterns.select.draft import Draft
from sglang_mm.types import Axis
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.planted import Line, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(40, 4, 6), Text(30))
Q, K = plant(TOKENS, [Line(Axis.FRAME, 7)] * 2, noise=1.0)


def other_class(panel):
    return replace(panel, chosen=replace(panel.chosen, classes=panel.chosen.classes + 1))


def other_last_list(panel):
    """The last list is that of the probe, which all ranks hold: one key block less."""
    blocks = panel.chosen
    ptr = torch.cat([blocks.ptr[:-1], blocks.ptr[-1:] - 1])
    return replace(panel, chosen=BlockSet(blocks.row_blocks, ptr, blocks.key_blocks[:-1]))


def finish(pattern, change, changed, q, k, rows, keys, peers):
    """What the rank is told; None where all agree."""
    draft = Draft([(0,), (1,)], q, k, rows, keys, scale=1.0, peers=peers)
    probe = draft.probe(None, [0, 1])
    for unit, sets in enumerate(draft.choose(probe, [(unit, ((None, pattern),)) for unit in (0, 1)])):
        is_changed = unit == 1 and peers.rank in changed
        draft.keep(unit, tuple(change(panel) if is_changed else panel for panel in sets), 1.0)
    try:
        draft.finish("test", 20)
    except RankMismatch as error:
        return str(error)


@pytest.mark.parametrize(
    "pattern, change, message",
    [
        (Grid(axis="frame", sink=8, window=64), other_class, "selections differ between ranks [0, 1, 3] and [2]"),
        (Blocks(), other_last_list, "the lists of row block 8 differ between ranks [0, 1, 2, 3]"),
    ],
    ids=["class", "blocks"],
)
def test_every_rank_names_the_one_that_differs(pattern, change, message):
    shards = random_shards(len(TOKENS), 4)
    assert spread(partial(finish, pattern, change, [2]), Q, K, TOKENS, shards) == [message] * 4
    assert spread(partial(finish, pattern, change, []), Q, K, TOKENS, shards) == [None] * 4


def test_all_may_change_alike():
    """Agreement is asked for, not correctness: one rank alone, or all of them, may hold any selection."""
    everyone = partial(finish, Grid(axis="frame"), other_class, [0, 1])
    assert spread(everyone, Q, K, TOKENS, random_shards(len(TOKENS), 2)) == [None] * 2
