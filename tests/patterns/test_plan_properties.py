"""Whatever stands in a plan file, it is a plan or a ConfigError that names the file."""

import copy

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.plan import GroupPlan, LayerPlan, Model, Plan, one_of_each
from sglang_mm.patterns.plan_file import load, save
from tests.patterns.strategies import head_plans

TINY = Model("A", layers=2, heads=4, kv_heads=2, head_dim=32)
RAW = msgspec.json.decode(msgspec.json.encode(one_of_each(TINY)))
WORDS = st.sampled_from(["dense", "grid", "none", "2d", "q", "kind", "boundary", "pattern", "pairs", "text-text", "x"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
groups = st.builds(GroupPlan, group=head_plans) | st.tuples(head_plans, head_plans).map(
    lambda two: GroupPlan(heads=two)
)
layers = st.tuples(groups, groups).map(LayerPlan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@st.composite
def damaged(draw) -> bytes:
    """A plan file with one value exchanged, removed or added, or cut off."""
    raw = at = copy.deepcopy(RAW)
    for _ in range(draw(st.integers(0, 8))):
        inner = list(at.values()) if isinstance(at, dict) else at
        inner = [value for value in inner if isinstance(value, dict | list) and value]
        if not inner:
            break
        at = draw(st.sampled_from(inner))
    key = draw(st.sampled_from(list(at)) | WORDS) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
    at[key] = draw(junk)
    if draw(st.booleans()):
        del at[key]
    text = msgspec.json.encode(raw)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@settings(deadline=None, max_examples=300)
@given(text=damaged())
def test_a_damaged_file_is_a_plan_or_a_named_error(folder, text):
    file = folder / "damaged.json"
    file.write_bytes(text)
    try:
        plan = load(file)
    except ConfigError as error:
        assert error.given.startswith(f"{file}: ") and error.allowed and error.remedy
    else:
        assert [len(plan.units(layer)) >= 2 for layer in range(2)] == [True, True]


@settings(deadline=None, max_examples=50)
@given(two=st.tuples(layers, layers), theta=st.floats(0.01, 1))
def test_any_plan_survives_its_file(folder, two, theta):
    plan = Plan(TINY, two, theta=theta)
    assert load(save(plan, folder / "plan.json")) == plan
