"""Gathered rows and keys: nothing is lost, nothing comes twice, and what is scattered lies where it was gathered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_mm.patterns.program import Shard, compile_rows
from sglang_mm.patterns.program.shard import Tiles
from sglang_mm.patterns.program.sources import Raw, key_tiles
from sglang_mm.types import Axis, TileProgram
from tests.exactness.layers import Layer
from tests.exactness.strategies import layers, ownership, prompts, tiles

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NAN = float("nan")


def cut(index: Tensor, ptr: Tensor) -> list[list[int]]:
    return [part.tolist() for part in index.tensor_split(ptr[1:-1])] if len(ptr) > 1 else []


def assert_round_trip(index: Tensor, size: int) -> None:
    """Gather, scatter: the values that were there, and nothing where nothing was gathered."""
    values, back = torch.arange(size).double(), torch.full((size,), NAN, dtype=torch.float64)
    back[index.long()] = values[index.long()]
    held = torch.zeros(size, dtype=torch.bool)
    held[index.long()] = True
    assert int(held.sum()) == len(index)
    assert torch.equal(back[held], values[held]) and back[~held].isnan().all()


def rows_of_units(program: TileProgram) -> list[Tensor]:
    """Per unit, the rows of its items, item after item."""
    row_tiles = cut(program.rows, program.row_ptr)
    found: list[list[int]] = [[] for _ in program.heads]
    for unit, tile in zip(program.item_unit.tolist(), program.item_rows.tolist()):
        found[unit] += row_tiles[tile]
    return [torch.tensor(rows, dtype=torch.int64) for rows in found]


@settings(deadline=None, max_examples=25)
@given(layers())
def test_a_row_comes_once_per_unit(layer: Layer):
    """In the main program every row does, and in those of class differences no row twice."""
    axes = layer.merges // len(layer.keys) - 1
    for number, (mine, _, program) in enumerate(layer.programs):
        for rows in rows_of_units(program):
            assert_round_trip(rows, len(mine))
            if number % (1 + axes) == 0:
                assert torch.equal(rows.sort().values, torch.arange(len(mine)))
        for index, ptr, positions in (
            (program.rows, program.row_ptr, program.pos_q),
            (program.keys, program.key_ptr, program.pos_k),
        ):
            assert all(part == sorted(set(part)) for part in cut(positions[index.long()], ptr))
        assert program.item_unit.tolist() == sorted(program.item_unit.tolist())


@settings(deadline=None, max_examples=25)
@given(layers())
def test_a_key_comes_once_per_source(layer: Layer):
    """In ascending order, and all of a modality in its raw source."""
    compiled = compile_rows(layer.selection, Shard(layer.tokens, layer.rows[0]), tile=layer.row_tile)
    for rows in compiled:
        for piece in (Shard(layer.tokens, keys) for keys in layer.keys):
            found = key_tiles(rows.sources, piece, layer.key_tile)
            assert_tiles(found, piece, layer.key_tile)
            source = found.source.repeat_interleave(found.ptr.diff())
            for number in source.unique().tolist():
                index = found.index[source == number]
                assert_round_trip(index, len(piece))
                assert bool((index.diff() > 0).all())
            for number, each in enumerate(rows.sources):
                if isinstance(each, Raw):
                    held = layer.tokens.modality[piece.positions] == each.modality
                    wanted = torch.arange(len(piece)) if each.modality is None else held.nonzero().flatten()
                    assert torch.equal(found.index[source == number].long(), wanted)


def assert_tiles(found: Tiles, shard: Shard, tile: int) -> None:
    parts = [[shard.positions[token].item() for token in part] for part in cut(found.index, found.ptr)]
    assert found.first.tolist() == [part[0] for part in parts] and found.last.tolist() == [part[-1] for part in parts]
    assert all(0 < len(part) <= tile for part in parts)
    assert found.source.tolist() == sorted(found.source.tolist())


@settings(deadline=None, max_examples=40)
@given(st.data(), prompts, tiles, st.sampled_from(Axis))
def test_order_of_classes(data, tokens, tile, axis):
    """Places of frames, all of them once: by item, class and position. A tile has one item and one class."""
    classes = tokens.classes(axis)
    of_token, item = classes.of_token.tolist(), tokens.item.tolist()
    for positions in data.draw(ownership(tokens)):
        shard = Shard(tokens, positions)
        found = shard.by_class(axis, tile)
        ordered = sorted((item[at], of_token[at], at) for at in positions.tolist() if of_token[at] >= 0)
        assert positions[found.index.long()].tolist() == [at for _, _, at in ordered]
        assert_round_trip(found.index, len(shard))
        assert_tiles(found, shard, tile)
        source = found.source.repeat_interleave(found.ptr.diff()).tolist()
        assert source == [number * len(classes) + name for number, name, _ in ordered]
