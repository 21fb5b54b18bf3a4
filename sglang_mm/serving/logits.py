"""SGLang's logits output of a sharded prefill: hidden states stay on their ranks, what is asked of them travels.

Every rank gets the last row of each request, computes its logits and samples. Log-probabilities of the prompt are
computed where the rows are, by SGLang's own logits processor, ROWS_AT_ONCE rows at a time. Per row, one number for the
next token, values and ids of the k likeliest tokens, and one number per given token id go to all ranks. No step holds
hidden states or logits of the whole prompt.

With a vocabulary of 152K the logits of 512 rows take 297 MiB in fp32; SGLang's processor holds up to three tables of
that size at once. The nested lists in its output, k values and k ids per row, are as long on every rank as SGLang's.

The stock path is SGLang's alone: every rank holds the hidden states of all rows, and logits of 2,048 rows at a time
(SGLANG_LOGPROB_CHUNK_SIZE). A request that takes it because it is short has fewer rows than --cp-min-tokens; for the
other reasons, in plan.py, there is no such bound.

Letters: t rows of this rank, H hidden size, n rows of the batch whose next tokens are scored, m of them on this rank,
K and G the most likeliest and given tokens of a request.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput
from torch import Tensor

from sglang_mm.serving.plan import PrefillPlan

ROWS_AT_ONCE = 512
Process = Callable[[Tensor, LogitsMetadata], LogitsProcessorOutput]


class Scores(NamedTuple):
    """Log-probabilities of some rows, for the wire.

    next_token: fp32 [rows]. top_values, top_ids: fp32 and int32 [rows, K], of the rows whose requests ask for likeliest
    tokens. given: fp32 [rows, G], of the rows whose requests give token ids. A request that asks for fewer has zeros.
    """

    next_token: Tensor
    top_values: Tensor
    top_ids: Tensor
    given: Tensor


def logits_of(model, hidden: Tensor, plan: PrefillPlan, input_ids: Tensor, forward_batch) -> LogitsProcessorOutput:
    """What model.logits_processor returns for the whole batch, equal on every rank. Collective over the ring.

    hidden [t, H]: this rank's rows after the decoder. Call it in the scope in which the model's layers see T ranks;
    these hold the same rows, so they make the same calls. Raises RingBroken when a rank's part does not come in time.
    """
    metadata = LogitsMetadata.from_forward_batch(forward_batch)
    process = partial(_process, model, input_ids)
    last = torch.tensor(metadata.extend_seq_lens_cpu).cumsum(0) - 1
    places, rows = _held(plan, last)
    output = process(_on_all_ranks(plan, hidden[rows.to(hidden.device)], places), _of_last_rows(metadata))
    if metadata.extend_return_logprob:
        _add_scores(output, hidden, plan, metadata, process)
    return output


def _process(model, input_ids: Tensor, rows: Tensor, metadata: LogitsMetadata) -> LogitsProcessorOutput:
    return model.logits_processor(input_ids, rows, model.lm_head, metadata)


def _held(plan: PrefillPlan, wanted: Tensor) -> tuple[list[Tensor], Tensor]:
    """Who holds the rows `wanted` of the flat batch (int64, ascending).

    Per rank the places in `wanted` of the rows it holds; and where those of this rank lie among its rows. All int64 on
    the host, ascending.
    """
    place_of = torch.full((sum(plan.rows_per_rank),), -1)
    place_of[wanted] = torch.arange(len(wanted))
    found = [place_of[plan.layout.flat(rank)] for rank in range(plan.transport.size)]
    return [places[places >= 0] for places in found], (found[plan.rank] >= 0).nonzero().flatten()


def _on_all_ranks(plan: PrefillPlan, mine: Tensor, places: list[Tensor]) -> Tensor:
    """mine [m, ...], of this rank's places, to [n, ...] of all ranks' places; the same bits on every rank.

    The host waits: here a prefill ends, or breaks past the deadline.
    """
    sizes = [len(own) for own in places]
    parts = plan.transport.all_to_all([mine] * len(sizes), sizes, "exchange of the asked rows", host=True, kind="rows")
    joined = mine.new_empty(sum(sizes), *mine.shape[1:])
    joined[torch.cat(places).to(mine.device)] = torch.cat(parts)
    return joined


def _of_last_rows(metadata: LogitsMetadata) -> LogitsMetadata:
    """For the last row of each request alone, of which only logits are asked."""
    ones = torch.ones_like(metadata.extend_seq_lens)
    return replace(metadata, extend_seq_lens=ones, extend_seq_lens_cpu=[1] * len(ones), extend_return_logprob=False)


def _add_scores(
    output: LogitsProcessorOutput, hidden: Tensor, plan: PrefillPlan, metadata: LogitsMetadata, process: Process
) -> None:
    """Log-probabilities of the prompt into the output, in SGLang's order and nesting."""
    counts, top_nums = metadata.extend_logprob_pruned_lens_cpu, metadata.top_logprobs_nums
    request = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    places, rows = _held(plan, _scored_rows(metadata))
    mine = _scores(hidden, rows, request[places[plan.rank]], places[plan.rank], metadata, process)
    output.input_token_logprobs = _on_all_ranks(plan, mine.next_token, places)

    def by_request(table: Tensor, widths: list[int]) -> list[list[list]]:
        asks = torch.tensor([width > 0 for width in widths])[request]
        place_of = asks.cumsum(0) - 1
        everyones = _on_all_ranks(plan, table, [place_of[own[asks[own]]] for own in places])
        return _nested(everyones.cpu(), widths, counts)

    if metadata.extend_return_top_logprob:
        output.input_top_logprobs_val = by_request(mine.top_values, top_nums)
        output.input_top_logprobs_idx = by_request(mine.top_ids, top_nums)
    if metadata.extend_token_ids_logprob:
        given = metadata.token_ids_logprobs
        nested = by_request(mine.given, _given_widths(metadata))
        output.input_token_ids_logprobs_val = [[] if ids is None else rows for ids, rows in zip(given, nested)]
        output.input_token_ids_logprobs_idx = [[] if ids is None else [ids] * n for ids, n in zip(given, counts)]


