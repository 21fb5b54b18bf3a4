"""Plan files: what is written is read, and every misfit is refused by the path of its field."""

import copy
import re
from pathlib import Path

import msgspec
import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import NoBoundary
from sglang_mm.patterns.catalog import Dense, Grid
from sglang_mm.patterns.plan import Geometry, Model, Search, Timing, one_of_each, uniform
from sglang_mm.patterns.plan_file import load, read_model, save
from sglang_mm.tiny import write_checkpoint

TINY = Model("Qwen2_5_VLForConditionalGeneration", layers=2, heads=8, kv_heads=2, head_dim=32, name="tiny")
RAW = msgspec.json.decode(msgspec.json.encode(one_of_each(TINY)))
HEADS = "layers.1.groups.0.heads"
KINDS = "dense | a_shape | tri_shape | vertical_slash | grid | blocks"
MISSING = object()


def changed(path: str, value) -> dict:
    """The raw plan with one place changed; numbers in the path are indices."""
    raw = copy.deepcopy(RAW)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at = raw
    for part in parents:
        at = at[part]
    if value is MISSING:
        del at[last]
    else:
        at[last] = value
    return raw


def refusal(file: Path, text: bytes) -> ConfigError:
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert caught.value.given.startswith(f"{file}: ")
    return caught.value


@pytest.mark.parametrize("share", [True, False, None])
def test_what_is_saved_is_loaded(tmp_path, share):
    plan = one_of_each(TINY) if share is None else uniform(TINY, NoBoundary(Grid(axis="row", slash=2)), share=share)
    search = Search("a device", (Timing(Dense(), 65536, 0.25),), ((0.125,) * 8,) * 2)
    plan = msgspec.structs.replace(plan, theta=0.75, search=search, geometry=Geometry("qwen2_5_vl", ("text:20",)))
    file = save(plan, tmp_path / "plan.json")
    assert load(file) == plan and load(str(file)).digest() == plan.digest()


def test_a_file_written_by_hand_may_leave_defaults_out(tmp_path):
    layer = '{"groups": [{"group": {"boundary": "none", "pattern": {"kind": "grid"}}}]}'
    model = '{"architecture": "A", "layers": 1, "heads": 4, "kv_heads": 1, "head_dim": 8}'
    (tmp_path / "plan.json").write_text(f'{{"schema": 1, "model": {model}, "layers": [{layer}]}}')
    assert load(tmp_path / "plan.json") == uniform(Model("A", 1, 4, 1, 8), NoBoundary(Grid()))


@pytest.mark.parametrize(
    ("path", "value", "field", "allowed"),
    [
        (f"{HEADS}.0.pattern.window", -5, ".pattern.window: -5 in Grid", "a whole number from 1 to 2147483647"),
        (f"{HEADS}.0.pattern.window", 10**30, f".pattern.window: {10**30} in Grid", "a whole number from 1 to"),
        (f"{HEADS}.0.pattern.window", "5", ".pattern.window: Expected `int`, got `str`", "what schema 1 has there"),
        (f"{HEADS}.0.pattern.windw", 5, ".pattern: Object contains unknown field `windw`", "kind, axis, vertical, "),
        (f"{HEADS}.0.pattern.kind", "gird", ".pattern.kind: Invalid value 'gird'", KINDS),
        (f"{HEADS}.0.pattern.kind", MISSING, ".pattern: Object missing required field `kind`", KINDS),
        (f"{HEADS}.0.pattern.vertical", False, ".pattern.vertical, horizontal, slash: none in Grid", "one of them"),
        (f"{HEADS}.0.pattern", MISSING, ": Object missing required field `pattern`", "boundary, pattern"),
        (f"{HEADS}.0.boundary", "3d", ".boundary: Invalid value '3d'", "none | k | q | 2d"),
        (f"{HEADS}.0", 7, ": Expected `object`, got `int`", "what schema 1 has there"),
    ],
)
def test_a_misfit_inside_a_head_is_named(tmp_path, path, value, field, allowed):
    error = refusal(tmp_path / "plan.json", msgspec.json.encode(changed(path, value)))
    assert error.given == f"{tmp_path / 'plan.json'}: layers[1].groups[0].heads[0]{field}"
    assert error.allowed.startswith(allowed) and error.remedy


