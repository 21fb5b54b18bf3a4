"""Tiles and densities of every kind of head: against masks, pair by pair and tile by tile."""

import pytest

from sglang_mm.config import Config
from sglang_mm.dryrun.programs import CATALOGUE, MOST_KINDS, compile_kinds, of_catalogue, of_plan
from sglang_mm.dryrun.prompt import lay_out
from sglang_mm.patterns.boundary import NoBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.pictures import illustrate
from sglang_mm.patterns.plan import Model, Plan, one_of_each, uniform
from sglang_mm.plan.geometry import parse_geometry

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = parse_geometry("text:40,video:20x8x8,text:300,image:10x10,text:41")
RANKS = 3
TILE = 128


@pytest.fixture(scope="module")
def laid_out():
    return lay_out(TOKENS, Config(cp=RANKS))


@pytest.fixture(scope="module")
def kinds(laid_out):
    return {kind.name: kind for kind in compile_kinds(of_catalogue(), TOKENS, laid_out.layout, 7)}


def test_every_pattern_and_boundary_is_there():
    tags = [type(head_plan).__struct_config__.tag for head_plan in CATALOGUE.values()]
    assert set(tags) == {"none", "k", "q", "2d"}
    alone = {type(each.pattern) for each in CATALOGUE.values() if isinstance(each, NoBoundary)}
    assert alone == {Dense, AShape, TriShape, VerticalSlash, Grid, Blocks}


@pytest.mark.parametrize("name", CATALOGUE)
def test_densities_are_those_of_the_masks(kinds, name):
    seen = int(unit_mask(illustrate(CATALOGUE[name], TOKENS), TOKENS).sum())
    assert kinds[name].density == pytest.approx(seen / (len(TOKENS) * (len(TOKENS) + 1) / 2), rel=1e-12)


def test_dense_tiles_are_counted_one_by_one(kinds, laid_out):
    """128 neighbouring rows of a rank against 128 keys of a piece that lie in one block of positions."""
    rows = [own.tolist() for own in laid_out.layout.rows]
    for rank, found in enumerate(kinds["dense"].ranks):
        full = masked = 0
        for first in range(0, len(rows[rank]), TILE):
            tile = rows[rank][first : first + TILE]
            for piece in rows:
                blocks: dict[int, list[int]] = {}
                for key in piece:
                    blocks.setdefault(key // TILE, []).append(key)
                for keys in blocks.values():
                    full += keys[-1] <= tile[0]
                    masked += keys[0] <= tile[-1] and keys[-1] > tile[0]
        assert (found.full, found.masked) == (full, masked)


def test_no_kind_computes_less_than_it_shows(kinds, laid_out):
    for name, kind in kinds.items():
        shown = unit_mask(illustrate(CATALOGUE[name], TOKENS), TOKENS).sum(1)
        for rank, found in enumerate(kind.ranks):
            assert found.tiles * TILE * TILE >= int(shown[laid_out.layout.rows[rank]].sum())
            assert found.entries > 0 and found.bytes > 0 and found.seconds > 0
        assert kind.balance >= 1


def test_a_plan_is_compiled_kind_by_kind():
    model = Model("Qwen2_5_VLForConditionalGeneration", layers=3, heads=16, kv_heads=4, head_dim=8)
    wanted = of_plan(one_of_each(model))
    assert len(wanted) == 8 and all(heads == 6 for _, heads, _ in wanted)
    assert {name for name, _, _ in wanted} >= {"grid", "blocks", "k: a_shape", "q: vertical_slash, a_shape"}
    [(name, heads, head_plan)] = of_plan(uniform(model, NoBoundary(Dense())))
    assert (name, heads, head_plan) == ("dense", 48, NoBoundary(Dense()))


def test_of_many_kinds_those_that_most_heads_have():
    model = Model("Qwen2_5_VLForConditionalGeneration", layers=40, heads=4, kv_heads=4, head_dim=8)
    layers = [uniform(model, NoBoundary(AShape(4, 64 + min(n, 35)))).layers[0] for n in range(40)]
    wanted = of_plan(Plan(model, tuple(layers)))
    assert len(wanted) == MOST_KINDS and wanted[0][1] == 20 and wanted[1][1] == 4
