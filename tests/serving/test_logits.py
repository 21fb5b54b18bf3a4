"""What ranks say of their own rows is what SGLang's logits processor says of all rows, in its nesting, in bounds.

Processor and head are SGLang's, hidden states are random. Ranks are threads, so T is 1 here; test_values.py has T = 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from sglang_mm import Engine  # noqa: F401 (imports SGLang as ours, with our hooks)

from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput  # isort: skip
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead  # isort: skip
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode  # isort: skip
from sglang.srt.runtime_context import get_context, get_parallel  # isort: skip
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.transport import Transport
from sglang_mm.serving import logits
from sglang_mm.types import BatchLayout, Run
from tests.memory import PeakMeter

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
VOCABULARY, PADDED, HIDDEN = 250, 256, 128
TOLERANCE = 1e-5  # of logits and log-probabilities of size 10 in fp32: sums in the order of another number of rows
FP32 = 4
LISTS = (
    "input_top_logprobs_val",
    "input_top_logprobs_idx",
    "input_token_ids_logprobs_val",
    "input_token_ids_logprobs_idx",
)


@dataclass(frozen=True)
class Request:
    """rows: new ones; from `start` on the next tokens are scored, none of them where start is rows."""

    rows: int
    start: int
    top: int = 0
    ids: list[int] | None = None


BATCHES = {
    "all rows": [Request(300, 0)],
    "likeliest and given tokens": [Request(300, 120, 5, [3, 200, 3])],
    "a long run": [Request(1300, 600, 2, [5])],
    "the last row alone": [Request(300, 299, 4, [0])],
    "nothing": [Request(300, 300), Request(40, 40, 3, [1])],
    "less than a row per rank": [Request(3, 1, 2, [7])],
    "unequal requests": [
        Request(90, 0, 3), Request(40, 40, 20, [1]), Request(300, 17, 0, [7, 9]), Request(35, 34, 8, []),
        Request(64, 10), Request(1, 0, 1, [4, 4, 4]), Request(33, 33),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    with get_context().override_server_args(tp_size=1), get_parallel().override(tp_rank=0):
        head = ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.float32)
        head.weight.data.normal_(std=0.3)
        yield SimpleNamespace(logits_processor=LogitsProcessor(SimpleNamespace(vocab_size=VOCABULARY)), lm_head=head)


def batch_of(requests: list[Request], return_logprob: bool = True) -> ForwardBatch:
    lengths = [request.rows for request in requests]
    scored = sum(request.rows - request.start for request in requests)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        batch_size=len(requests),
        input_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        req_pool_indices=None,
        seq_lens=None,
        out_cache_loc=None,
        seq_lens_sum=sum(lengths),
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=lengths,
        return_logprob=return_logprob,
        extend_logprob_start_lens_cpu=[request.start for request in requests],
        extend_input_logprob_token_ids_gpu=torch.randint(VOCABULARY, (scored,)),
        top_logprobs_nums=[request.top for request in requests],
        token_ids_logprobs=[request.ids for request in requests],
    )


def of_ranks(model, hidden: torch.Tensor, batch: ForwardBatch, ranks: int, watch: Callable | None = None) -> list:
    """Each rank's output; or what watch(transport, call) returns, which is to make the call."""
    layout = BatchLayout(tuple(make_layout([Run(0, rows)], ranks) for rows in batch.extend_seq_lens_cpu))

    def run(transport: Transport):
        held = [layout.rows(rank) for rank in range(ranks)]
        plan = SimpleNamespace(layout=layout, transport=transport, rank=transport.rank, rows_per_rank=held)
        own = hidden[layout.flat(transport.rank)]

        def call() -> LogitsProcessorOutput:
            return logits.logits_of(model, own, plan, batch.input_ids, batch)

        return watch(transport, call) if watch else call()

    return run_ranks(run, ranks)


def flat(nested) -> list:
    return [number for part in nested for number in flat(part)] if isinstance(nested, list) else [nested]


