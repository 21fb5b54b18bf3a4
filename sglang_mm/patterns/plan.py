"""The plan: for one model, what every head attends to. Made offline, read by every rank; plan_file.py reads and writes.

    {"schema": 1, "theta": 0.9, "model": {"layers": 28, "heads": 28, "kv_heads": 4, "head_dim": 128, ...},
     "layers": [{"groups": [{"group": HEAD},                           4 of these: one per K/V head, g = 7
                            {"heads": [HEAD, HEAD, ... 7 of these]},
                            ...]}, ...]}
    HEAD: {"boundary": "none", "pattern": {"kind": "grid", "axis": "frame", "phases": 1, ...}}

A group plan with `group` gives all heads that share a K/V head one selection; with `heads`, each has its own.
Head ids are global: group k has the query heads [k * g, (k + 1) * g). MMInference keeps a plan per query head alone.
"""

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, HeadPlan, KBoundary, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash

SCHEMA = 1


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Errors name the field by its path: `layers[3].groups[1]: ...`."""


class Model(_Record, frozen=True):
    """What a plan was made for. name is for people; weights, if both sides know it, is any fingerprint of the weights.

    Raises ConfigError unless all counts are 1 or more, and heads a multiple of kv_heads.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    name: str = ""
    weights: str = ""

    def __post_init__(self):
        for field in ("layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: {getattr(self, field)}", "1 or more", "take it from the checkpoint")
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads: {self.kv_heads}", f"a divisor of {self.heads} heads", "see config.json")

    @property
    def group(self) -> int:
        """Query heads per K/V head."""
        return self.heads // self.kv_heads

    @classmethod
    def of_config(cls, config: Mapping, name: str = "") -> "Model":
        """From a checkpoint's config.json, as a mapping. Raises ConfigError when it lacks a number."""
        nested = [config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)]
        text = nested[0] if nested else config
        try:
            heads = text["num_attention_heads"]
            head_dim = text.get("head_dim") or text["hidden_size"] // heads
            kv_heads = text.get("num_key_value_heads") or heads
            architecture = (config.get("architectures") or [""])[0]
            return cls(architecture, text["num_hidden_layers"], heads, kv_heads, head_dim, name)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            given = f"a config whose numbers cannot be read ({error!r})"
            raise ConfigError(given, "the config.json of a decoder", "check the path") from error


class Geometry(_Record, frozen=True):
    """For people: the family of models whose frames were seen, and the prompts, as `text:20,video:8x4x6,text:40`."""

    family: str = ""
    samples: tuple[str, ...] = ()


class GroupPlan(_Record, frozen=True, omit_defaults=True):
    """Exactly one of: group, one selection for all heads of a K/V head; heads, one plan for each."""

    group: HeadPlan | None = None
    heads: tuple[HeadPlan, ...] | None = None

    def __post_init__(self):
        if (self.group is None) == (self.heads is None):
            given = "group: missing, and heads too" if self.heads is None else "group: given, and heads too"
            raise ConfigError(given, "exactly one of the two", "say whether the heads share one selection")


class LayerPlan(_Record, frozen=True):
    groups: tuple[GroupPlan, ...]


class Timing(_Record, frozen=True):
    """Seconds of one head's prefill attention over `tokens` tokens, on the device of the search."""

    pattern: Pattern
    tokens: int
    seconds: float


class Search(_Record, frozen=True):
    """What the offline search measured. errors: per layer and head, relative error of the output."""

    device: str = ""
    timings: tuple[Timing, ...] = ()
    errors: tuple[tuple[float, ...], ...] = ()


