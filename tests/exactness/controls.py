"""How a wrong simplification is told from the real thing."""

from collections.abc import Callable, Sequence

import torch

from sglang_mm.types import TileProgram
from tests.exactness.layers import Layer, Placed, attend_by, times_shown_by
from tests.exactness.oracle import assert_exact, errors, exact


def assert_right(layer: Layer) -> None:
    """Its programs show its mask, each key once, and are exact: in fp64, within some 1e-14."""
    qkv = layer.random_qkv()
    assert torch.equal(layer.times_shown(), layer.masks.byte())
    assert_exact(layer.attend(*qkv), *qkv, layer.seen_by_head(), layer.merges)


def assert_wrong(layer: Layer, wrong: Sequence[Placed], *, off_by: float, twice: bool) -> None:
    """The layer is right; the other programs show something else, keys twice or not, and are off by more than said."""
    assert_right(layer)
    shown = times_shown_by(wrong)
    assert not torch.equal(shown, layer.masks.byte())
    assert bool((shown > 1).any()) == twice
    qkv = layer.random_qkv()
    assert errors(attend_by(wrong, *qkv), exact(*qkv, layer.seen_by_head()))[0] > off_by


def changed(layer: Layer, change: Callable[[TileProgram], TileProgram]) -> list[Placed]:
    return [(rows, keys, change(program)) for rows, keys, program in layer.programs]
