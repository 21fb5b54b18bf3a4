"""The reference for sparse prefill is right about what is known without it, and its planted errors show."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from sglang_mm.demo import huggingface
from sglang_mm.demo.huggingface import Prompt
from sglang_mm.patterns.boundary import Boundary2D, KBoundary, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Panel, Phases, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.plan import Model
from sglang_mm.tiny import write_checkpoint
from sglang_mm.tiny.planted import PATTERNS
from sglang_mm.tiny.video import draw_frames
from sglang_mm.types import Modality
from tests.patterns.maps import Text, token_map
from tests.serving import plans
from tests.serving.compare import TOLERANCE
from tests.serving.masked_forward import Drop, Made, _without_heaviest, answer, decisions

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 2
KINDS = {Dense, AShape, TriShape, VerticalSlash, Grid, Blocks}
SHOWS = 1e-2  # of a log-probability: a hundred times the tolerance that the server is held to
STEP = 2  # positions in time between two frames of the grid: a second


@pytest.fixture(scope="module")
def model(checkpoint):
    return huggingface.load(checkpoint)


@pytest.fixture(scope="module")
def sizes(checkpoint) -> Model:
    with open(f"{checkpoint}/config.json") as file:
        return Model.of_config(json.load(file))


@pytest.fixture(scope="module")
def mixed(checkpoint) -> Prompt:
    """Text, image, text, video, text, image, text: 1955 tokens."""
    shown = "An old story. " * 10, (1, 224, 280), "what? ", (36, 224, 280), "and", (1, 224, 224), "What # moves? " * 14
    return rendered(checkpoint, shown)


@pytest.fixture(scope="module")
def sparse(model, mixed, sizes):
    return answer(model, mixed, plans.every_pattern(sizes), 4)


def rendered(checkpoint: str, parts) -> Prompt:
    """parts: text, or (frames, height, width): an image where it is one frame, else a video."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    media = {"images": [], "videos": []}
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        count, height, width = part
        frames = np.stack(list(draw_frames(count, width, height, seed=len(content))))
        content.append({"type": "video" if count > 1 else "image"})
        media["videos" if count > 1 else "images"].append(frames if count > 1 else frames[0])
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(text=[text], return_tensors="pt", **{kind: shown for kind, shown in media.items() if shown})
    ids = made["input_ids"][0].tolist()
    grids = {token: iter(made.get(name, [])) for token, name in ((268, "image_grid_thw"), (269, "video_grid_thw"))}
    columns, start, i = [], 0, 0
    while i < len(ids):
        piece = torch.full((3, 1), start)
        if ids[i] in grids:
            t, h, w = next(grids[ids[i]]).tolist()
            piece = start + torch.cartesian_prod(torch.arange(t) * STEP, torch.arange(h // 2), torch.arange(w // 2)).T
        columns.append(piece)
        start, i = int(piece.max()) + 1, i + piece.shape[1]
    pixels = {name: made[name] for name in made if name.startswith(("pixel", "image_grid", "video_grid"))}
    return Prompt(ids, torch.cat(columns, dim=1), start - len(ids), pixels)


def gap(a, b) -> float:
    """Over the tokens that both drew; asserts that they are the same."""
    both = list(zip(a.tokens, b.tokens))
    assert all(mine == other for mine, other in both)
    return float((a.logprobs[: len(both)] - b.logprobs[: len(both)]).abs().max())


def test_dense_is_transformers_own(model, mixed, sizes):
    tokens, logprobs = huggingface.greedy(model, mixed, 4)
    dense = answer(model, mixed, plans.all_dense(sizes), 4)
    assert dense.tokens == tokens and (dense.logprobs - logprobs).abs().max() < TOLERANCE
    chunked = answer(model, mixed, plans.all_dense(sizes), 4, stops=[700, 1500])
    assert gap(dense, chunked) < TOLERANCE
    later = answer(model, mixed, plans.all_dense(sizes), 4, cached=dense, prefix=1900)
    assert gap(dense, later) < TOLERANCE and [len(chunk) for chunk in later.chunks] == [LAYERS]


def test_every_pattern_is_sparse_here(sizes, sparse, model, mixed):
    every = plans.every_pattern(sizes)
    heads = [plan for layer in range(LAYERS) for _, plan in every.units(layer)]
    assert {type(plan) for plan in heads} == {NoBoundary, KBoundary, QBoundary, Boundary2D}
    (decided,) = sparse.chunks
    panels = [panel for selection, _ in decided for unit in selection.units for panel in unit.panels]
    assert {type(panel.pattern) for panel in panels} == KINDS
    grids = [panel for panel in panels if isinstance(panel.pattern, Grid)]
    assert {panel.chosen.axis for panel in grids} == {"frame", "row"} and all(
        any(getattr(panel.pattern, line) for panel in grids) for line in ("vertical", "horizontal", "slash", "tail")
    )
    for layer, (_, report) in enumerate(decided):
        for (heads, plan), density in zip(every.units(layer), report.densities):
            assert density == 1 if plan == NoBoundary(Dense()) else density < 0.9, (layer, heads)
    reports = [report for _, report in decided] + [report for _, report in decisions(model, mixed, plans.shared(sizes))]
    verdicts = [verdict for report in reports for verdict in report.verdicts]
    assert not any(verdict.reason for verdict in verdicts)
    assert min(verdict.recall for verdict in verdicts) > plans.THETA + 0.1


def test_a_selection_made_elsewhere_is_what_is_shown(model, mixed, sparse):
    made = Made([[selection for selection, _ in decided] for decided in sparse.chunks])
    assert torch.equal(answer(model, mixed, made, 4).logprobs, sparse.logprobs)


@pytest.mark.parametrize("unit, what", [(0, "class difference"), (6, "block")])
def test_what_is_dropped_shows(model, mixed, sizes, sparse, unit, what):
    less = answer(model, mixed, plans.every_pattern(sizes), 1, drop=Drop(0, unit))
    moved = float((less.logprobs[0] - sparse.logprobs[0]).abs().max())
    print(f"\nwithout a {what}: {moved:.2e}")
    assert moved > SHOWS


def test_the_heaviest_is_dropped():
    """Of columns 3, 300 and 700 the one that rows look at; its window and its own row still see it."""
    tokens = token_map(Text(900))
    lines = Lines(torch.tensor([3, 300, 700]), torch.tensor([], dtype=torch.int64))
    unit = Unit((0,), (Panel(None, None, VerticalSlash(3, 0, sink=1, window=2), lines),))
    weights_SS = torch.zeros(900, 900)
    weights_SS[:, 3], weights_SS[:, 300] = 0.2, 0.7
    seen_SS = _without_heaviest(unit, tokens, weights_SS, lambda unit: unit_mask(unit, tokens))
    lost = unit_mask(unit, tokens) & ~seen_SS
    assert lost.nonzero().tolist() == [[row, 300] for row in range(302, 900)]


def test_nothing_selected_cannot_be_dropped(model, mixed, sizes):
    with pytest.raises(ValueError, match="nothing was selected"):
        answer(model, mixed, plans.every_pattern(sizes), 1, drop=Drop(0, 2))


def test_chunks_hand_on_class_masses(model, mixed, sizes, sparse):
    """The second chunk has the pairs of both, and lists of blocks for its own rows."""
    chunked = answer(model, mixed, plans.every_pattern(sizes), 1, stops=[1000])
    first, second = chunked.chunks
    assert len(first) == len(second) == LAYERS
    assert any(one.digest() != other.digest() for (one, _), (other, _) in zip(sparse.chunks[0], first))
    handed_on = 0
    for (_, before), (selection, after) in zip(first, second):
        assert before.class_masses.keys() <= after.class_masses.keys()
        grown = [after.class_masses[key].pairs - mass.pairs for key, mass in before.class_masses.items()]
        assert all((pairs >= 0).all() for pairs in grown)
        handed_on += sum(int(mass.pairs.sum()) for mass in before.class_masses.values())
        listed = [panel.chosen for unit in selection.units for panel in unit.panels]
        assert all(int(each.row_blocks[0]) >= 1000 // 128 for each in listed if isinstance(each, BlockSet))
    assert handed_on


def test_auto_finds_the_planted_heads(tmp_path):
    """40 frames of 12 x 12 tokens, and some 400 tokens of text around them."""
    path = str(write_checkpoint(tmp_path, layers=3))
    prompt = rendered(path, ["An old story. " * 20, (80, 336, 336), "What # moves? " * 8])
    assert len(prompt.input_ids) == 6174
    *first, (selection, report) = decisions(huggingface.load(path), prompt, "auto")
    assert all(each.densities == (1.0,) * 8 for _, each in first)
    print(f"\n{report}\n{dict(zip(PATTERNS, report.densities))}")
    assert report.lowest_recall >= 0.9 and sum(report.densities) / 8 <= 0.4
    video = {
        PATTERNS[unit.heads[0]]: panel
        for unit in selection.units
        for panel in unit.panels
        if panel.rows == Modality.VIDEO
    }
    for name, axis in (("grid", "frame"), ("column", "row")):
        chosen = video[name].chosen
        assert isinstance(chosen, Phases) and (chosen.axis, chosen.shifts.tolist()) == (axis, [[0, 0]])
    for name in ("local", "sink"):
        assert isinstance(video[name].pattern, AShape)
    assert isinstance(video["text"].pattern, VerticalSlash)
    assert isinstance(video["unstructured"].pattern, Dense)


def test_auto_leaves_random_heads_dense(tmp_path):
    path = str(write_checkpoint(tmp_path, layers=3, planted=False))
    prompt = rendered(path, [(64, 280, 280), "What # moves? "])
    _, report = decisions(huggingface.load(path), prompt, "auto")[-1]
    print(f"\n{report}")
    assert report.fallbacks["dense: recall below 0.9"] == 8
