"""Programs planned for flashinfer.BlockSparseAttentionWrapper: which of its calls do a program, and their tables.

A call is one planned wrapper: some slots with their pages, either all without a mask or all with one.
S slots, P pages, R rows and C keys of a block, M = S * R rows of a call, N = K/V heads * key tiles * C.
"""

import bisect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.flashinfer_backend.blocks import Blocks, Slots, Visits, largest, packed
from sglang_mm.types import TileProgram

CALL_ROWS = 1 << 20  # of a call: bounds the copies of Q and of the result, 256 MiB each at 128 numbers of 16 bits
CALL_PAGES = 1 << 23  # of a call: with blocks of 128 keys their places stay below 2^31
CALL_MASK_BYTES = 1 << 28  # of a call: the library counts them in int32
PLAN_MASK_BYTES = 1 << 31  # of all calls of a program; more is refused
PAIRS_AT_ONCE = 1 << 24  # pairs of a row and a key while masks are made: some 0.5 GB
WORKSPACE_BYTES = 1 << 27  # what the library recommends for partial results of split rows
WRAPPER_BYTES = 1 << 23  # of tables, which every wrapper keeps on the device and again, pinned, on the host
INT32 = 2**31 - 1


@dataclass(frozen=True)
class Numbers:
    """What a plan depends on beside the program. scale: of the scores, before softmax."""

    device: torch.device
    dtype: torch.dtype
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, eq=False)
class Call:
    """wrapper: planned. tile_S, head_S int64 [S]: tile of rows and query head of each slot.

    kept int64: rows of M, ascending, that exist and see a key. All others of the result mean nothing.
    """

    wrapper: Any
    tile_S: Tensor
    head_S: Tensor
    kept: Tensor
    nbytes: int


@dataclass(frozen=True, eq=False)
class Plan:
    """rows_TR int64 [row tiles, R], index int64 [key tiles * C]: as in Blocks. nbytes: on the device."""

    calls: tuple[Call, ...]
    rows_TR: Tensor
    index: Tensor
    nbytes: int


