"""Families by their documented layouts, both doors; sizes, unknown grids, and what is refused.

Layouts of which transformers has no processor are written by the script: LLaVA-Video (arXiv:2410.02713; LLaVA-NeXT,
llava_arch.py, `mm_newline_position` "grid"), LongVILA (VILA, encoders/video/basic.py), NVILA (its processor puts "\\n"
in the place of a frame's last placeholder), VideoChat-Flash (arXiv:2501.00574: 16 tokens a frame), SGLang's LLaVA
(models/llava.py, pad_input_ids: 196 tokens a frame, no newline).
"""

from dataclasses import replace

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.modality import FAMILIES, Bundle, Medium, Wraps, family_of, map_from_ids, map_from_offsets
from sglang_mm.types import Axis, Modality
from tests.modality.script import PLACEHOLDERS, TEXT, WRAPS, Script, columns_of, equal

V, I = Modality.VIDEO, Modality.IMAGE  # noqa: E741


def check(family, script: Script, *, scale: int = 1, wraps: Wraps = WRAPS, grids=(True, False)):
    """Every way in gives what the script expects: by offsets or ids, with or without grids, one bundle or many."""
    if isinstance(family, str):
        family = family_of(family)
    expected, hashed = script.expected(), script.ids(hashed=True)
    for with_grids in grids:
        media = [script.medium(item, scale=scale) for item in range(len(script.media))]
        media = media if with_grids else [replace(medium, grid=None) for medium in media]
        apart = [Bundle(script.offsets(item), [medium]) for item, medium in enumerate(media)]
        token_map = map_from_offsets(family, hashed, apart, wraps)
        assert columns_of(token_map) == expected
        if with_grids or len(media) == 1:
            assert equal(token_map, map_from_ids(family, script.ids(), media, PLACEHOLDERS, wraps))
    return token_map


def test_qwen3_vl_videos_and_images():
    script = Script().text(1).start()
    for rows, cols in ((2, 3), (3, 2)):
        script.item(V, rows, cols)
        for number in range(3):
            script.text(5 + number).start().frame().end()
    script.end().start().image(2, 2).end().text(1)
    check("qwen3_vl", script, scale=2, grids=(True,))
    check(replace(family_of("qwen3_vl"), merge=4), script, scale=4, grids=(True,))


def test_llava_onevision_as_sglang_lays_it_out():
    """Each frame an item without a newline, text between some: one video, if they come as one bundle."""
    script = Script().text(3).item(V, 14, 14).frame().frame().text(2).frame().text(9)
    assert len(script.tokens) == 3 + 2 * 196 + 2 + 196 + 9
    check("llava_onevision", script)
    check("LlavaQwenForCausalLM", Script().image(27, 27).text(1).image(27, 27))


def test_llava_video():
    """13 rows of 13 and a newline: 182 tokens a frame."""
    script = Script().text(4).video(3, 13, 13, newline=True).text(5)
    assert len(script.tokens) == 4 + 3 * 182 + 5
    check("llava_video", script)
    check(replace(family_of("llava_video"), frame_side=14), Script().video(2, 14, 14, newline=True))
    check("llava_video", Script().video(2, 13, 13, newline=True).image(27, 27).closing())


def test_longvila():
    """256 places and an end: 257 tokens a frame, an image too."""
    script = Script().text(4).video(3, 16, 16, end="own").text(5).image(16, 16, end="own").image(16, 16, end="own")
    assert len(script.tokens) == 4 + 3 * 257 + 5 + 2 * 257
    check("longvila", script)


@pytest.mark.parametrize(("family", "side"), [("nvila", 16), ("nvila_lite", 11)])
def test_nvila(family, side):
    """The ends are text to the processor, yet the frames touch: nothing is joined by R1."""
    script = Script().text(4).video(3, side, side, end="text").text(5).image(side, side, end="text").text(2)
    token_map = check(family, script)
    assert token_map.modality[4 : 4 + 3 * (side**2 + 1)].unique().tolist() == [V]
    check(family, Script().text(1).image(2 * side, 3 * side, end="text"), grids=(True,))


