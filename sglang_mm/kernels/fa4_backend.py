"""Full entries by FlashAttention-4 (the flash-attn-4 wheel), all others by our Triton kernel, in one fp32 state.

    program --+-- full entries, tiles of 128 keys --> per-head lists of 128 x 128 blocks --> FA4 --> merge --+--> state
              +-- shorter tiles, entries with a mask ------> a program of these alone ------> Triton --------+

FA4 is given no mask function, so its loop is wgmma and TMA alone. Its rows are *slots*: slot s of a head is the tile of
rows of the s-th heaviest item of the head's unit. So FA4, which starts blocks in order, starts with the heaviest; heads
whose rows are cut differently share a call, and all calls together have no more rows than the busiest unit has items.
Slots are taken some at a time, which bounds memory:

    Q, O, O without gaps    3 * PAIRS * D * 2 bytes                    384 MiB with D = 128
    rows of the state       PAIRS * D * 4 bytes                        256 MiB
    lists, as they grow     LISTED * (4 + 4 * 8) bytes                 288 MiB at most
    K and V, tile by tile   2 * 128 * key tiles * Hkv * D * 2 bytes    once for a program, for FA4 and Triton

T rows, K keys of a piece, Hq query heads, D head dim; U units, S slots, R rows of a slot, M = 128 S rows of a call;
N = 128 * key tiles; L the longest list of a call; E full entries. A visit is an item that meets a tile of 128 keys.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.merge import merge
from sglang_mm.kernels.packing import Packer
from sglang_mm.kernels.problem import Problem
from sglang_mm.kernels.triton_backend.launch import attend_packed as attend_rest
from sglang_mm.types import TileProgram

NAME = "fa4"
TILE = 128  # rows and keys of a block: what FA4 takes on sm_90 for every head dim up to 128
PAIRS = 1 << 19  # pairs of a row and a head in a call: 31 blocks for each of 132 SMs
LISTED = 1 << 23  # places in the lists of a call, padding included
WHY_NOT = {
    8: "there FA4 takes block lists and silently ignores them",
    10: "there FA4 wants lists for 256 rows, and tiles have at most 128",
    11: "there FA4 wants lists for 256 rows, and tiles have at most 128",
    12: "there FA4 has no block lists",
}


def unfit(problem: Problem) -> str | None:
    """Why FA4 cannot run here; None where it can."""
    if problem.capability // 10 != 9:
        why = WHY_NOT.get(problem.capability // 10)
        return f"needs sm_90, not {problem.name}" + (f": {why}" if why else "")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {problem.dtype}"
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= 128:
        return f"takes head dims that are multiples of 8 up to 128, not {problem.head_dim}"
    override = os.environ.get("FLASH_ATTENTION_ARCH", "sm_90")
    if "90" not in override:
        return f"would run FA4's kernel for another GPU, since FLASH_ATTENTION_ARCH={override}"
    return _import_failure()


def attend(
    q_THD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    program: TileProgram,
    scale: float,
    out: Tensor,
    lse: Tensor,
    packer: Packer | None = None,
) -> None:
    """Add the program's result to the state. Waits for the device once, unless the program has no full entry.

    q_THD [T, Hq, D], k_KHD and v_KHD [K, Hkv, D]: float16 or bfloat16, on one CUDA device of sm_90.
    out fp32 [T, Hq, D], lse fp32 [Hq, T], natural: as `kernels.merge` has them, changed in place. FA4's partial results
    are rounded to the dtype of q before they are merged.
    Raises ConfigError for tiles of more than 128 rows.
    """
    packer = packer or Packer(k_KHD, v_KHD)
    if not len(program.full_tile):
        return attend_rest(q_THD, packer, program, scale, out, lse)
    plan = make_plan(program, q_THD.shape[1])
    if plan.calls:
        _, packed = packer.pack(program, TILE)
        k_1NHD, v_1NHD = packed.k_NHD.unsqueeze(0), packed.v_NHD.unsqueeze(0)
        for call in plan.calls:
            row_HM, is_row_HM = slot_rows(plan, call)
            q_MHD = q_THD[row_HM.T.contiguous(), torch.arange(q_THD.shape[1], device=q_THD.device)]
            partial = block_sparse_attention(q_MHD.unsqueeze(0), k_1NHD, v_1NHD, *block_lists(plan, call), scale)
            _merge_rows(out, lse, *partial, row_HM, is_row_HM, call.pairs)
    if plan.rest is not None:
        attend_rest(q_THD, packer, plan.rest, scale, out, lse, align=TILE if plan.calls else 1)


def block_sparse_attention(
    q_1MHD: Tensor, k_1NHD: Tensor, v_1NHD: Tensor, count_1HS: Tensor, index_1HSL: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The call of the library: rows 128 s .. 128 s + 127 of head h attend the first count[h, s] blocks of its list.

    count_1HS int32 [1, Hq, S], index_1HSL int32 [1, Hq, S, L], ascending. Returns out [1, M, Hq, D] in the dtype of q
    and natural lse fp32 [1, Hq, M]; (0, -inf) where a list is empty.
    """
    flash_attn_func, lists_type = _library()
    # sm_90 wants lists of both kinds. Those of masked blocks are empty, so any table does as theirs.
    none_1HS = torch.zeros_like(count_1HS)
    lists = lists_type(none_1HS, index_1HSL, count_1HS, index_1HSL, block_size=(TILE, TILE))
    return flash_attn_func(
        q_1MHD, k_1NHD, v_1NHD, softmax_scale=scale, pack_gqa=False, block_sparse_tensors=lists, return_lse=True
    )[:2]


