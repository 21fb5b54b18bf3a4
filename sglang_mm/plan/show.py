"""A plan as text: one letter per head, and each head of a layer in full."""

from collections import Counter

from sglang_mm.patterns.boundary import PAIRS, Boundary2D, HeadPlan, QBoundary
from sglang_mm.patterns.catalog import Pattern
from sglang_mm.patterns.plan import Plan

LETTERS = {"dense": "D", "a_shape": "A", "tri_shape": "T", "vertical_slash": "V", "grid": "G", "blocks": "B"}
"""One pattern for all rows and keys."""
BY_BOUNDARY = {
    QBoundary: ("q", "one pattern per modality of the rows"),
    Boundary2D: ("2", "one per pair of modalities"),
}
SHARED = ("=", "shares the selection of the head before it")


def table(plan: Plan) -> str:
    """A line per layer, a column per head, groups apart; below, what the letters mean and how many heads have each."""
    width = max(2 * plan.model.group - 1, len(f"{plan.model.kv_heads}"))
    name = "group {}" if width >= len(f"group {plan.model.kv_heads}") else "{}"
    headings = [name.format(k).ljust(width) for k in range(plan.model.kv_heads)]
    lines, counts = [title(plan), "", "  ".join(["layer", *headings]).rstrip()], Counter()
    for layer in range(plan.model.layers):
        cells = []
        for heads, head_plan in plan.units(layer):
            counts[_meaning(head_plan)] += len(heads)
            cells += [_meaning(head_plan)[0], *SHARED[0] * (len(heads) - 1)]
        groups = [cells[at : at + plan.model.group] for at in range(0, len(cells), plan.model.group)]
        lines.append("  ".join([f"{layer:5}", *(" ".join(group).ljust(width) for group in groups)]).rstrip())
    total = plan.model.layers * plan.model.heads
    lines += ["", "      heads"]
    lines += [f"{letter} {count:9} {count / total:4.0%}  {name}" for (letter, name), count in counts.most_common()]
    return "\n".join([*lines, f"{SHARED[0]}                 {SHARED[1]}"] if _shares(plan) else lines)


def details(plan: Plan, layer: int) -> str:
    """Every unit of one layer with all its numbers."""
    lines = [title(plan), "", f"layer {layer}"]
    for heads, head_plan in plan.units(layer):
        name = f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]}-{heads[-1]}"
        first, *more = _parts(head_plan)
        lines += [f"  {name:12} {head_plan.__struct_config__.tag:5} {first}", *(f"{'':21}{part}" for part in more)]
    return "\n".join(lines)


def title(plan: Plan) -> str:
    model = plan.model
    return (
        f"{model.name or model.architecture}: {model.layers} layers x {model.heads} heads, "
        f"{model.kv_heads} K/V heads, theta {plan.theta}, digest {plan.digest()}"
    )


def _meaning(head_plan: HeadPlan) -> tuple[str, str]:
    """(letter, name)."""
    if type(head_plan) in BY_BOUNDARY:
        return BY_BOUNDARY[type(head_plan)]
    kind = head_plan.pattern.__struct_config__.tag
    return LETTERS[kind], kind


def _parts(head_plan: HeadPlan) -> list[str]:
    match head_plan:
        case QBoundary():
            return [f"{name}: {_numbers(getattr(head_plan, name))}" for name in head_plan.__struct_fields__]
        case Boundary2D():
            named = [f"{pair}: {_numbers(pattern)}" for pair, pattern in head_plan.pairs.items()]
            return named if len(named) == len(PAIRS) else [*named, "other pairs: dense"]
        case _:
            return [_numbers(head_plan.pattern)]


def _numbers(pattern: Pattern) -> str:
    fields = [f"{name} {getattr(pattern, name)}" for name in pattern.__struct_fields__]
    return " ".join([pattern.__struct_config__.tag, *([f"({', '.join(fields)})"] if fields else [])])


def _shares(plan: Plan) -> bool:
    return any(len(heads) > 1 for layer in range(plan.model.layers) for heads, _ in plan.units(layer))
