"""Plans for the tiny checkpoint whose every head is sparse in a prompt of 2,000 to 3,000 tokens."""

from sglang_mm.patterns.boundary import Boundary2D, HeadPlan, KBoundary, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.plan import GroupPlan, LayerPlan, Model, Plan, uniform

THETA = 0.3
"""Far below what any of these keeps in such a prompt: of a head that attends everywhere, blocks keep half."""
SINK, WINDOW = 16, 128
NEAR = {"sink": SINK, "window": WINDOW}
FEW, MANY = VerticalSlash(32, 256, **NEAR), VerticalSlash(256, 256, **NEAR)
OF_PLACE, OF_COLUMN = (Grid(axis=axis, vertical=False, slash=1, **NEAR) for axis in ("frame", "row"))
KEYS_OF_PLACE = Grid(axis="frame", tail=False, **NEAR)
"""Legal between any rows and media."""
ROWS_OF_PLACE = Grid(axis="frame", horizontal=True, phases=2, **NEAR)
MEDIA = ("image", "video")

EVEN: tuple[HeadPlan, ...] = (
    QBoundary(text=AShape(**NEAR), image=OF_PLACE, video=OF_PLACE),
    Boundary2D({f"{media}-{media}": OF_COLUMN for media in MEDIA} | {"video-text": MANY, "text-video": Blocks(0.8)}),
    KBoundary(AShape(**NEAR)),
    Boundary2D({f"{rows}-{keys}": AShape(**NEAR) for rows in ("text", *MEDIA) for keys in MEDIA}),
    NoBoundary(TriShape(**NEAR, last=16)),
    QBoundary(text=FEW, image=FEW, video=FEW),
    NoBoundary(Blocks(0.7)),
    NoBoundary(Dense()),
)
ODD: tuple[HeadPlan, ...] = (
    NoBoundary(Grid(axis="frame", slash=2, **NEAR)),
    QBoundary(text=Blocks(0.6), image=OF_COLUMN, video=OF_COLUMN),
    QBoundary(text=TriShape(**NEAR, last=8), image=AShape(**NEAR), video=Blocks(0.8)),
    KBoundary(MANY),
    NoBoundary(Grid(axis="auto", horizontal=True, slash=1, phases=2, **NEAR)),
    Boundary2D(
        {"text-video": KEYS_OF_PLACE, "video-image": KEYS_OF_PLACE, "text-text": FEW, "video-text": FEW}
        | {f"{media}-{media}": ROWS_OF_PLACE for media in MEDIA}
    ),
    Boundary2D({f"{rows}-video": Blocks(0.7) for rows in ("text", *MEDIA)}),
    NoBoundary(Blocks(0.7)),
)
"""Heads 0 .. 7 of layers of even and of odd number, for what planted.py gives them to attend to."""


def every_pattern(model: Model) -> Plan:
    """Every kind of pattern, of line and of boundary, each head with a plan of its own; two layers or more."""

    def layer(kinds: tuple[HeadPlan, ...]) -> LayerPlan:
        size = model.group
        return LayerPlan(
            tuple(
                GroupPlan(heads=tuple(kinds[head % len(kinds)] for head in range(k * size, (k + 1) * size)))
                for k in range(model.kv_heads)
            )
        )

    return Plan(model, tuple(layer((EVEN, ODD)[n % 2]) for n in range(model.layers)), theta=THETA)


def shared(model: Model) -> Plan:
    """In layers of even number the heads of a K/V head share a selection, in those of odd number each has its own."""
    both = QBoundary(text=Blocks(0.7), image=MANY, video=Grid(axis="row", slash=1, **NEAR)), NoBoundary(Blocks(0.7))
    groups = LayerPlan(tuple(GroupPlan(group=both[k % 2]) for k in range(model.kv_heads)))
    own = every_pattern(model).layers
    return Plan(model, tuple(own[n] if n % 2 else groups for n in range(model.layers)), theta=THETA)


def all_dense(model: Model) -> Plan:
    return uniform(model, NoBoundary(Dense()))