@dataclass(frozen=True)
class Call:
    """Slots first .. last - 1, whose lists have at most `longest` blocks; pairs: of a row and a head, that exist."""

    first: int
    last: int
    longest: int
    pairs: int


@dataclass(frozen=True, eq=False)
class Plan:
    """int64 tables on the program's device, and what the host knows.

    item_US [U + 1, slots]: item in each slot, -1 for none; the last line is for heads without a unit.
    unit_of_head [Hq]. first_visit, visits [items].
    entry_end, entry_shift [E]: visit v is of the first entry that ends above v, and meets whole tile v + shift.
    whole_tiles [key tiles]: those of 128 keys, ascending, then the others.
    rest: what FA4 does not compute, None for nothing.
    """

    program: TileProgram
    item_US: Tensor
    unit_of_head: Tensor
    first_visit: Tensor
    visits: Tensor
    entry_end: Tensor
    entry_shift: Tensor
    whole_tiles: Tensor
    calls: tuple[Call, ...]
    rest: TileProgram | None


def make_plan(program: TileProgram, heads: int) -> Plan:
    """The program has full entries; heads: of the query. Waits for the device once, for the lengths of lists."""
    device = program.rows.device
    tile, stop = ascending_entries(program)
    row_size, is_whole = program.row_ptr.diff(), program.key_ptr.diff() == TILE
    whole, whole_ptr = _numbered(is_whole, tile, stop)
    short, short_ptr = _numbered(~is_whole, tile, stop)
    first_visit = whole_ptr[program.full_ptr]
    visits = first_visit.diff()
    item_US = _slots(program, visits)
    heads_U = torch.tensor([*map(len, program.heads), 0]).to(device, non_blocking=True)
    pairs_US = row_size[program.item_rows.long()][item_US] * heads_U[:, None]
    longest_S, pairs_S = visits[item_US].where(item_US >= 0, 0).amax(0), pairs_US.where(item_US >= 0, 0).sum(0)
    host = torch.cat([longest_S, pairs_S, short_ptr[-1:], row_size.max()[None]]).tolist()  # waits for the device
    if host[-1] > TILE:
        raise ConfigError(f"a tile of {host[-1]} rows", f"tiles of at most {TILE}", "compile the program for that")
    slots = len(longest_S)
    units = {head: unit for unit, members in enumerate(program.heads) for head in members}
    unit_of_head = torch.tensor([units.get(head, len(program.heads)) for head in range(heads)])
    return Plan(
        program=program,
        item_US=item_US,
        unit_of_head=unit_of_head.to(device, non_blocking=True),
        first_visit=first_visit[:-1],
        visits=visits,
        entry_end=whole_ptr[1:],
        entry_shift=whole - whole_ptr[:-1],
        whole_tiles=torch.sort(~is_whole, stable=True).indices,
        calls=tuple(_calls(host[:slots], host[slots : 2 * slots], heads)),
        rest=_rest(program, torch.sort(is_whole, stable=True).indices, short, short_ptr, host[-2]),
    )


def block_lists(plan: Plan, call: Call) -> tuple[Tensor, Tensor]:
    """(count int32 [1, Hq, S], index int32 [1, Hq, S, L]) of a call; what lies behind the count means nothing.

    Ascending, as FA4 wants them: it looks for keys beyond the end of K in the last block of a list alone. Tiles are
    padded, so K ends with a block and no order would show a key too many; but the library promises nothing else.
    """
    item_US = plan.item_US[:, call.first : call.last]
    count_US = plan.visits[item_US].where(item_US >= 0, 0)
    visit_USL = plan.first_visit[item_US][..., None] + torch.arange(call.longest, device=item_US.device)
    entry_USL = torch.searchsorted(plan.entry_end, visit_USL, right=True).clamp_(max=len(plan.entry_end) - 1)
    number_USL = visit_USL.add_(plan.entry_shift[entry_USL]).clamp_(0, len(plan.whole_tiles) - 1)
    index_USL = plan.whole_tiles.int()[number_USL]
    return count_US.int()[plan.unit_of_head][None], index_USL[plan.unit_of_head][None]