class Plan(_Record, frozen=True):
    """theta: recall below which a head does not use its pattern for a request (0 < theta <= 1).

    Raises ConfigError that names the field where numbers of layers, groups or heads do not fit the model.
    """

    model: Model
    layers: tuple[LayerPlan, ...]
    schema: int = SCHEMA
    theta: float = 0.9
    geometry: Geometry = Geometry()
    search: Search | None = None

    def __post_init__(self):
        model, remedy = self.model, "make the plan for this model"
        if self.schema != SCHEMA:
            raise ConfigError(f"schema: {self.schema}", f"{SCHEMA}", "make the plan with this version of sglang_mm")
        if not 0 < self.theta <= 1:
            raise ConfigError(f"theta: {self.theta}", "0 < theta <= 1", "pass the least recall a head may have")
        _fits("layers", len(self.layers), model.layers, remedy)
        for n, layer in enumerate(self.layers):
            _fits(f"layers[{n}].groups", len(layer.groups), model.kv_heads, remedy)
            for k, group in enumerate(layer.groups):
                if group.heads is not None:
                    _fits(f"layers[{n}].groups[{k}].heads", len(group.heads), model.group, remedy)
        if self.search and self.search.errors:
            _fits("search.errors", len(self.search.errors), model.layers, remedy)
            for n, errors in enumerate(self.search.errors):
                _fits(f"search.errors[{n}]", len(errors), model.heads, remedy)

    def units(self, layer: int) -> list[tuple[tuple[int, ...], HeadPlan]]:
        """(query heads, their plan) of each unit of a layer, ascending: a unit's heads share one selection."""
        size, found = self.model.group, []
        for k, group in enumerate(self.layers[layer].groups):
            heads = tuple(range(k * size, (k + 1) * size))
            if group.heads is None:
                found.append((heads, group.group))
            else:
                found += [((head,), plan) for head, plan in zip(heads, group.heads)]
        return found

    def require(self, model: Model) -> None:
        """Raises ConfigError, naming the field, unless the plan was made for a model of these numbers.

        Names are not compared: the same checkpoint lies under many paths.
        """
        for field in ("architecture", "layers", "heads", "kv_heads", "head_dim", "weights"):
            planned, actual = getattr(self.model, field), getattr(model, field)
            is_known = planned != "" and actual != ""
            if is_known and planned != actual:
                given = f"model.{field}: {planned} in the plan, {actual} in the model"
                raise ConfigError(given, "a plan made for the model", f"make a plan for {model.name or 'this model'}")

    def digest(self) -> str:
        """16 hex digits that differ when what is computed may differ; names and the search's figures do not count."""
        model = msgspec.structs.replace(self.model, name="")
        what = msgspec.structs.replace(self, model=model, geometry=Geometry(), search=None)
        return blake2b(msgspec.json.encode(what, order="sorted"), digest_size=8).hexdigest()


def uniform(model: Model, plan: HeadPlan, *, share: bool = True) -> Plan:
    """Every head one plan. share: the heads of a K/V head share a selection."""
    group = GroupPlan(group=plan) if share else GroupPlan(heads=(plan,) * model.group)
    return Plan(model, (LayerPlan((group,) * model.kv_heads),) * model.layers)


def one_of_each(model: Model, sink: int = 4, window: int = 64) -> Plan:
    """Every kind of pattern and boundary in every layer: head h has the one numbered h modulo 8.

    They suit the planted heads of the tiny checkpoint: grid, column, local, text, sink, vertical, text_to_video,
    unstructured.
    """
    near = AShape(sink, window)
    lines = VerticalSlash(vertical=32, slash=128, sink=sink, window=window)
    from_text = {f"{rows}-text": Dense() for rows in ("text", "image", "video")}
    to_media = {f"{rows}-{keys}": near for rows in ("text", "image", "video") for keys in ("image", "video")}
    kinds = (
        NoBoundary(Grid(axis="frame", sink=sink, window=window)),
        NoBoundary(Grid(axis="row", sink=sink, window=window)),
        KBoundary(AShape(sink, 4 * window)),
        Boundary2D(from_text | to_media),
        NoBoundary(TriShape(sink, window, last=16)),
        QBoundary(text=lines, image=near, video=lines),
        NoBoundary(Blocks()),
        NoBoundary(Dense()),
    )
    groups = [
        GroupPlan(heads=tuple(kinds[(k * model.group + n) % len(kinds)] for n in range(model.group)))
        for k in range(model.kv_heads)
    ]
    return Plan(model, (LayerPlan(tuple(groups)),) * model.layers)


def _fits(field: str, given: int, needed: int, remedy: str) -> None:
    if given != needed:
        raise ConfigError(f"{field}: {given} of them", f"{needed}", remedy)
