"""Plans: units, uniform ones, one of each kind, what they are compared by."""

import msgspec
import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, KBoundary, NoBoundary, QBoundary, panels
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.plan import (
    Geometry,
    GroupPlan,
    LayerPlan,
    Model,
    Plan,
    Search,
    Timing,
    one_of_each,
    uniform,
)
from sglang_mm.types import Modality

TINY = Model("Qwen2_5_VLForConditionalGeneration", layers=2, heads=8, kv_heads=2, head_dim=32)
GRID = NoBoundary(Grid())
replace = msgspec.structs.replace


def test_units_have_global_head_ids():
    near = NoBoundary(AShape())
    mixed = LayerPlan((GroupPlan(group=GRID), GroupPlan(heads=(near, GRID, near, near))))
    plan = Plan(TINY, (mixed, LayerPlan((GroupPlan(group=near),) * 2)))
    assert plan.units(0) == [((0, 1, 2, 3), GRID), ((4,), near), ((5,), GRID), ((6,), near), ((7,), near)]
    assert plan.units(1) == [((0, 1, 2, 3), near), ((4, 5, 6, 7), near)]


@pytest.mark.parametrize(("share", "units"), [(True, 2), (False, 8)])
def test_uniform_plans(share, units):
    plan = uniform(TINY, GRID, share=share)
    for layer in range(2):
        found = plan.units(layer)
        assert [head for heads, _ in found for head in heads] == list(range(8))
        assert len(found) == units and {head_plan for _, head_plan in found} == {GRID}


def test_one_of_each_has_every_pattern_and_boundary():
    plan = one_of_each(TINY)
    heads = [head_plan for _, head_plan in plan.units(1)]
    assert len(heads) == 8
    assert {type(head) for head in heads} == {NoBoundary, KBoundary, QBoundary, Boundary2D}
    kinds = {type(pattern) for head in heads for _, _, pattern in panels(head, Modality)}
    assert kinds == {Dense, AShape, TriShape, VerticalSlash, Grid, Blocks}
    assert [head.pattern.axis for head in heads[:2]] == ["frame", "row"]


def test_one_of_each_fits_any_model():
    plan = one_of_each(Model("A", layers=3, heads=14, kv_heads=2, head_dim=64))
    assert [heads for heads, _ in plan.units(2)] == [(head,) for head in range(14)]
    assert plan.units(2)[13][1] == plan.units(2)[5][1]


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: Plan(TINY, uniform(TINY, GRID).layers[:1]), "layers: 1 of them"),
        (lambda: Plan(TINY, (LayerPlan(()),) * 2), "layers[0].groups: 0 of them"),
        (
            lambda: Plan(TINY, (LayerPlan((GroupPlan(group=GRID), GroupPlan(heads=(GRID,)))),) * 2),
            "layers[0].groups[1].heads: 1 of them",
        ),
        (lambda: replace(uniform(TINY, GRID), theta=0.0), "theta: 0.0"),
        (lambda: replace(uniform(TINY, GRID), theta=float("nan")), "theta: nan"),
        (lambda: replace(uniform(TINY, GRID), schema=2), "schema: 2"),
        (lambda: replace(uniform(TINY, GRID), search=Search(errors=((0.1,) * 8,))), "search.errors: 1 of them"),
        (
            lambda: replace(uniform(TINY, GRID), search=Search(errors=((0.1,) * 8, (0.1,) * 4))),
            "search.errors[1]: 4 of them",
        ),
        (lambda: GroupPlan(), "group: missing, and heads too"),
        (lambda: GroupPlan(GRID, (GRID,)), "group: given, and heads too"),
        (lambda: replace(TINY, heads=7), "kv_heads: 2"),
        (lambda: replace(TINY, head_dim=0), "head_dim: 0"),
    ],
)
def test_what_does_not_fit_is_named(make, given):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.given == given


@pytest.mark.parametrize(
    ("field", "other"),
    [("architecture", "B"), ("layers", 3), ("heads", 16), ("kv_heads", 4), ("head_dim", 64), ("weights", "2")],
)
def test_another_model_is_refused(field, other):
    mine = replace(TINY, weights="1")
    plan = uniform(mine, GRID)
    plan.require(mine)
    with pytest.raises(ConfigError) as caught:
        plan.require(replace(mine, **{field: other}))
    assert caught.value.given == f"model.{field}: {getattr(mine, field)} in the plan, {other} in the model"


def test_names_and_unknown_weights_do_not_matter():
    plan = uniform(replace(TINY, name="here", weights="1"), GRID)
    plan.require(replace(TINY, name="there"))


QWEN2 = {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 27, "hidden_size": 3584}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["A"], **QWEN2}, Model("A", 27, 28, 4, 128)),
        ({"architectures": ["A"], "text_config": QWEN2, "num_hidden_layers": 2}, Model("A", 27, 28, 4, 128)),
        ({"llm_config": {**QWEN2, "head_dim": 64, "num_key_value_heads": None}}, Model("", 27, 28, 28, 64)),
    ],
)
def test_numbers_from_a_config(config, expected):
    assert Model.of_config(config) == expected


@pytest.mark.parametrize("broken", [{}, {**QWEN2, "num_attention_heads": 0}, {**QWEN2, "hidden_size": "x"}])
def test_a_config_without_numbers_is_refused(broken):
    with pytest.raises(ConfigError, match="numbers cannot be read"):
        Model.of_config(broken)


def test_digest_differs_where_results_may():
    plan = uniform(TINY, GRID)
    timings = (Timing(Grid(), 1024, 0.5),)
    same = [
        replace(plan, geometry=Geometry("qwen2_5_vl", ("text:20",))),
        replace(plan, search=Search("a device", timings)),
        replace(plan, model=replace(TINY, name="elsewhere")),
    ]
    assert {other.digest() for other in same} == {plan.digest()} and len(plan.digest()) == 16
    different = [
        replace(plan, theta=0.8),
        replace(plan, model=replace(TINY, head_dim=64)),
        uniform(TINY, GRID, share=False),
        uniform(TINY, NoBoundary(Grid(window=7))),
        uniform(TINY, KBoundary(Grid())),
        plan,
    ]
    assert len({other.digest() for other in different}) == len(different)
