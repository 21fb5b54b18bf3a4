"""Pictures of what a request did: cells against the whole mask, windows, chunks, what is refused."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.density import density
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.pictures import draw_request, illustrate
from sglang_mm.patterns.pictures.canvas import BACKGROUND, COLORS, cell_pixels, rgb, scale_of
from sglang_mm.patterns.pictures.draw import AXIS, FOOT, LONGEST, TOP
from sglang_mm.patterns.pictures.parts import Part, UnitParts, part_of_pairs
from sglang_mm.patterns.pictures.pooled import Chunk, pool_pairs
from sglang_mm.patterns.pictures.request import layer_of
from sglang_mm.patterns.pictures.views import CellsView
from sglang_mm.patterns.select import Trial, Verdict
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest
from tests.patterns.maps import Media, Text, token_map

pytestmark = pytest.mark.usefixtures("one_thread")
MIXED = token_map(Text(30), Media(1, 6, 8), Text(20), Media(16, 4, 6, newline=True), Text(16))
LONG = token_map(Text(50), Media(30, 12, 16), Text(40))
PLANS = [
    NoBoundary(Grid(sink=4, window=16, slash=2, horizontal=True)),
    NoBoundary(TriShape(4, 16, last=5)),
    NoBoundary(VerticalSlash(12, 128, 4, 16)),
    QBoundary(text=VerticalSlash(12, 128, 4, 16), image=AShape(4, 16), video=Grid(sink=4, window=16)),
    Boundary2D({"video-video": Grid(sink=4, window=16), "text-video": Blocks(), "video-text": Dense()}),
]
SPARSE, FULL = PLANS[3], NoBoundary(Dense())


def kept(tokens, chunks, plans=(SPARSE,), layer=4):
    """Every chunk has made-up sets of one of the plans, in one unit of two heads."""
    of_chunks = []
    for _, plan in zip(chunks, plans):
        unit = illustrate(plan, tokens)
        unit = type(unit)((0, 1), unit.panels)
        trial = Trial(((None, AShape()),), 0.25)
        verdict = Verdict((0, 1), None, ((None, Dense()),), 0.875, (trial,), "dense: because")
        of_chunks.append((KeptLayer(layer, Selection((unit,), 2), (verdict,), (density(unit, tokens),)),))
    return KeptRequest("r-1", tokens, tuple(chunks), 2, "auto", tuple(of_chunks))


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_a_window_of_parts_is_cut_from_the_whole(plan):
    unit = illustrate(plan, MIXED)
    rows, keys = torch.arange(100, 520, 3), torch.arange(7, 431)
    assert torch.equal(UnitParts(unit, MIXED).of(rows, keys), part_of_pairs(unit, MIXED)[rows][:, keys])


@pytest.mark.parametrize("pool", [1, 8, 100])
@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_cells_are_what_the_mask_has(plan, pool):
    """Against the oracle, cell by cell: two chunks of different plans, from row 35 on."""
    first, second = illustrate(plan, MIXED), illustrate(FULL, MIXED)
    chunks = [Chunk(range(35, 300), UnitParts(first, MIXED)), Chunk(range(300, 500), UnitParts(second, MIXED))]
    rows, keys = range(20, 510), range(3, 411)
    cells = pool_pairs(chunks, rows, keys, pool)
    seen = torch.cat([unit_mask(first, MIXED)[:300], unit_mask(second, MIXED)[300:]])
    part = torch.cat([part_of_pairs(first, MIXED)[:300], part_of_pairs(second, MIXED)[300:]])
    causal = torch.ones_like(seen).tril()
    for each in (seen, part, causal):
        each[:35] = 0
        each[500:] = 0
    assert cells.causal == int(causal[20:510, 3:411].sum()) and cells.looked_at == pool
    assert cells.counts[1:].sum() == int(seen[20:510, 3:411].sum())
    for h in range(cells.part.shape[0]):
        for w in range(0, cells.part.shape[1], 1 if pool > 1 else 29):
            cell = np.s_[20 + h * pool : min(20 + (h + 1) * pool, 510), 3 + w * pool : min(3 + (w + 1) * pool, 411)]
            assert cells.part[h, w] == part[cell].max()
            total = int(causal[cell].sum())
            expected = int(seen[cell].sum()) / total if total else float("nan")
            np.testing.assert_allclose(cells.share[h, w], expected, rtol=1e-6)


def test_of_very_long_prompts_some_rows_are_looked_at():
    unit = illustrate(NoBoundary(VerticalSlash(12, 0, 4, 16)), MIXED)
    whole = range(len(MIXED))
    chunk = Chunk(whole, UnitParts(unit, MIXED))
    every, some = (pool_pairs([chunk], whole, whole, 32, most) for most in (2**20, 2**15))
    assert every.looked_at == 32 and 1 <= some.looked_at < 32 and some.causal < 2**16
    assert (some.part <= every.part).all() and (some.part == Part.LINES).any()
    assert pool_pairs([chunk], whole, whole, 32, 0).looked_at == 1
    again = pool_pairs([chunk], whole, whole, 32, 2**15)
    assert (again.part == some.part).all()


def test_fewer_pairs_are_paler():
    part = np.array([[Part.LINES, Part.LINES, Part.LINES, Part.UNSEEN, Part.UNSEEN]], dtype=np.uint8)
    share = np.array([[1, 0.25, 0.01, 0, np.nan]], dtype=np.float32)
    pixels = cell_pixels(part, share, 2)
    assert pixels.shape == (2, 10, 3)
    full, half, little, unseen, outside = (pixels[0, 2 * n].astype(int) for n in range(5))
    assert (full == rgb(COLORS[Part.LINES])).all() and (unseen == rgb(COLORS[Part.UNSEEN])).all()
    assert (outside == rgb(BACKGROUND)).all() and full[0] < half[0] < little[0] < unseen[0]


def hex_at(picture, y, x):
    return "#" + bytes((picture[y, x, :3] * 255).round().astype(np.uint8)).hex()


def test_a_prompt_longer_than_can_be_drawn_pair_by_pair(tmp_path):
    """Two chunks behind a cached prefix: the rows of each show its own sets."""
    chunks = (range(300, 3000), range(3000, len(LONG)))
    assert len(LONG) > LONGEST
    picture = imread(draw_request(kept(LONG, chunks, (SPARSE, FULL)), 4, 1, tmp_path / "long.png"))
    scale = scale_of(len(LONG))
    side = -(-(len(LONG) - 300) // scale.pool) * scale.zoom
    assert TOP + side + AXIS + FOOT < len(picture) < TOP + side + AXIS + FOOT + 300
    left = CellsView.margins.fget(None)[0]

    def at(row, key):
        return hex_at(picture, TOP + (row - 300) // scale.pool * scale.zoom, left + key // scale.pool * scale.zoom)

    assert at(5500, 2000) == at(3100, 1000) == COLORS[Part.DENSE_ROWS]
    assert at(2900, 2896) == COLORS[Part.WINDOW] and at(2900, 2500) != COLORS[Part.DENSE_ROWS]
    assert at(400, 2000) == BACKGROUND


def test_a_window_of_a_head(tmp_path):
    request = kept(LONG, (range(len(LONG)),), (NoBoundary(Grid(sink=4, window=16)),))
    rows, keys = range(2000, 2300), range(40, 440)
    picture = imread(draw_request(request, 4, 0, tmp_path / "window.png", rows=rows, keys=keys))
    scale, left = scale_of(400), CellsView.margins.fget(None)[0]
    assert scale.pool == 1
    part_RK = UnitParts(request.layers[0][0].selection.units[0], LONG).of(torch.tensor([2200]), torch.arange(40, 440))
    for key in range(300):  # words stand further right
        color = hex_at(picture, TOP + 200 * scale.zoom, left + key * scale.zoom)
        assert color == COLORS[Part(int(part_RK[0, key]))]
    assert {Part.LINES, Part.UNSEEN} <= {Part(each) for each in part_RK.unique().tolist()}


def test_short_prompts_are_drawn_beside_their_programs(tmp_path):
    whole = (range(len(MIXED)),)
    one = imread(draw_request(kept(MIXED, whole), 4, 0, tmp_path / "one.png"))
    window = imread(draw_request(kept(MIXED, whole), 4, 0, tmp_path / "window.png", rows=whole[0], keys=whole[0]))
    everyone = imread(draw_request(kept(MIXED, whole), 4, None, tmp_path / "all.png"))
    assert one.shape[1] > 1.8 * window.shape[1] and everyone.shape != one.shape


@pytest.mark.parametrize(
    ("layer", "head", "options", "message"),
    [
        (5, 0, {}, "layer 5. Allowed: 4."),
        (4, 2, {}, "head 2. Allowed: 0 to 1."),
        (4, 0, {"rows": range(5, 10**6)}, "rows 5:1000000. Allowed: 0 <= start < stop <= "),
        (4, 0, {"keys": range(5, 5)}, "keys 5:5. "),
        (4, None, {"keys": range(5, 9)}, "a window of all heads. "),
    ],
)
def test_what_a_request_does_not_have(tmp_path, layer, head, options, message):
    with pytest.raises(ConfigError) as raised:
        draw_request(kept(MIXED, (range(len(MIXED)),)), layer, head, tmp_path / "none.png", **options)
    assert str(raised.value).startswith(message) and not list(tmp_path.iterdir())


def test_layers_of_chunks():
    request = kept(MIXED, (range(9), range(9, 40)), (SPARSE, FULL))
    assert [each.densities for each in layer_of(request, 4)] == [each[0].densities for each in request.layers]
