"""What a prefill allocates on real ranks, byte by byte, against the table of memory."""

import json
from pathlib import Path

import pytest

from sglang_mm.dryrun.checkpoint import sizes_of
from sglang_mm.parallel.memory import HOST, PREFILL, Load, MemoryTable, memory_table
from sglang_mm.tiny import write_video
from tests.serving import compare
from tests.serving.cases import SAMPLING
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow
PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>How does it end?<|im_end|>\n"
SECONDS = (43, 172)
RANKS = 2
TOLERANCE = 0.15
"""Of the table: it counts what lives together in the dearest stage, not every number per row or tile."""


@pytest.fixture(scope="module", params=["ring", "gather"])
def measured(request, checkpoint, tmp_path_factory) -> tuple[str, list[dict], list[list[dict]]]:
    """(schedule, the record of each prompt, and per rank what each prefill took)"""
    folder = tmp_path_factory.mktemp("peaks")
    arguments = {"cp": RANKS, "schedule": request.param, "max_total_tokens": 65536}
    records = []
    with engine("tests.serving.peak:MeteredEngine", model_path=checkpoint, **arguments) as ask:
        for seconds in SECONDS:
            path = folder / f"{seconds}.mp4"
            write_video(path, seconds=seconds)
            ask("tests.serving.engine_process:flush_cache")
            told = ask("generate", prompt=PROMPT, video_data=[str(path)], sampling_params=SAMPLING)
            records.append(compare.record_of(told))
        return request.param, records, ask("peaks")


def table_of(checkpoint: str, record: dict, schedule: str) -> MemoryTable:
    tokens, rows, media = record["new_tokens"], max(record["rows_per_rank"]), record["tokens"]["video"] // RANKS
    model = sizes_of(json.loads(Path(checkpoint, "config.json").read_text()), "float32")
    return memory_table(model, Load(tokens, rows, rows, media, media, 0, 0, 0, schedule=schedule), fused=False)


def test_the_peak_grows_per_token_as_the_table_says(checkpoint, measured):
    schedule, records, by_rank = measured
    short, long = (table_of(checkpoint, record, schedule) for record in records)
    assert long.tokens > 3.5 * short.tokens > 20_000
    for stages, phase in ((("attention", "mlp"), "decoder"), (("vision", "exchange"), "all")):
        said = [table.of(PREFILL, HOST) + max(map(table.of, stages)) for table in (short, long)]
        slope = (said[1] - said[0]) / (long.tokens - short.tokens)
        for prefills in by_rank:
            grown = [prefill[phase]["bytes"] for prefill in prefills]
            assert (grown[1] - grown[0]) / (long.tokens - short.tokens) == pytest.approx(slope, rel=TOLERANCE), (
                phase, prefills[1][phase]["top"],
            )  # fmt: skip


def test_no_rank_ever_has_hidden_states_of_the_whole_prompt(measured):
    """Inner values of a call are wider than a row, but all rows in the decoder are a rank's own."""
    _, records, by_rank = measured
    for prefills in by_rank:
        for record, prefill in zip(records, prefills, strict=True):
            assert prefill["decoder"]["big"], "nothing was seen at all"
            assert not [made for made in prefill["decoder"]["big"] if max(made[0]) >= record["new_tokens"]]