def slot_rows(plan: Plan, call: Call) -> tuple[Tensor, Tensor]:
    """(row of the state int64 [Hq, M], whether there is one bool [Hq, M]) of a call."""
    program, item_US = plan.program, plan.item_US[:, call.first : call.last]
    tile_US = program.item_rows.long()[item_US]
    place_USR = program.row_ptr[tile_US][..., None] + torch.arange(TILE, device=item_US.device)
    is_row_USR = (place_USR < program.row_ptr[tile_US + 1][..., None]) & (item_US >= 0)[..., None]
    row_USR = program.rows[place_USR.where(is_row_USR, 0)].long()
    return row_USR.flatten(1)[plan.unit_of_head], is_row_USR.flatten(1)[plan.unit_of_head]


def ascending_entries(program: TileProgram) -> tuple[Tensor, Tensor]:
    """(first tile, tile behind the last), int64 [E], of full entries: in order of items, and within them of tiles."""
    entries = len(program.full_tile)
    items = torch.arange(program.items, device=program.rows.device)
    item = items.repeat_interleave(program.full_ptr.diff(), output_size=entries)
    order = torch.argsort(item * len(program.key_ptr) + program.full_tile)
    tile = program.full_tile.long()[order]
    return tile, tile + program.full_count[order]


def _numbered(chosen: Tensor, tile: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of tiles as runs of the chosen ones alone: (number of the first one [E], where each run begins [E + 1])."""
    before = torch.cat([chosen.new_zeros(1, dtype=torch.int64), chosen.cumsum(0)])
    first = before[tile]
    return first, torch.cat([first.new_zeros(1), (before[stop] - first).cumsum(0)])


def _slots(program: TileProgram, visits: Tensor) -> Tensor:
    """int64 [U + 1, row tiles]: each unit's items that have visits, heaviest first, then -1. A unit has at most one
    item for a tile of rows, since a row occurs once in it."""
    units, key_tiles = len(program.heads), len(program.key_ptr)
    order = torch.sort(program.item_unit.long() * key_tiles + (key_tiles - 1 - visits), stable=True).indices
    unit = program.item_unit.long()[order]
    first = torch.searchsorted(unit, torch.arange(units, device=unit.device))
    item_US = torch.full((units + 1, len(program.row_ptr) - 1), -1, device=unit.device)
    item_US[unit, torch.arange(len(unit), device=unit.device) - first[unit]] = order.where(visits[order] > 0, -1)
    return item_US


def _calls(longest: list[int], pairs: list[int], heads: int) -> Iterator[Call]:
    """longest, pairs: of each slot; the first descends."""
    first, slots = 0, sum(length > 0 for length in longest)
    while first < slots:
        at_once = max(1, min(PAIRS // (TILE * heads), LISTED // (heads * longest[first])))
        last = min(first + at_once, slots)
        yield Call(first, last, longest[first], sum(pairs[first:last]))
        first = last


def _rest(
    program: TileProgram, short_tiles: Tensor, short: Tensor, short_ptr: Tensor, visits: int
) -> TileProgram | None:
    """Entries with a mask, and one full entry for each visit to a shorter tile. short_tiles: those come first."""
    if not visits and not len(program.part_tile):
        return None
    entries = torch.arange(len(short), device=short.device)
    entry = entries.repeat_interleave(short_ptr.diff(), output_size=visits)
    place = torch.arange(visits, device=short.device) - short_ptr[entry]
    tile = short_tiles[short[entry] + place].int()
    return replace(program, full_ptr=short_ptr[program.full_ptr], full_tile=tile, full_count=torch.ones_like(tile))


def _merge_rows(
    out: Tensor, lse: Tensor, out_1MHD: Tensor, lse_1HM: Tensor, row_HM: Tensor, is_row_HM: Tensor, pairs: int
) -> None:
    """Merge what exists of a call into the state. No pair of a row and a head occurs twice in a program."""
    head, place = torch.nonzero_static(is_row_HM, size=pairs).unbind(1)
    row = row_HM[head, place]
    state = out[row, head][:, None], lse[head, row][None]
    merge(*state, out_1MHD[0, place, head][:, None], lse_1HM[0, head, place][None])
    out[row, head], lse[head, row] = state[0][:, 0], state[1][0]


@cache
def _library():
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return flash_attn_func, BlockSparseTensorsTorch


@cache
def _import_failure() -> str | None:
    """The library loads CUDA's own ones, which may be absent, or not fit it, in more than one way."""
    try:
        _library()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flash_attn"):
            return "needs flash-attn-4, which is not installed"
        return f"needs {error.name}, which flash-attn-4 imports and is not installed"
    except Exception as error:
        return f"needs flash-attn-4, whose import fails: {error}".splitlines()[0]
    return None
