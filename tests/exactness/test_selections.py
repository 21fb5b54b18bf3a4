"""How the sets of a selection are handed over, and what cannot be compiled."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Phases, Selection
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import Axis
from tests import token_maps
from tests.exactness.layers import Layer, attend_by, one_rank, single

TOKENS = token_maps.text_only(300)
NONE = torch.zeros(0, dtype=torch.int64)
EVERYWHERE = torch.arange(300)
LISTED = BlockSet(torch.tensor([0, 2]), torch.tensor([0, 1, 3]), torch.tensor([0, 0, 2]))


def test_columns_may_be_views_of_one_table():
    """Also two that start at one address and have one length."""
    table = torch.arange(200)
    chosen = table[:10], table[::20], table[100:110], table.view(10, 20)[:, 5]
    units = [
        single(VerticalSlash(sink=0, window=1), Lines(columns, NONE), heads=(head,))
        for head, columns in enumerate(chosen)
    ]
    layer = one_rank(TOKENS, *units, group=4)
    assert torch.equal(layer.times_shown(), layer.masks.byte())


def test_units_may_share_a_set():
    lines = Lines(torch.tensor([3, 250]), torch.tensor([1]))
    patterns = VerticalSlash(sink=0, window=1), VerticalSlash(sink=4, window=1), VerticalSlash(sink=0, window=200)
    layer = one_rank(TOKENS, *(single(each, lines, heads=(head,)) for head, each in enumerate(patterns)), group=3)
    assert torch.equal(layer.times_shown(), layer.masks.byte())


def test_blocks_may_be_known_for_the_ranks_own_rows_alone():
    mine = torch.cat([torch.arange(0, 90), torch.arange(256, 300)])
    layer = Layer(TOKENS, Selection((single(Blocks(), LISTED),), 1), (mine,), (EVERYWHERE,))
    assert torch.equal(layer.times_shown()[0, mine], layer.masks[0, mine].byte())


@pytest.mark.parametrize("rows", [torch.arange(130, 140), torch.arange(100, 140), EVERYWHERE])
def test_blocks_chosen_for_other_rows_are_refused(rows):
    with pytest.raises(ConfigError, match=r"row blocks \[0, 2\].*select with the rows of this rank"):
        compile_rows(Selection((single(Blocks(), LISTED),), 1), Shard(TOKENS, rows))


def test_blocks_chosen_for_no_rows_are_refused():
    empty = BlockSet(NONE, torch.zeros(1, dtype=torch.int64), NONE)
    with pytest.raises(ConfigError, match="select with the rows of this rank"):
        compile_rows(Selection((single(Blocks(), empty),), 1), Shard(TOKENS, EVERYWHERE))


def test_a_selection_for_another_prompt_is_refused():
    selection = Selection((single(VerticalSlash(), Lines(torch.tensor([3, 300]), NONE)),), 1)
    with pytest.raises(ConfigError, match=r"column 300.*below 300.*select for this prompt"):
        compile_rows(selection, Shard(TOKENS, EVERYWHERE[:10]))


def test_keys_of_another_prompt_are_refused():
    """Also of one that is as long."""
    rows = compile_rows(Selection((single(Dense()),), 1), Shard(TOKENS, EVERYWHERE))
    with pytest.raises(ConfigError, match="one token map"):
        compile_piece(rows, Shard(token_maps.text_only(300), EVERYWHERE))


@pytest.mark.parametrize("tile", [-1, 0, 129])
def test_tile_sizes_out_of_range_are_refused(tile):
    shard = Shard(TOKENS, EVERYWHERE)
    selection = Selection((single(Dense()),), 1)
    with pytest.raises(ConfigError, match=rf"a tile of {tile}.*1 \.\. 128"):
        compile_rows(selection, shard, tile=tile)
    with pytest.raises(ConfigError, match=rf"a tile of {tile}.*1 \.\. 128"):
        compile_piece(compile_rows(selection, shard), shard, tile=tile)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([4, 4, 5]), "ascending, each once"),
        (torch.tensor([4, 3]), "sort the shard"),
        (torch.tensor([-1, 3]), r"in 0 \.\. 299"),
        (torch.tensor([3, 300]), r"in 0 \.\. 299"),
        (torch.tensor([3, 4], dtype=torch.int32), r"torch.int32 \(2,\).*int64 \[tokens\]"),
        (torch.tensor([[3, 4]]), r"\(1, 2\).*give one per token"),
    ],
)
def test_positions_of_no_shard_are_refused(positions, message):
    with pytest.raises(ConfigError, match=message):
        Shard(TOKENS, positions)


@pytest.mark.parametrize(
    "unit",
    [
        single(Dense()),
        single(AShape(3, 5)),
        single(VerticalSlash(sink=3, window=5), Lines(torch.tensor([70]), torch.tensor([1]))),
        single(Blocks(), BlockSet(torch.arange(3), torch.arange(4), torch.arange(3))),
        single(Grid(slash=1), Phases(Axis.FRAME, torch.tensor([1]), torch.tensor([[0, 1]]))),
    ],
    ids=lambda unit: type(unit.panels[0].pattern).__name__,
)
@pytest.mark.parametrize(("rows", "keys"), [(NONE, EVERYWHERE), (EVERYWHERE, NONE), (NONE, NONE)])
def test_shards_without_tokens(unit, rows, keys):
    """A rank without rows has no entries; a piece without keys shows nothing, and both stay (0, -inf)."""
    tokens = token_maps.two_videos(same_size=True)
    rows, keys = (each[each < len(tokens)] for each in (rows, keys))
    layer = Layer(tokens, Selection((unit,), 1), (rows,), (keys,))
    assert [program.entries for _, _, program in layer.programs] == [0] * layer.merges
    out, lse = attend_by(layer.programs, *layer.random_qkv())
    assert not out.any() and bool((lse == float("-inf")).all())