def shape(nested):
    return [shape(part) for part in nested] if isinstance(nested, list) else None


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", BATCHES)
def test_equals_one_processor_over_all_rows(model, monkeypatch, name, ranks):
    monkeypatch.setattr(logits, "ROWS_AT_ONCE", 32)
    batch = batch_of(BATCHES[name])
    hidden = torch.randn(batch.seq_lens_sum, HIDDEN)
    whole = model.logits_processor(batch.input_ids, hidden, model.lm_head, batch)
    assert (whole.input_token_logprobs is None) == (name == "nothing")
    for output in of_ranks(model, hidden, batch, ranks):
        close(output.next_token_logits, whole.next_token_logits)
        if name == "nothing":
            assert output.input_token_logprobs is None and not any(getattr(output, field) for field in LISTS)
            continue
        assert output.input_token_logprobs.dtype == torch.float32
        close(output.input_token_logprobs, whole.input_token_logprobs)
        for field in LISTS:
            mine, wanted = getattr(output, field), getattr(whole, field)
            assert (mine is None) == (wanted is None) and shape(mine) == shape(wanted)
            if field.endswith("idx"):
                assert mine == wanted
            else:
                close(torch.tensor(flat(mine or [])), torch.tensor(flat(wanted or [])))


def close(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(mine, wanted, rtol=0, atol=TOLERANCE)


def test_all_ranks_hold_the_same_bits(model):
    batch = batch_of(BATCHES["unequal requests"])
    first, *others = of_ranks(model, torch.randn(batch.seq_lens_sum, HIDDEN), batch, 4)
    for output in others:
        assert torch.equal(output.next_token_logits, first.next_token_logits)
        assert torch.equal(output.input_token_logprobs, first.input_token_logprobs)
        assert all(getattr(output, field) == getattr(first, field) for field in LISTS)


def test_without_log_probabilities_only_last_rows_travel(model):
    batch = batch_of([Request(300, 0, 5, [1]), Request(40, 0)], return_logprob=False)
    hidden = torch.randn(batch.seq_lens_sum, HIDDEN)
    outputs, sent = zip(*of_ranks(model, hidden, batch, 3, with_bytes))
    close(outputs[0].next_token_logits, (hidden @ model.lm_head.weight.T)[[299, 339], :VOCABULARY])
    assert outputs[0].input_token_logprobs is None and sum(sent) == 2 * 2 * HIDDEN * FP32


def test_scalars_travel_and_no_hidden_states_but_of_last_rows(model):
    requests = [Request(700, 100, 5, [3, 4]), Request(200, 0)]
    _, sent = zip(*of_ranks(model, torch.randn(900, HIDDEN), batch_of(requests), 3, with_bytes))
    next_tokens, likeliest, given = 600 + 200, 600 * 5, 600 * 2
    assert sum(sent) == 2 * FP32 * (2 * HIDDEN + next_tokens + 2 * likeliest + given)


def with_bytes(transport: Transport, call: Callable) -> tuple[LogitsProcessorOutput, int]:
    output = call()
    return output, sum(account.bytes_sent for account in transport.meter.take().values())


def test_memory_is_bounded(model, monkeypatch):
    """Four times the rows: the largest table stays, and a row adds less than half of its hidden state."""
    short, long = (peaks(model, rows) for rows in (1024, 4096))
    table = logits.ROWS_AT_ONCE * PADDED * FP32
    assert 0 < short.largest_floats.bytes <= table and long.largest_floats.bytes <= table < 4096 // 2 * HIDDEN * FP32
    assert long.peak.bytes - short.peak.bytes < (4096 - 1024) * HIDDEN * FP32 / 2
    assert long.peak.bytes < 4 * table

    monkeypatch.setattr(logits, "ROWS_AT_ONCE", 4096)  # the control: the meter sees what would go wrong
    unbounded = peaks(model, 4096)
    assert unbounded.largest_floats.bytes > table and unbounded.peak.bytes > 4 * table


def peaks(model, rows: int) -> PeakMeter:
    """Of the first of two ranks, every row scored."""

    def metered(transport: Transport, call: Callable) -> PeakMeter:
        with PeakMeter() as meter:
            call()
        return meter

    return of_ranks(model, torch.randn(rows, HIDDEN), batch_of([Request(rows, 0, 2, [5])]), 2, metered)[0]