@pytest.mark.parametrize(
    ("pair", "value", "field"),
    [
        ("video-text", {"kind": "grid"}, "video-text: Grid("),
        ("video-txt", {"kind": "dense"}, "video-txt"),
        ("video-text", {"kind": "x"}, "video-text.kind: Invalid value 'x'"),
        ("video-video", {"kind": "a_shape", "window": 0}, "video-video.window: 0 in AShape"),
        ("video-video", {"kind": "a_shape", "sink": 0.5}, "video-video.sink: Expected `int`, got `float`"),
        ("a [b", 3, "a [b: Expected `object`, got `int`"),
    ],
)
def test_a_misfit_inside_a_pair_is_named(tmp_path, pair, value, field):
    error = refusal(tmp_path / "plan.json", msgspec.json.encode(changed(f"{HEADS}.3.pairs.{pair}", value)))
    assert error.given.startswith(f"{tmp_path / 'plan.json'}: layers[1].groups[0].heads[3].pairs.{field}")


@pytest.mark.parametrize(
    ("path", "value", "given"),
    [
        ("layers.0", MISSING, "layers: 1 of them"),
        ("layers.1.groups.1", MISSING, "layers[1].groups: 1 of them"),
        (f"{HEADS}.0", MISSING, "layers[1].groups[0].heads: 3 of them"),
        ("layers.1.groups.0", {}, "layers[1].groups[0].group: missing, and heads too"),
        ("layers", {}, "layers: Expected `array`, got `object`"),
        ("model", MISSING, "Object missing required field `model`"),
        ("model.heads", 7, "model.kv_heads: 2"),
        ("model.layers", 0, "model.layers: 0"),
        ("theta", 1.5, "theta: 1.5"),
        ("schema", 2, "schema: 2"),
        ("schema", MISSING, "schema: None"),
        ("notes", "mine", "Object contains unknown field `notes`"),
        ("search", {"errors": [[0.5] * 8]}, "search.errors: 1 of them"),
        ("search", {"timings": [{"pattern": {"kind": "dense"}, "tokens": "x", "seconds": 1}]}, "search.timings[0].tok"),
    ],
)
def test_a_misfit_outside_heads_is_named(tmp_path, path, value, given):
    error = refusal(tmp_path / "plan.json", msgspec.json.encode(changed(path, value)))
    assert error.given.startswith(f"{tmp_path / 'plan.json'}: {given}")


@pytest.mark.parametrize(
    "text",
    [b"", b'{"schema": 1, "model": {', b"[1]", b"null", b"\xff\xfe", b'{"schema": 1, "model": "\xff"}', b"[" * 100_000],
    ids=["empty", "truncated", "list", "null", "not UTF-8", "not UTF-8 inside", "deep"],
)
def test_what_is_no_json_object_is_refused(tmp_path, text):
    assert re.fullmatch("(one whole|a) JSON object", refusal(tmp_path / "plan.json", text).allowed)


def test_files_that_cannot_be_opened_are_named(tmp_path):
    for path, reason in [(tmp_path / "absent.json", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(ConfigError, match=re.escape(f"{path}: {reason}")):
            load(path)
    with pytest.raises(ConfigError, match=r"absent/plan\.json: No such file"):
        save(one_of_each(TINY), tmp_path / "absent" / "plan.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_numbers_of_a_real_checkpoint(checkpoint):
    assert read_model(checkpoint) == msgspec.structs.replace(TINY, name=str(checkpoint))
    one_of_each(TINY).require(read_model(checkpoint))


@pytest.mark.parametrize("text", [None, b"{", b"[]", b"\xff", b"{}"])
def test_what_is_no_checkpoint_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match="config"):
        read_model(tmp_path)
