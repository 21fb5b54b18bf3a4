"""The cost model's constants, measured once: a little attention, some copies, some messages.

Every rank measures while the others do, since that is how they work. T rows, H heads, D head dim.
"""

import math
import time
from collections.abc import Callable
from itertools import chain

import torch

from sglang_mm.kernels import causal_attention, empty_state, merge
from sglang_mm.parallel.cost import Constants, Link, ModelShape
from sglang_mm.parallel.transport import Transport

REPEATS = 3
FEW_ROWS, FIRST_ROWS, MOST_ROWS = 16, 512, 8192
KEYS_PER_ROW = 4  # most keys of a long prompt are seen by whole tiles of rows, as here
ENOUGH_S = 0.03  # attention that takes so long, or MOST_ROWS rows, tells the rate
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # copied or sent: far more than what a message costs by itself


def calibrate(transport: Transport, shape: ModelShape, backend: str = "auto") -> Constants:
    """Measure this machine with all ranks at once; the same constants, bit for bit, on all.

    Collective. Below a second on CPU for heads of common size; kernels that must be compiled first come on top. Seconds
    are averaged over the ranks. On several nodes the links inside them and across are measured apart. Raises RingBroken
    when another rank is not there by the deadline.
    """
    device = transport.device
    nodes, rank = transport.topology, transport.rank
    # first: whoever is missing is noticed at once, and ranks measure the rest together
    links = [_link(transport, nodes.next_inside(rank), nodes.next_inside(rank, -1))]
    if nodes.count > 1:
        links.append(_link(transport, nodes.next_across(rank), nodes.next_across(rank, -1)))
    mine = [*_attention(shape, backend, device), _memory(shape, device), *chain(*links)]
    agreed = transport.all_to_all(
        [torch.tensor([mine], dtype=torch.float64, device=device)] * transport.size,
        [1] * transport.size,
        "calibration: agreement",
        True,
        "checks",
    )
    call_s, flop_s, memory_s, *links = torch.cat(agreed).mean(0).tolist()
    pairs = zip(links[::2], links[1::2])
    inside, *across = (Link(1 / byte_s if byte_s else math.inf, latency_s) for latency_s, byte_s in pairs)
    return Constants(1 / flop_s, inside.bytes_per_s, inside.latency_s, 1 / memory_s, call_s, *across)


def _attention(shape: ModelShape, backend: str, device: torch.device) -> tuple[float, float]:
    """(seconds of a call with next to no work in it, seconds of one operation in a call with enough)"""
    call_s = _fastest(_attend(FEW_ROWS, shape, backend, device), device)
    rows = FIRST_ROWS
    while True:
        seconds = _fastest(_attend(rows, shape, backend, device), device)
        if seconds > max(ENOUGH_S, 2 * call_s) or rows >= MOST_ROWS:
            break
        rows *= 2
    pairs = rows * rows + rows * (rows + 1) // 2
    return call_s, max(seconds - call_s, seconds / 2) / (pairs * shape.flops(shape.q_heads))


def _attend(rows: int, shape: ModelShape, backend: str, device: torch.device) -> Callable[[], object]:
    """The last rows of a prompt look at all of it."""
    keys = torch.arange(KEYS_PER_ROW * rows)
    q = torch.zeros(rows, shape.q_heads, shape.head_dim, dtype=shape.dtype, device=device)
    k, v = (torch.zeros(len(keys), shape.kv_heads, shape.head_dim, dtype=shape.dtype, device=device) for _ in range(2))
    return lambda: causal_attention(q, k, v, keys[-rows:], keys, scale=1.0, backend=backend)


def _memory(shape: ModelShape, device: torch.device) -> float:
    """Seconds of a byte, in one merge and one reordering copy of as many bytes."""
    size = _block(device)
    rows = max(1, size // shape.state_bytes)
    state = empty_state(torch.zeros(rows, shape.q_heads, shape.head_dim, dtype=shape.dtype, device=device))
    partial = tuple(tensor.zero_() for tensor in empty_state(state[0]))
    keys = torch.zeros(max(1, size // shape.kv_bytes(1)), shape.kv_bytes(1), dtype=torch.uint8, device=device)
    turned = torch.arange(len(keys), device=device).flip(0)
    moved = 3 * state[0].nbytes + 2 * keys.nbytes
    merge_s = _fastest(lambda: merge(*state, *partial), device)
    return (merge_s + _fastest(lambda: keys.index_select(0, turned), device)) / moved


def _link(transport: Transport, to: int, by: int) -> tuple[float, float]:
    """(seconds of the smallest message, of one further byte) while every rank sends one and receives one."""
    if to == transport.rank:
        return 0.0, 0.0

    def seconds_of(size: int) -> float:
        message = torch.zeros(size, dtype=torch.uint8, device=transport.device)
        arrival = torch.empty_like(message)
        return _fastest(
            lambda: transport.exchange({to: [message]}, {by: [arrival]}, "calibration", "checks")(True),
            transport.device,
        )

    size = _block(transport.device)
    return seconds_of(1), seconds_of(size) / size


def _block(device: torch.device) -> int:
    return BLOCK_BYTES.get(device.type, BLOCK_BYTES["cpu"])


def _fastest(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest run after a first one that is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