def _scored_rows(metadata: LogitsMetadata) -> Tensor:
    """Of each request the rows from its asked start on: int64 [n], in the flat batch."""
    rows, first = [], 0
    for start, length in zip(metadata.extend_logprob_start_lens_cpu, metadata.extend_seq_lens_cpu, strict=True):
        rows.append(torch.arange(first + start, first + length))
        first += length
    return torch.cat(rows)


def _scores(
    hidden: Tensor, rows: Tensor, request: Tensor, places: Tensor, metadata: LogitsMetadata, process: Process
) -> Scores:
    """Of the scored rows [m] among hidden's, on its device. request, places [m]: whose they are, which of the n."""
    widest = [max(metadata.top_logprobs_nums), max(_given_widths(metadata))]
    targets = metadata.extend_input_logprob_token_ids_gpu
    parts = [_flat(LogitsProcessorOutput(None), *widest, hidden.device)]
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        own_targets = targets[places[some].to(targets.device)]
        output = process(hidden[rows[some].to(hidden.device)], _of_some_rows(metadata, request[some], own_targets))
        parts.append(_flat(output, *widest, hidden.device))
    return Scores(*map(torch.cat, zip(*parts, strict=True)))


def _of_some_rows(metadata: LogitsMetadata, request: Tensor, targets: Tensor) -> LogitsMetadata:
    """For scored rows alone, all of them scored. request [rows]: whose they are, ascending; targets [rows]: the tokens.

    SGLang takes the last row of each request for sampling, so requests without rows here are left out.
    """
    present, counts = (found.tolist() for found in request.unique_consecutive(return_counts=True))
    top_nums = [metadata.top_logprobs_nums[r] for r in present]
    given = [metadata.token_ids_logprobs[r] for r in present]
    return replace(
        metadata,
        extend_seq_lens_cpu=counts,
        extend_logprob_start_lens_cpu=[0] * len(counts),
        extend_logprob_pruned_lens_cpu=counts,
        extend_input_logprob_token_ids_gpu=targets,
        top_logprobs_nums=top_nums,
        extend_return_top_logprob=any(top_nums),
        token_ids_logprobs=given,
        extend_token_ids_logprob=any(given),
        next_token_logits_buffer=None,  # it holds the logits to sample from
    )


def _flat(output: LogitsProcessorOutput, top_width: int, given_width: int, device: torch.device) -> Scores:
    """SGLang's lists as tables; the one of an empty output has no rows."""

    def table(nested: list | None, width: int, dtype: torch.dtype) -> Tensor:
        rows = [row + [0] * (width - len(row)) for of_request in nested or () for row in of_request if row]
        return torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), width)

    output.finalize_input_logprobs()
    scores = output.input_token_logprobs
    return Scores(
        torch.empty(0, dtype=torch.float32, device=device) if scores is None else scores.to(device),
        table(output.input_top_logprobs_val, top_width, torch.float32),
        table(output.input_top_logprobs_idx, top_width, torch.int32),
        table(output.input_token_ids_logprobs_val, given_width, torch.float32),
    )


def _given_widths(metadata: LogitsMetadata) -> list[int]:
    return [len(ids or ()) for ids in metadata.token_ids_logprobs]


def _nested(table: Tensor, widths: list[int], counts: list[int]) -> list[list[list]]:
    """Per request its rows, as wide as it asked. The table lacks rows that ask for nothing; they come out empty."""
    nested, first = [], 0
    for width, count in zip(widths, counts, strict=True):
        if width:
            nested.append(table[first : first + count, :width].tolist())
            first += count
        else:
            nested.append([[] for _ in range(count)])
    return nested
