"""Tile programs in plain torch: the truth that every kernel is tested against, on any device, fp64 included.

T rows, K keys of a piece, Hq query heads, G of them per K/V head, D head dim; within an item R rows, N keys.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.merge import empty_state, merge, state_dtype
from sglang_mm.kernels.packing import Order, Packer
from sglang_mm.kernels.problem import Problem
from sglang_mm.types import TileProgram

NAME = "reference"


def unfit(problem: Problem) -> str | None:
    """Runs everywhere."""
    return None


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
    """Merge the program's result into the state, in place."""
    validate(q_THD, k_KHD, v_KHD, program)
    merge(out, lse, *_attend(q_THD, packer or Packer(k_KHD, v_KHD), program, scale))


def attend_tiles(
    q_THD: Tensor, k_KHD: Tensor, v_KHD: Tensor, program: TileProgram, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of the program's rows over its piece of keys: one softmax over all entries of an item.

    q_THD [T, Hq, D], k_KHD and v_KHD [K, Hkv, D], one dtype and device.
    Returns out [T, Hq, D] and the natural log-sum-exp of the scaled scores, lse [Hq, T]: fp64 for fp64 inputs, fp32 for
    all others. A row that sees no key of the piece gets (0, -inf). Raises ConfigError for shapes that do not fit.
    """
    validate(q_THD, k_KHD, v_KHD, program)
    return _attend(q_THD, Packer(k_KHD, v_KHD), program, scale)


def tile_lse(q_THD: Tensor, k_KHD: Tensor, program: TileProgram, *, scale: float) -> Tensor:
    """The log-sum-exp [Hq, T] alone, as `attend_tiles` returns it."""
    validate(q_THD, k_KHD, None, program)
    return _attend(q_THD, Packer(k_KHD, None), program, scale)[1]


def _attend(q_THD: Tensor, packer: Packer, program: TileProgram, scale: float) -> tuple[Tensor, Tensor]:
    order, packed = packer.pack(program)
    out, lse = empty_state(q_THD)
    dtype = state_dtype(q_THD.dtype)
    for heads, rows, places, hidden_RN in _items(program, order):
        kv_head = int(heads[0]) // program.group
        k_ND = packed.k_NHD[places, kv_head].to(dtype)
        scores_HRN = (q_THD[rows, heads[:, None]].to(dtype) * scale) @ k_ND.T
        scores_HRN[..., len(places) - hidden_RN.shape[1] :].masked_fill_(hidden_RN, float("-inf"))
        lse_HR = torch.logsumexp(scores_HRN, dim=-1)
        lse[heads[:, None], rows] = lse_HR
        if packed.v_NHD is not None:
            shift = lse_HR.masked_fill(lse_HR == float("-inf"), 0)  # a row without keys: exp(-inf - 0) = 0, not NaN
            weights_HRN = scores_HRN.sub_(shift.unsqueeze(-1)).exp_()
            out[rows, heads[:, None]] = weights_HRN @ packed.v_NHD[places, kv_head].to(dtype)
    return out, lse


def _items(program: TileProgram, order: Order) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(heads [H], rows [R], packed keys [N], hidden bool [R, M]) of items with an entry; the last M keys are masked."""
    table = {
        name: getattr(program, name).tolist()
        for name in ("item_unit", "item_rows", "row_ptr", "key_ptr", "full_ptr", "full_tile", "full_count", "part_ptr")
    }
    device = program.rows.device
    heads = [torch.tensor(unit, device=device) for unit in program.heads]
    part_first = program.key_ptr[program.part_tile.long()]
    part_size = program.key_ptr[(program.part_tile + program.part_count).long()] - part_first
    for item, (unit, tile) in enumerate(zip(table["item_unit"], table["item_rows"])):
        full = range(*table["full_ptr"][item : item + 2])
        part = slice(*table["part_ptr"][item : item + 2])
        if not full and part.start == part.stop:
            continue
        ends = [(table["full_tile"][e], table["full_tile"][e] + table["full_count"][e]) for e in full]
        shown = [torch.arange(table["key_ptr"][first], table["key_ptr"][last], device=device) for first, last in ends]
        size = part_size[part]
        entry = torch.arange(part.start, part.stop, device=device).repeat_interleave(size)
        place = torch.arange(len(entry), device=device) - (size.cumsum(0) - size).repeat_interleave(size)
        masked = part_first[entry] + place
        rows = program.rows[table["row_ptr"][tile] : table["row_ptr"][tile + 1]].long()
        yield heads[unit], rows, torch.cat([*shown, masked]), _hidden(program, rows, order.pos[masked], entry, place)


def _hidden(program: TileProgram, rows: Tensor, pos_k: Tensor, entry: Tensor, place: Tensor) -> Tensor:
    """bool [R, M]: what the bounds and the bits of each key's entry hide."""
    low, high, k_low, k_high = program.bounds[program.part_bounds[entry].long()].long().unbind(1)
    shown = (pos_k >= k_low) & (pos_k < k_high)
    live = program.part_live[entry].long()
    if bool((live >= 0).any()):
        bits = program.live[live.clamp(min=0), place.clamp(max=127) // 64] >> place % 64 & 1
        shown &= (live < 0) | (bits == 1)
    distance_RM = program.pos_q[rows][:, None] - pos_k
    return ~(shown & (distance_RM >= low) & (distance_RM < high))


def validate(q: Tensor, k: Tensor, v: Tensor | None, program: TileProgram) -> None:
    """Raises ConfigError for tensors that do not fit the program."""
    if len(q) != len(program.pos_q) or len(k) != len(program.pos_k):
        given = f"{len(q)} rows and {len(k)} keys"
        allowed = f"{len(program.pos_q)} and {len(program.pos_k)}"
        raise ConfigError(given, allowed, "pass the tensors of the shards that the program was compiled for")
    if q.shape[1] != k.shape[1] * program.group or q.shape[2] != k.shape[2]:
        given = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        raise ConfigError(given, f"{program.group} query heads per K/V head, one head dim", "check the head split")
    tensors = [each for each in (q, k, v) if each is not None]
    if len({(each.dtype, each.device) for each in tensors}) > 1 or program.rows.device != q.device:
        given = ", ".join(f"{each.dtype} on {each.device}" for each in tensors)
        given += f", a program on {program.rows.device}"
        raise ConfigError(given, "one dtype and one device", "convert k and v, and compile where the tensors are")
    if v is not None and v.shape != k.shape:
        raise ConfigError(f"v {tuple(v.shape)}", f"{tuple(k.shape)}, as k", "pass keys and values of one piece")
    last = max((head for unit in program.heads for head in unit), default=0)
    if last >= q.shape[1]:
        given = f"q with heads 0 .. {q.shape[1] - 1}"
        raise ConfigError(given, f"heads of units up to {last}", "compile the selection of these heads")
