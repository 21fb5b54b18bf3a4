"""Lists of unequal lengths side by side in one tensor, and how the host hands over its own.

On a GPU each operation costs the host some microseconds, and each size that only the device knows makes it wait for
all work queued so far. So lists are built for all units together, and sizes are asked for together, or known already.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor


def spread(values: Tensor, counts: Tensor, total: int | None = None) -> Tensor:
    """values[i], counts[i] times. total: the sum of counts, where the host knows it; else it waits."""
    return values.repeat_interleave(counts, output_size=total)


def nth(counts: Tensor, total: int | None = None) -> Tensor:
    """int64: 0 .. counts[0] - 1, then 0 .. counts[1] - 1, and so on. total: as for `spread`."""
    ends = torch.cumsum(counts, 0)
    if total is None:
        total = int(ends[-1]) if len(ends) else 0
    return torch.arange(total, device=counts.device) - spread(ends - counts, counts, total)


def starts_of(counts: Iterable[int]) -> list[int]:
    """Where each of several lists starts when they lie side by side, and the end of the last one."""
    return list(accumulate(counts, initial=0))


def upload(device: torch.device, *columns: Sequence[int]) -> list[Tensor]:
    """Columns of the host as int64 tensors, in one transfer that nobody waits for."""
    joined = torch.tensor([number for column in columns for number in column], dtype=torch.int64)
    return list(joined.to(device, non_blocking=True).split([len(column) for column in columns]))


def position_of(numbers: Tensor) -> Tensor:
    """int64: the inverse of a permutation."""
    order = torch.empty_like(numbers)
    order[numbers] = torch.arange(len(numbers), device=numbers.device)
    return order


def borders(ascending: Tensor, count: int) -> Tensor:
    """int64 [count + 1]: where the elements of each of 0 .. count - 1 start in an ascending tensor, and the end."""
    numbers = torch.arange(count + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, numbers)
