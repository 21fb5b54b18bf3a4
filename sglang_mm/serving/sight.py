"""What a sharded prefill shows of itself: stages as they go, to the event stream; seconds and bytes at the end."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_mm.events import Progress, Publisher, publisher
from sglang_mm.parallel.stopwatch import Stopwatch
from sglang_mm.parallel.transport import Transport

STAGES = ("vision", "exchange", "index", "compile", "permutation", "attention", "transport", "rest")
KINDS = ("kv", "queries", "selection", "embeddings", "rows", "checks")  # of messages; see parallel/meter.py


def tokens_by_modality(mm_inputs, start: int, stop: int) -> dict[str, int]:
    """Of prompt tokens [start, stop), how many are text, image, video. mm_inputs: SGLang's, None for a text request."""
    counts = {"text": stop - start, "image": 0, "video": 0}
    for item in mm_inputs.mm_items if mm_inputs is not None else ():
        modality = "video" if item.is_video() else "image"
        for first, last in item.offsets or ():
            inside = max(0, min(last + 1, stop) - max(first, start))
            counts[modality] += inside
            counts["text"] -= inside
    return counts


def tokens_of_batch(forward_batch) -> list[dict[str, int]]:
    """New tokens by modality, per request."""
    prefixes, lengths = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    mm_inputs = forward_batch.mm_inputs or [None] * len(lengths)
    return [tokens_by_modality(mm, start, start + new) for mm, start, new in zip(mm_inputs, prefixes, lengths)]


def progress_of(forward_batch, rank: int, ranks: int, layers: int, schedule: str, chunk: int) -> Progress:
    """Of an extend batch that is about to run."""
    tokens = sum(map(Counter, tokens_of_batch(forward_batch)), Counter())
    to = publisher() if get_parallel().attn_tp_rank == 0 else Publisher(None)  # of T ranks with the same rows one tells
    return Progress(
        requests=forward_batch.rids or [],
        rank=rank,
        ranks=ranks,
        layers=layers,
        new_tokens=sum(forward_batch.extend_seq_lens_cpu),
        cached_tokens=sum(forward_batch.extend_prefix_lens_cpu),
        tokens=dict(tokens),
        schedule=schedule,
        chunk=chunk,
        to=to,
    )


class Sight:
    """Of one prefill on one rank: `with sight.running():` around all of it, `with sight.stage(name):` inside.

    watch: the stopwatch that the schedules take; what no stage claims is `rest`. progress: told to the event stream.
    """

    def __init__(self, progress: Progress, transport: Transport):
        self.progress, self.transport = progress, transport
        self.on_gpu = transport.device.type == "cuda"
        self.watch = Stopwatch(transport.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.progress, self.watch("rest"):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the event stream; timed under that name if it is one of STAGES, else part of `rest`."""
        with self.progress.stage(name), self.watch(name if name in STAGES else "rest"):
            yield

    def layer_done(self, layer: int) -> None:
        """layer: from 0. On a GPU it is told when the device has come so far."""
        if self.on_gpu and self.progress.publisher.on:
            event = torch.cuda.Event()
            event.record()
            self.progress.layer_done(layer, event.query)
        else:
            self.progress.layer_done(layer)

    def measured(self) -> tuple[dict[str, list[float]], dict[str, list[int]], list[int]]:
        """Seconds by stage, bytes sent by kind, and those of all kinds to other nodes: each with one value per rank.

        Collective; ends the measurement.
        """
        with self.watch("rest"):
            pass  # the stretch since the last stage counts
        seconds, traffic = self.watch.seconds(), self.transport.meter.take()
        mine = [seconds.get(stage, 0.0) for stage in STAGES]
        mine += [traffic[kind].bytes_sent if kind in traffic else 0 for kind in KINDS]
        mine.append(sum(each.bytes_across for each in traffic.values()))
        row = torch.tensor([mine], dtype=torch.float64, device=self.transport.device)
        ranks = self.transport.size
        told = self.transport.all_to_all([row] * ranks, [1] * ranks, "measurements", host=True, kind="measurements")
        *columns, across = torch.cat(told).T.tolist()
        by_stage = {name: [round(s, 6) for s in column] for name, column in zip(STAGES, columns)}
        by_stage["total"] = [round(sum(each), 6) for each in zip(*columns[: len(STAGES)])]
        sent = {kind: list(map(int, column)) for kind, column in zip(KINDS, columns[len(STAGES) :])}
        return by_stage, sent, list(map(int, across))