def test_videochat_flash():
    """16 tokens a frame, 64 an image, in one row."""
    script = Script().text(4).video(8, 1, 16).text(5).image(1, 64).text(2)
    token_map = check("VideoChatFlashQwenForCausalLM", script)
    assert torch.equal(token_map.classes(Axis.ROW).of_token, token_map.classes(Axis.FRAME).of_token)
    with pytest.raises(ConfigError, match="16 tokens a frame"):
        family_of("videochat_flash").parts(Medium(V, (2, 1, 15)), None)


def test_internvl_videos_in_one_bundle_need_their_frames():
    script = Script()
    for frames in (2, 3):
        script.item(V, 16, 16)
        for _ in range(frames):
            script.text(7).start().frame().end()
    check("internvl_chat", script)
    together = [Bundle(script.offsets(0, 1), [Medium(V)])]
    token_map = map_from_offsets(family_of("internvl"), script.ids(), together, WRAPS)
    assert int(token_map.frame.max()) == 4, "without them, all are frames of one video"


def test_plain_with_a_grid():
    check("plain", Script().text(1).video(3, 2, 5).text(2).image(3, 3), grids=(True,))


def test_plain_without_a_grid_takes_stretches_for_frames():
    """Three stretches of 6 tokens are three frames of 1 x 6; in one stretch they are a frame of 1 x 18."""
    script = Script().item(V, 1, 6).frame().text(3).frame().text(70).frame()
    assert check("plain", script).grids == ((1, 6),)
    assert check("plain", Script().text(1).video(1, 1, 18), grids=(False,)).grids == ((1, 18),)
    with pytest.raises(ConfigError, match=r"plain\. Allowed: a grid, or frames of the same length"):
        map_from_offsets(family_of("plain"), script.ids(), [Bundle([(0, 5), (9, 13)], [Medium(V)])])


def test_families_have_their_names_and_models():
    assert set(FAMILIES) == {
        "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_video", "longvila", "nvila", "nvila_lite", "internvl",
        "videochat_flash", "plain",
    }  # fmt: skip
    for name, family in FAMILIES.items():
        assert family.name == name and family_of(name) is family
        assert all(family_of(model) is family for model in family.models)
    models = [model for family in FAMILIES.values() for model in family.models]
    assert len(models) == len(set(models))


