"""Descriptions of prompts: what they mean, against maps that are put together by hand, and what is refused."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.plan.geometry import LARGEST, parse_geometry
from sglang_mm.types import Modality, Place
from tests.patterns.maps import Media, Text, token_map

COLUMNS = ("modality", "item", "frame", "place", "col", "span")


@pytest.mark.parametrize(
    ("description", "parts"),
    [
        ("text:7", [Text(7)]),
        ("text:2,video:3x2x4,text:5", [Text(2), Media(3, 2, 4), Text(5)]),
        ("video:2x1x3+newline, text:1, image:2x2", [Media(2, 1, 3, newline=True), Text(1), Media(1, 2, 2)]),
        ("image:1x3+newline,image:3x1", [Media(1, 1, 3, newline=True), Media(1, 3, 1)]),
        ("text:3,text:4", [Text(7)]),
    ],
)
def test_descriptions(description, parts):
    found, expected = parse_geometry(description), token_map(*parts)
    for name in COLUMNS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.grids == expected.grids


def test_timestamps_by_hand():
    """t t  t t t t t s p p e  t t t t t s p p e  t: the first timestamp is text, as no frame comes before it."""
    tokens = parse_geometry("text:2,video:2x1x2+timestamps,text:1")
    text, start, end, stamp = Place.TEXT, Place.VISION_START, Place.VISION_END, Place.TIMESTAMP
    assert tokens.place.tolist() == [text] * 7 + [start, 0, 1, end] + [stamp] * 5 + [start, 0, 1, end, text]
    assert tokens.modality.tolist() == [Modality.TEXT] * 8 + [Modality.VIDEO] * 11 + [Modality.TEXT] * 2
    assert tokens.frame.tolist() == [-1] * 8 + [0] * 3 + [1] * 8 + [-1] * 2


def test_a_million_tokens():
    tokens = parse_geometry("video:5761x13x14,text:74")
    assert len(tokens) == 2**20 and len(tokens.grids) == 1


@pytest.mark.parametrize(
    ("description", "given"),
    [
        ("", "''"),
        ("text:20,", "''"),
        ("text", "'text'"),
        ("text:0", "'text:0'"),
        ("text:2x3", "'text:2x3'"),
        ("text:-3", "'text:-3'"),
        ("text:5+newline", "'text:5+newline'"),
        ("image:4", "'image:4'"),
        ("image:4x6+timestamps", "'image:4x6+timestamps'"),
        ("text:1,video:4x6", "'video:4x6'"),
        ("video:0x4x6", "'video:0x4x6'"),
        ("video:2x4x6+newlines", "'video:2x4x6+newlines'"),
        ("audio:20", "'audio:20'"),
    ],
)
def test_what_is_not_a_prompt(description, given):
    with pytest.raises(ConfigError, match=r"in a prompt\. Allowed: ") as raised:
        parse_geometry(description)
    assert raised.value.given == f"{given} in a prompt"


@pytest.mark.parametrize("description", [f"text:{LARGEST + 1}", "text:9,video:999999999x999999999x999999999"])
def test_a_prompt_too_long_is_refused_before_it_is_made(description):
    with pytest.raises(ConfigError, match=f"tokens or more. Allowed: up to {LARGEST}"):
        parse_geometry(description)
