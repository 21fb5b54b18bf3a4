"""Random prompts: both doors against the script's oracle, what every map fulfils, and when classes are i mod stride."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.modality import Bundle, Medium, family_of, map_from_ids, map_from_offsets
from sglang_mm.types import Axis, Modality
from tests.modality.script import PLACEHOLDERS, WRAPS, Script, columns_of, equal
from tests.token_maps import token_maps

SIDE = 2
VIDEO = Medium(Modality.VIDEO)
KINDS = {  # family, how its frames look, whether frames of a video may stand apart
    "qwen3_vl": (replace(family_of("qwen3_vl"), merge=3), {}, True),
    "qwen2_5_vl": (replace(family_of("qwen2_5_vl"), merge=1), {}, False),
    "llava_video": (replace(family_of("llava_video"), frame_side=SIDE, side=SIDE), {"newline": True}, False),
    "longvila": (replace(family_of("longvila"), side=SIDE), {"end": "own"}, True),
    "nvila": (replace(family_of("nvila"), side=SIDE), {"end": "text"}, True),
    "internvl": (replace(family_of("internvl"), side=SIDE), {}, True),
    "plain": (family_of("plain"), {}, True),
}
ANY_SIZE = {"qwen3_vl": 3, "qwen2_5_vl": 1, "plain": 1}  # and the unit of their grids
TEXTS = st.one_of(st.integers(0, 5), st.sampled_from([60, 61, 62, 63, 64, 65, 66]))


@st.composite
def scripts(draw):
    """(script, name of the family, unit of its grids)."""
    name = draw(st.sampled_from(sorted(KINDS)))
    _, look, may_part = KINDS[name]
    script = Script()
    for _ in range(draw(st.integers(0, 3))):
        script.text(draw(TEXTS))
        script = script.start() if draw(st.booleans()) else script
        rows, cols = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) if name in ANY_SIZE else (SIDE, SIDE)
        is_image = draw(st.booleans()) and name != "llava_video"
        script.item(Modality.IMAGE if is_image else Modality.VIDEO, rows, cols)
        for number in range(1 if is_image else draw(st.integers(1, 4))):
            if number and may_part:
                script = script.end() if draw(st.booleans()) else script
                script.text(draw(TEXTS))
                script = script.start() if draw(st.booleans()) else script
            script.frame(**look)
        script = script.end() if draw(st.booleans()) else script
    return script.text(draw(st.integers(0 if script.tokens else 1, 3))), name, ANY_SIZE.get(name, 1)


@settings(deadline=None, max_examples=150)
@given(scripts())
def test_both_doors_give_what_the_script_says(prompt):
    script, name, scale = prompt
    family, media = KINDS[name][0], [script.medium(item, scale=scale) for item in range(len(script.media))]
    bundles = [Bundle(script.offsets(item), [medium]) for item, medium in enumerate(media)]
    token_map = map_from_offsets(family, script.ids(hashed=True), bundles, WRAPS)
    assert columns_of(token_map) == script.expected()
    assert equal(token_map, map_from_ids(family, script.ids(), media, PLACEHOLDERS, WRAPS))
    shared = dict.fromkeys(PLACEHOLDERS, PLACEHOLDERS[Modality.IMAGE])
    one_id = torch.where(script.ids() == PLACEHOLDERS[Modality.VIDEO], shared[Modality.IMAGE], script.ids())
    assert equal(token_map, map_from_ids(family, one_id, media, shared, WRAPS))


@settings(deadline=None, max_examples=60)
@given(token_maps())
def test_what_every_map_fulfils(token_map):
    item, frame, place, col, span = (getattr(token_map, n).long() for n in ("item", "frame", "place", "col", "span"))
    is_text = token_map.modality == Modality.TEXT
    assert 1 <= len(token_map) <= 400
    assert torch.equal(is_text, item < 0) and torch.equal(is_text, frame < 0)
    assert span[0] == 0 and set(span.diff().tolist()) <= {0, 1}
    for number in range(int(span[-1]) + 1):
        assert len(item[span == number].unique()) == len(token_map.modality[span == number].unique()) == 1
    assert torch.equal(item[~is_text].unique(), torch.arange(len(token_map.grids)))
    assert (item[~is_text].diff() >= 0).all(), "items are numbered as they come"
    for number, (rows, cols) in enumerate(token_map.grids):
        own = item == number
        assert (frame[own].diff() >= 0).all() and len(token_map.modality[own].unique()) == 1
        places = own & (place >= 0)
        assert torch.equal(
            place[places].view(-1, rows * cols), torch.arange(rows * cols).expand(frame[own].max() + 1, -1)
        )
        assert torch.equal(col[places], place[places] % cols)
    assert (col[place < 0] == -1).all()


@settings(deadline=None, max_examples=60)
@given(token_maps())
def test_classes_are_places_in_the_name_space_of_a_size(token_map):
    for axis in Axis:
        classes = token_map.classes(axis)
        of_token = classes.of_token.long()
        assert torch.equal(of_token >= 0, token_map.place >= 0)
        assert torch.equal(torch.bincount(of_token[of_token >= 0], minlength=len(classes)), classes.counts)
        assert (classes.counts > 0).all() and len(classes.spaces) == len(classes)
        shapes = sorted(set(token_map.grids))
        local = token_map.place if axis == Axis.FRAME else token_map.col
        for token in (of_token >= 0).nonzero().flatten()[::7].tolist():
            space = shapes.index(token_map.grids[token_map.item[token]])
            assert classes.spaces[of_token[token]] == space
            assert of_token[token] - classes.starts[space] == local[token]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 300), st.integers(1, 5), st.integers(0, 20))
def test_frames_of_longvila_are_i_mod_257(before, frames, after):
    """MMInference's stride for LongVILA: place p of every frame is where (i - first) mod 257 = p; 256 is the end."""
    bundles = [Bundle([(before, before + 257 * frames - 1)], [VIDEO])]
    ids = torch.zeros(before + 257 * frames + after, dtype=torch.int64)
    token_map = map_from_offsets(family_of("longvila"), ids, bundles)
    modulo = torch.arange(257 * frames) % 257
    own = slice(before, before + 257 * frames)
    assert torch.equal(token_map.classes(Axis.FRAME).of_token[own], torch.where(modulo < 256, modulo, -1).int())
    assert torch.equal(token_map.separators[own], modulo == 256)
    assert token_map.classes(Axis.FRAME).counts.tolist() == [frames] * 256


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 300), st.integers(1, 5), st.integers(0, 20))
def test_frames_of_llava_video_are_i_mod_182_and_rows_i_mod_14(before, frames, after):
    """Its frame and row strides: 13 newlines a frame are classes of neither, the rest are the paper's lines."""
    bundles = [Bundle([(before, before + 182 * frames - 1)], [VIDEO])]
    ids = torch.zeros(before + 182 * frames + after, dtype=torch.int64)
    token_map = map_from_offsets(family_of("llava_video"), ids, bundles)
    own, i = slice(before, before + 182 * frames), torch.arange(182 * frames)
    column = i % 14
    assert torch.equal(token_map.classes(Axis.ROW).of_token[own], torch.where(column < 13, column, -1).int())
    lines = token_map.classes(Axis.FRAME).of_token[own]
    assert torch.equal(lines >= 0, column < 13) and torch.equal(token_map.separators[own], column == 13)
    for modulo in range(182):
        assert len(lines[i % 182 == modulo].unique()) == 1
    assert len(lines.unique()) == 169 + 1


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 4), st.integers(1, 4)), TEXTS)
def test_r5_videos_share_classes_if_their_frames_are_of_one_size(first, second, text):
    script = Script().video(2, *first).text(text).video(3, *second)
    media = [script.medium(item) for item in range(2)]
    token_map = map_from_ids(family_of("plain"), script.ids(), media, PLACEHOLDERS)
    for axis in Axis:
        of_token = token_map.classes(axis).of_token
        a, b = (set(of_token[(token_map.item == n) & (of_token >= 0)].tolist()) for n in range(2))
        assert a == b if first == second else not a & b
