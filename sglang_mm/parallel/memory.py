"""What one rank of T x C holds for one prompt, item by item. Pure arithmetic; tests measure it against what runs.

Some of it rests (weights, keys and values, tables), some lives as long as the prefill, some for one stage of a layer.
The peak is what is held, plus the dearest stage. S tokens of the prompt, R rows of the rank, M media tokens among its
rows, b bytes of an element; per row:

    vision      embeddings so far, and the tower's call: at most PATCHES patches, whatever the prompt
    exchange    embeddings of own frames, copies that go, copies that come, and all in order
    attention   q, k, v; ring: two pieces of K/V, a copy in the kernel's order, two fp32 states
                gather: two stages of some heads of all S keys, and copies of them by position
                on several nodes, what crosses: up to two pieces more; shares of a stage more
    mlp         the result; gate and up, and their product, of at most MLP_ROWS rows at a time
    logits      the last row's; with input log-probabilities of at most LOGIT_ROWS rows at a time

`fused`: SGLang's CUDA kernels (norm, rotary and product of gate and up in place or in one go). Without it plain torch
on a CPU, which makes more copies, and whose counts are measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_mm.config import Config
from sglang_mm.parallel.gather import head_stages
from sglang_mm.parallel.nodes import Nodes, pieces_at_once
from sglang_mm.types import page_for

HELD, PREFILL, HOST, DISK = "held", "prefill", "host", "disk"
STAGES = ("vision", "exchange", "attention", "mlp", "logits")
PATCHES = 65536  # of one call of the vision tower
MLP_ROWS = 16384  # in one call of a feed-forward layer
LOGIT_ROWS = 512  # whose logits are there at once
LOGIT_TABLES = 3  # of that size, in SGLang's logits processor
INDEX = 8  # bytes of a position or a slot
BATCH_COLUMNS = 6  # ids, positions, slots, three rotary positions
FP32 = 4
REQUESTS = 64  # rows of SGLang's slot table, as our launcher sets --max-running-requests
ALONE = Nodes(1)
PREFILL_BUFFER = 16384  # tokens that SGLang's input buffers hold at least


@dataclass(frozen=True)
class Tower:
    """A vision tower; sizes in values. pixels: of a patch; a token is made of `merge`^2 patches."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    pixels: int
    merge: int

    def weights(self, out: int, tp: int) -> int:
        """Values of one of T ranks; out: the decoder's hidden size."""
        h, wide, merged = self.hidden, -(-self.intermediate // 8) * 8, self.hidden * self.merge**2
        block = (4 * h * h + 3 * h + 3 * h * wide + 2 * wide) // tp + 4 * h  # qkv, proj, gate, up, down, norms, biases
        merger = (merged * merged + merged + merged * out) // tp + h + out
        return self.pixels * h + self.layers * block + merger

    def patch_values(self, fused: bool, tp: int) -> int:
        """Values alive for one patch while a block runs: six of `hidden`, and the product of gate and up, or q, k, v
        and their copies in order of segments."""
        wide = -(-self.intermediate // 8) * 8 // tp
        in_mlp = 6 * self.hidden + (3 if fused else 4) * wide
        in_attention = (3 + (10 if fused else 12) // tp) * self.hidden
        return max(in_mlp, in_attention) + 2 * self.hidden // self.heads


@dataclass(frozen=True)
class ModelSizes:
    """A decoder and its vision tower, if it has one. itemsize: bytes of a weight, activation, key or value."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    tied: bool
    itemsize: int
    tower: Tower | None = None

    def q(self, tp: int) -> int:
        """Values of one row's queries on one of T ranks."""
        return self.heads // tp * self.head_dim

    def kv(self, tp: int) -> int:
        """Of its keys and values, of one layer."""
        return 2 * self.kv_heads_of(tp) * self.head_dim

    def kv_heads_of(self, tp: int) -> int:
        return max(1, self.kv_heads // tp)

    def weights(self, tp: int) -> int:
        """Bytes on one of T ranks."""
        h, q, kv = self.hidden, self.q(tp), self.kv(tp)
        layer = h * (q + kv) + q + kv + q * h + 3 * h * self.intermediate // tp + 2 * h
        words = (1 if self.tied else 2) * self.vocabulary * h // tp
        tower = self.tower.weights(h, tp) if self.tower else 0
        return (self.layers * layer + words + h + tower) * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """Of one token in all layers, not split."""
        return self.layers * self.kv(1) * self.itemsize


@dataclass(frozen=True)
class Load:
    """One prompt on one rank of T x C. tokens: S. rows: R. largest: rows of the rank that has most.

    media: media tokens among its rows; frames: those it encodes. kept: K/V rows of its pages, all of the last one and
    SGLang's padding page. slots: of the pool, all ranks' together. requests: rows of the slot table, each as long as
    the context. scored: whether log-probabilities of the prompt are asked for. ring: on which nodes its ranks are.
    """

    tokens: int
    rows: int
    largest: int
    media: int
    frames: int
    kept: int
    slots: int
    context: int
    requests: int = 64
    schedule: str = "ring"
    tp: int = 1
    scored: bool = False
    ring: Nodes = ALONE


@dataclass(frozen=True)
class Item:
    """bytes of one thing. when: HELD, PREFILL, one of STAGES, or HOST, in the host's memory and not the device's."""

    name: str
    when: str
    bytes: int


@dataclass(frozen=True)
class MemoryTable:
    """The items of one rank, for a prompt of `tokens`."""

    tokens: int
    items: tuple[Item, ...]

    def of(self, *when: str) -> int:
        """Bytes of all items of these times."""
        return sum(item.bytes for item in self.items if item.when in when)

    @property
    def held(self) -> int:
        """Bytes that rest, with or without a prefill."""
        return self.of(HELD)

    @property
    def dearest(self) -> str:
        """The stage that takes most."""
        return max(STAGES, key=self.of)

    @property
    def prefill(self) -> int:
        """Bytes beyond those that rest while the dearest stage runs."""
        return self.of(PREFILL, self.dearest)

    @property
    def peak(self) -> int:
        return self.held + self.prefill


def memory_table(model: ModelSizes, load: Load, *, fused: bool = True) -> MemoryTable:
    """What the rank holds. fused: with CUDA kernels, see above."""
    items = [
        *_held(model, load), *_prefill(model, load, fused), *_vision(model, load, fused),
        *_attention(model, load, fused), *_mlp(model, load, fused), *_logits(model, load),
    ]  # fmt: skip
    return MemoryTable(load.tokens, tuple(item for item in items if item.bytes))


def even_table(model: ModelSizes, config: Config, tokens: int, *, fused: bool = True) -> MemoryTable:
    """The same for `tokens` of video, dealt out evenly, without laying them out; of the schedule that takes more, where
    the server would choose one.
    """
    page = page_for(config.cp) if config.keepers > 1 else 1
    rows = -(-tokens // config.cp)
    kept = (-(-tokens // page) + 1) * page // config.keepers
    schedules = ("ring", "gather") if config.schedule == "auto" else (config.schedule,)
    slots = max(tokens, PREFILL_BUFFER)
    ring = Nodes(config.cp, config.nodes)
    loads = [
        Load(tokens, rows, rows, rows, rows, kept, slots, tokens, REQUESTS, schedule, config.tp, ring=ring)
        for schedule in schedules
    ]
    return max((memory_table(model, load, fused=fused) for load in loads), key=lambda table: table.peak)


def _held(model: ModelSizes, load: Load) -> Iterator[Item]:
    b = model.itemsize
    yield Item("weights", HELD, model.weights(load.tp))
    yield Item("K/V at rest", HELD, load.kept * model.layers * model.kv(load.tp) * b)
    yield Item("slot table", HELD, (load.requests + 1) * load.context * 4)
    yield Item("SGLang's input buffers", HELD, BATCH_COLUMNS * INDEX * load.slots)
    yield Item("rotary table", HELD, model.positions * model.head_dim * b)


def _prefill(model: ModelSizes, load: Load, fused: bool) -> Iterator[Item]:
    row = load.rows * model.hidden * model.itemsize
    yield Item("ids, positions, slots", PREFILL, BATCH_COLUMNS * INDEX * load.tokens)
    yield Item("who computes and keeps which row", PREFILL, INDEX * (load.tokens + 7 * load.rows))
    yield Item("residual", PREFILL, row)
    if not fused:
        yield Item("embeddings, kept by the caller", PREFILL, row)
    yield Item("layout, pieces, ways of embeddings", HOST, INDEX * 8 * load.tokens)


def _vision(model: ModelSizes, load: Load, fused: bool) -> Iterator[Item]:
    if model.tower is None or not load.frames:
        return
    b, tower = model.itemsize, model.tower
    patches = min(PATCHES, load.frames * tower.merge**2)
    before = load.frames - patches // tower.merge**2
    yield Item("pixels, a byte each", DISK, load.frames * tower.merge**2 * tower.pixels)
    yield Item("pixels of a call", "vision", patches * tower.pixels * b)
    yield Item("tower", "vision", patches * tower.patch_values(fused, load.tp) * b)
    yield Item("embeddings of earlier calls", "vision", before * model.hidden * b)
    yield Item("embeddings of own frames, joined", "exchange", load.frames * model.hidden * b)
    yield Item("embeddings that go", "exchange", load.frames * model.hidden * b)
    yield Item("embeddings that come, and in order", "exchange", 2 * load.media * model.hidden * b)


def _attention(model: ModelSizes, load: Load, fused: bool) -> Iterator[Item]:
    b, q, kv, rows = model.itemsize, model.q(load.tp), model.kv(load.tp), load.rows
    state = FP32 * (q + model.heads // load.tp)
    yield Item("normed rows", "attention", rows * model.hidden * b)
    yield Item("q, k, v", "attention", rows * (q + kv) * b)
    if not fused:
        yield Item("q and k, turned", "attention", rows * (q + kv // 2) * b)
    if load.schedule == "ring":
        yield Item("two pieces of K/V", "attention", (rows + load.largest) * kv * b)
        more = pieces_at_once(load.ring) - 2 if load.ring.two_links else 0
        yield Item("pieces that cross nodes", "attention", more * load.largest * kv * b)
        if fused:
            yield Item("a piece in the kernel's order", "attention", load.largest * kv * b)
        yield Item("two states in fp32", "attention", (2 if fused else 3) * rows * state)
        return
    stages = head_stages(model.kv_heads_of(load.tp))
    stage = max(heads.stop - heads.start for heads in stages) * kv // model.kv_heads_of(load.tp)
    under_way = min(2, len(stages))
    yield Item("heads of all K/V, two stages", "attention", under_way * load.tokens * stage * b)
    crossing = load.tokens // load.ring.each if load.ring.two_links else 0
    yield Item("shares that cross nodes", "attention", crossing * stage * b)
    yield Item("heads of all K/V, by position", "attention", (2 if fused else 1) * load.tokens * stage * b)
    yield Item("result, and a stage's in fp32", "attention", rows * q * b + rows * state // len(stages))


def _mlp(model: ModelSizes, load: Load, fused: bool) -> Iterator[Item]:
    b, rows, wide = model.itemsize, min(MLP_ROWS, load.rows), model.intermediate // load.tp
    yield Item("normed rows", "mlp", load.rows * model.hidden * b)
    yield Item("gate and up of a call", "mlp", 2 * rows * wide * b)
    yield Item("their product", "mlp", (1 if fused else 2) * rows * wide * b)
    yield Item("results", "mlp", (load.rows + (rows if load.rows > rows else 0)) * model.hidden * b)


def _logits(model: ModelSizes, load: Load) -> Iterator[Item]:
    rows = LOGIT_TABLES * min(LOGIT_ROWS, load.rows) if load.scored else 1
    yield Item("normed rows", "logits", load.rows * model.hidden * model.itemsize)
    yield Item("logits", "logits", rows * model.vocabulary * FP32)