def test_transformers_has_the_same_architecture_for_a_model_type():
    """Families of models that are in no released transformers are left out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as known

    own = {"longvila", "nvila", "nvila_lite", "videochat_flash", "llava_video", "plain"}
    for name, family in FAMILIES.items():
        types = set(family.models) & set(known)
        assert name in own or types, name
        assert {known[model] for model in types} <= set(family.models)


def test_an_unknown_model_is_refused_with_those_known():
    with pytest.raises(
        ConfigError, match=r"model 'GptForCausalLM'.*qwen2_5_vl.*Qwen3VLForConditionalGeneration.*plain"
    ):
        family_of("GptForCausalLM")


IDS = torch.full((100,), TEXT)


@pytest.mark.parametrize(
    ("family", "bundles", "given"),
    [
        ("qwen2_5_vl", [Bundle([(0, 3)], [Medium(I)])], "an image of grid unknown in 4 tokens for qwen2_5_vl"),
        ("qwen2_5_vl", [Bundle([(0, 3)], [Medium(I, (1, 4, 5))])], "1x4x5 for qwen2_5_vl.*multiples of 2"),
        ("qwen2_5_vl", [Bundle([(0, 3)], [Medium(I, (1, 0, 4))])], "1x0x4"),
        ("qwen2_5_vl", [Bundle([(0, 4)], [Medium(I, (1, 4, 4))])], "5 tokens for an image of grid 1x4x4, which has 4"),
        ("qwen2_5_vl", [Bundle([(0, 9)], [Medium(I, (1, 4, 4))] * 2)], "10 tokens in 1 .* for 2 media, that have 8"),
        ("qwen2_5_vl", [Bundle([(0, 5), (8, 9)], [Medium(V, (2, 4, 4))])], r"stretches of \[2, 6\].*frames of 4"),
        ("qwen2_5_vl", [Bundle([(0, 3)], [])], "0 media at 1 offsets"),
        ("qwen2_5_vl", [Bundle([], [Medium(I, (1, 4, 4))])], "1 media at 0 offsets"),
        ("qwen2_5_vl", [Bundle([(3, 0)], [Medium(I, (1, 4, 4))])], r"\(3, 0\)"),
        ("qwen2_5_vl", [Bundle([(4, 7), (0, 3)], [Medium(V, (2, 4, 4))])], r"\[\(4, 7\), \(0, 3\)\] first"),
        ("qwen2_5_vl", [Bundle([(0, 3), (3, 6)], [Medium(V, (2, 4, 4))])], r"ascending"),
        ("qwen2_5_vl", [Bundle([(98, 101)], [Medium(I, (1, 4, 4))])], "image 0 up to 102.*a prompt of 100"),
        ("qwen2_5_vl", [Bundle([(0, 3)], [Medium(I, (1, 4, 4))]), Bundle([(2, 5)], [Medium(V, (1, 4, 4))])],
         "video 1 at 2, where the one before reaches to 4"),
        ("plain", [Bundle([(0, 3), (8, 9), (12, 15)], [Medium(I)] * 2)], "10 tokens in 3 .* 2 media, some of unknown"),
        ("llava_onevision", [Bundle([(0, 40)], [Medium(V)])], "41 tokens for llava_onevision.*196 tokens a frame"),
        ("llava_onevision", [Bundle([(0, 40)], [Medium(V, (1, 5, 8))])], "frames of 14 x 14"),
        ("llava_onevision", [Bundle([(0, 195), (200, 200)], [Medium(V)])], r"stretches of \[1, 196\].*frames of 196"),
        ("llava_onevision", [Bundle([(0, 1457)], [Medium(I)])], r"or \(2, rows, columns\) for a lone image"),
        ("llava_video", [Bundle([(0, 40)], [Medium(V)])], "182 tokens a frame"),
        ("longvila", [Bundle([(0, 40)], [Medium(V)])], "257 tokens a frame"),
        ("nvila", [Bundle([(0, 40)], [Medium(V)])], "256 tokens a frame"),
        ("internvl", [Bundle([(0, 40)], [Medium(I)])], "256 tokens a frame"),
        ("videochat_flash", [Bundle([(0, 40)], [Medium(V)])], "16 tokens a frame"),
    ],
)  # fmt: skip
def test_refused(family, bundles, given):
    with pytest.raises(ConfigError, match=given):
        map_from_offsets(family_of(family), IDS, bundles)


def test_placeholders_without_media_and_media_without_placeholders():
    ids, image = Script().image(2, 2).ids(), Medium(I, (1, 4, 4))
    family = family_of("qwen2_5_vl")
    with pytest.raises(ConfigError, match="0 media at 1 offsets"):
        map_from_ids(family, ids, [], PLACEHOLDERS)
    with pytest.raises(ConfigError, match="1 media at 0 offsets"):
        map_from_ids(family, IDS, [image], PLACEHOLDERS)
    with pytest.raises(ConfigError, match="an image of grid 1x4x4 without a placeholder id"):
        map_from_ids(family, ids, [image], {V: PLACEHOLDERS[V]})


def test_text_alone():
    token_map = map_from_ids(family_of("qwen3_vl"), IDS, [], PLACEHOLDERS, WRAPS)
    assert columns_of(token_map) == Script().text(100).expected() and token_map.grids == ()
    assert equal(token_map, map_from_offsets(family_of("qwen3_vl"), IDS, [], WRAPS))


def test_what_is_no_prompt():
    plain, image = family_of("plain"), [Bundle([(-1, 2)], [Medium(I, (1, 2, 2))])]
    with pytest.raises(ConfigError, match=r"ids of shape \(1, 4\)"):
        map_from_offsets(plain, torch.zeros(1, 4, dtype=torch.int64), [])
    with pytest.raises(ConfigError, match=r"ids of shape \(0,\)"):
        map_from_ids(plain, torch.zeros(0, dtype=torch.int64), [], {})
    with pytest.raises(ConfigError, match="ascending from 0 on"):
        map_from_offsets(plain, torch.zeros(9, dtype=torch.int64), image)
    with pytest.raises(ConfigError, match="a medium of text"):
        Medium(Modality.TEXT)