def make_plan(program: TileProgram, numbers: Numbers) -> Plan:
    """Waits for the device, several times for each call. Raises ConfigError for what is beyond the library's limits."""
    blocks = Blocks(program)
    whole, masked = (blocks.slots(count_I) for count_I in blocks.counts())
    _check(blocks, whole, masked, numbers)
    calls = [_call(blocks, part, numbers, has_mask=False) for part in _parts(blocks, whole, CALL_PAGES)]
    most = min(CALL_PAGES, CALL_MASK_BYTES // _mask_bytes(blocks))
    calls += [_call(blocks, part, numbers, has_mask=True) for part in _parts(blocks, masked, most)]
    nbytes = sum(call.nbytes for call in calls) + _nbytes(blocks.rows_TR, blocks.index)
    return Plan(tuple(calls), blocks.rows_TR, blocks.index, nbytes)


def _parts(blocks: Blocks, slots: Slots, most_pages: int) -> list[Slots]:
    """Slots of each call: as many as the limits allow, one at least."""
    ends = slots.pages.cumsum(0).tolist()
    parts, first = [], 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = min(bisect.bisect_right(ends, before + most_pages), first + CALL_ROWS // blocks.rows)
        parts.append(slots.part(first, max(last, first + 1)))
        first = max(last, first + 1)
    return parts


def _call(blocks: Blocks, slots: Slots, numbers: Numbers, *, has_mask: bool) -> Call:
    program, device = blocks.program, slots.item.device
    visits = blocks.visits(int(slots.item[0]), int(slots.item[-1]) + 1, has_mask=has_mask)
    indptr = torch.cat([slots.pages.new_zeros(1), slots.pages.cumsum(0)])
    slot_P = torch.arange(len(slots.item), device=device).repeat_interleave(slots.pages)
    place_P = torch.arange(len(slot_P), device=device) - indptr[slot_P]
    visit_P = torch.searchsorted(visits.item, slots.item)[slot_P] + place_P
    tiles = len(program.key_ptr) - 1
    columns = (slots.head[slot_P] // program.group * tiles + visits.tile[visit_P]).int()
    tile_S = program.item_rows.long()[slots.item]
    is_kept_SR = blocks.is_row_TR[tile_S]
    mask = None
    if has_mask:
        mask, sees_SR = _masks(blocks, visits, slots, (slot_P, place_P, visit_P))
        is_kept_SR &= sees_SR
    wrapper = _new_wrapper(device)
    wrapper.plan(
        indptr.int(),
        columns,
        M=len(tile_S) * blocks.rows,
        N=numbers.kv_heads * tiles * blocks.keys,
        R=blocks.rows,
        C=blocks.keys,
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim=numbers.head_dim,
        packed_mask=mask,
        sm_scale=numbers.scale,
        q_data_type=numbers.dtype,
        kv_data_type=numbers.dtype,
        o_data_type=numbers.dtype,
    )
    if mask is not None:
        _set_mask_offsets(wrapper, (indptr * _mask_bytes(blocks)).int())
    kept = is_kept_SR.flatten().nonzero().squeeze(1)
    tables = [columns, tile_S, slots.head, kept, *([] if mask is None else [mask])]
    return Call(wrapper, tile_S, slots.head, kept, _nbytes(*tables) + WRAPPER_BYTES)


def _masks(blocks: Blocks, visits: Visits, slots: Slots, pages: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Packed mask uint8, and which rows see a key, bool [S, R]. pages: slot, place in it, and visit of each, int64 [P].

    Slot after slot: a row of all its pages, then the next row, as if the pages were one long row of keys.
    """
    slot_P, place_P, visit_P = pages
    row_bytes = blocks.keys // 8
    mask = torch.zeros(len(slot_P) * blocks.rows, row_bytes, dtype=torch.uint8, device=slot_P.device)
    rows_seen = torch.zeros(len(slots.item), blocks.rows, dtype=torch.int32, device=slot_P.device)
    begin_S = (slots.pages.cumsum(0) - slots.pages) * blocks.rows
    row_R = torch.arange(blocks.rows, device=slot_P.device)
    step = max(1, PAIRS_AT_ONCE // (blocks.rows * blocks.keys))
    for slot, place, visit in zip(slot_P.split(step), place_P.split(step), visit_P.split(step)):
        shown = blocks.shown(visits.take(visit))
        at = begin_S[slot][:, None] + row_R * slots.pages[slot][:, None] + place[:, None]
        mask[at.flatten()] = packed(shown).flatten(0, 1)
        rows_seen.index_add_(0, slot, shown.any(-1).int())
    return mask.flatten(), rows_seen > 0


def _set_mask_offsets(wrapper: Any, offsets: Tensor) -> None:
    """int32 [S + 1], bytes: where the mask of each slot begins.

    Given `packed_mask`, the library's plan keeps the offsets of the mask before packing, though its kernels count bytes
    (flashinfer pull request 2201). Given `mask`, it packs rightly, but with a loop over slots that waits for the device
    four times in each, and with 8 to 16 times the memory. So the offsets are put right here; where the library comes
    to do it itself, this changes nothing.
    """
    theirs = getattr(wrapper, "_mask_indptr_buf", None)
    if theirs is None or theirs.shape != offsets.shape:
        given = "a flashinfer that keeps offsets of packed masks elsewhere"
        raise ConfigError(given, "one like flashinfer-python 0.7.2", "install that, or choose the triton backend")
    wrapper._mask_indptr_buf = offsets


def _check(blocks: Blocks, whole: Slots, masked: Slots, numbers: Numbers) -> None:
    tiles, mask_bytes = len(blocks.program.key_ptr) - 1, _mask_bytes(blocks)
    remedy = "use the triton backend, or shorter pieces of keys"
    if numbers.kv_heads * tiles > INT32:
        raise ConfigError(f"{numbers.kv_heads} K/V heads of {tiles} key tiles", "2^31 - 1 blocks in flashinfer", remedy)
    longest = max(largest(whole.pages), largest(masked.pages))
    if longest * max(blocks.keys, mask_bytes) > INT32:
        given = f"an item of {longest} tiles with {blocks.keys} keys and {mask_bytes} bytes of mask each"
        raise ConfigError(given, "2^31 - 1 keys and bytes in flashinfer", remedy)
    total = int(masked.pages.sum()) * mask_bytes
    if total > PLAN_MASK_BYTES:
        given = f"{total >> 20} MiB of masks for partial entries in flashinfer"
        raise ConfigError(given, f"{PLAN_MASK_BYTES >> 20} MiB", remedy)


def _mask_bytes(blocks: Blocks) -> int:
    """Of one page."""
    return blocks.rows * blocks.keys // 8


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _new_wrapper(device: torch.device) -> Any:
    """The one place where the library is called by name, so that a test can put its own there."""
    from flashinfer import BlockSparseAttentionWrapper

    return BlockSparseAttentionWrapper(_workspace(device))


@cache
def _workspace(device: torch.device) -> Tensor:
    """Shared by all wrappers of a device, which therefore run on one stream at a time."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
