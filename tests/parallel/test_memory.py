"""The table of memory against what is allocated, byte for byte; and the meter that says so."""

import gc
import re

import pytest
import torch

from sglang_mm.parallel import memory
from sglang_mm.parallel.gather import GatherTables, attend_gathered
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.memory import HOST, STAGES, Item, Load, MemoryTable, ModelSizes, memory_table
from sglang_mm.parallel.ring import attend_pieces, ring_pieces
from sglang_mm.types import BatchLayout, Run
from tests.house.source import ROOT
from tests.memory import Peak, PeakMeter

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 32
MODEL = ModelSizes(1, HEADS * HEAD_DIM, 512, HEADS, KV_HEADS, HEAD_DIM, 320, 1 << 20, False, 4)
CALLERS = {"normed rows", "q, k, v", "q and k, turned"}
"""Items of the attention stage that the layer around it makes."""
MESSAGES = ("parallel/local.py",)
"""Copies that threads send each other, which processes do not make."""
TOLERANCE = 0.1
"""Kernels' masks of one tile, and numbers per row: position, weight in a merge."""


def attended(tokens: int, schedule: str) -> list[PeakMeter]:
    """Per rank, the meter of one attention."""
    layout = BatchLayout((make_layout([Run(0, tokens)], RANKS),))
    rows = [layout.rows(rank) for rank in range(RANKS)]

    def run(transport) -> PeakMeter:
        q = torch.randn(rows[transport.rank], HEADS, HEAD_DIM)
        k, v = torch.randn(2, rows[transport.rank], KV_HEADS, HEAD_DIM)
        with PeakMeter(without=MESSAGES, big=tokens) as meter:
            if schedule == "ring":
                pieces = ring_pieces(k, v, rows, transport)
                attend_pieces(q, layout, transport.rank, pieces, scale=0.1)
            else:
                attend_gathered(q, k, v, GatherTables(layout, "cpu"), transport, scale=0.1)
        return meter

    return run_ranks(run, RANKS)


def said(tokens: int, schedule: str) -> int:
    """Bytes that the table has for it."""
    rows = tokens // RANKS
    load = Load(tokens, rows, rows, 0, 0, 0, 0, 0, schedule=schedule)
    items = memory_table(MODEL, load, fused=False).items
    return sum(item.bytes for item in items if item.when == "attention" and item.name not in CALLERS)


@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_attention_takes_per_token_what_the_table_says(schedule):
    short, long = 6144, 12288
    measured = [attended(tokens, schedule) for tokens in (short, long)]
    slope = (said(long, schedule) - said(short, schedule)) / (long - short)
    grown = [(after.peak.bytes - before.peak.bytes) / (long - short) for before, after in zip(*measured)]
    assert max(grown) == pytest.approx(slope, rel=TOLERANCE), [meter.peak.top() for meter in measured[1]]


def test_the_ring_never_holds_all_keys():
    """The control: gathered attention does, some heads at a time."""
    tokens, of_all = 6144, {}
    for schedule in ("ring", "gather"):
        seen = [made for meter in attended(tokens, schedule) for made in meter.peak.big]
        assert seen
        of_all[schedule] = {site.split(":")[0] for shape, site in seen if max(shape) >= tokens}
    assert of_all == {"ring": set(), "gather": {"parallel/gather.py"}}


@pytest.mark.parametrize(
    ("file", "name", "counted"),
    [
        ("embed", "PATCHES_PER_CALL", memory.PATCHES),
        ("context_parallel", "ROWS_AT_ONCE", memory.MLP_ROWS),
        ("logits", "ROWS_AT_ONCE", memory.LOGIT_ROWS),
    ],
)
def test_bounds_are_those_of_the_server(file, name, counted):
    """Read, not imported: importing them would import SGLang."""
    source = (ROOT / "sglang_mm" / "serving" / f"{file}.py").read_text()
    assert re.findall(rf"^{name} = (\d+)", source, re.MULTILINE) == [str(counted)]


def test_a_table_adds_what_is_alive_together():
    items = [Item("a", "held", 1), Item("b", "prefill", 10), Item("c", "mlp", 100), Item("d", "attention", 300)]
    table = MemoryTable(10, (*items, Item("e", "attention", 5), Item("f", HOST, 1000)))
    assert (table.held, table.dearest, table.prefill, table.peak) == (1, "attention", 315, 316)
    assert table.of(*STAGES) == 405


def test_sharded_keys_are_one_share_and_weights_are_split():
    def of(**changed) -> dict[str, int]:
        load = {"tokens": 8192, "rows": 2048, "largest": 2048, "media": 0, "frames": 0, "kept": 8192, "slots": 8192}
        table = memory_table(MODEL, Load(**load | {"context": 9000} | changed))
        return {item.name: item.bytes for item in table.items}

    whole, shared, split = of(), of(kept=2048), of(tp=2)
    assert whole["K/V at rest"] == 8192 * 2 * KV_HEADS * HEAD_DIM * 4 == 4 * shared["K/V at rest"]
    assert split["K/V at rest"] * 2 == whole["K/V at rest"]
    assert split["gate and up of a call"] * 2 == whole["gate and up of a call"]
    norms = 3 * MODEL.hidden * MODEL.itemsize
    assert (split["weights"] - norms) * 2 == whole["weights"] - norms
    assert {name for name in whole if whole[name] != shared[name]} == {"K/V at rest"}


def test_input_log_probabilities_are_bounded():
    def logits(rows: int, **asked) -> int:
        load = Load(8 * rows, rows, rows, 0, 0, rows, 8 * rows, 8 * rows, **asked)
        return next(item.bytes for item in memory_table(MODEL, load).items if item.name == "logits")

    assert logits(1 << 20) == MODEL.vocabulary * 4
    assert logits(1 << 20, scored=True) == logits(1 << 12, scored=True) == 3 * 512 * MODEL.vocabulary * 4


def test_the_meter_follows_storages_not_tensors():
    before = torch.zeros(1000)
    with PeakMeter() as meter:
        made = torch.ones(1000)
        part = made.view(10, 100)[2:4]
        del made
        assert meter.live_bytes == 4000
        before.add_(1)
        again = before.view(-1)
        assert meter.live_bytes == 4000
        del part
        assert meter.live_bytes == 0 and again.sum() == 1000
    assert meter.peak.bytes == 4000
    [(site, held)] = meter.peak.top()
    assert held == 4000 and site.startswith("parallel/test_memory.py:")
    assert meter.largest_floats.shape == (1000,)


def test_a_phase_counts_what_was_there_before_it():
    with PeakMeter() as meter:
        kept = torch.ones(100)
        with meter.phase("one") as one:
            torch.ones(500)
        with meter.phase("two"):
            torch.ones(50)
        gc.collect()
    assert kept.numel() == 100 and one is meter.phases["one"]
    assert {name: peak.bytes for name, peak in meter.phases.items()} == {"one": 2400, "two": 600}
    assert meter.peak.bytes == 2400 and Peak().top() == []


def test_call_sites_can_be_left_out():
    with PeakMeter(without=("parallel/test_memory.py",)) as meter:
        kept = torch.ones(10)
    assert meter.peak.bytes == 0 and kept.numel() == 10


def test_the_meter_sees_a_leak():
    """The control: what somebody keeps stays alive."""
    kept = []
    with PeakMeter() as meter:
        for _ in range(5):
            kept.append(torch.ones(256))
    assert meter.live_bytes == meter.peak.bytes == 5 * 1024
