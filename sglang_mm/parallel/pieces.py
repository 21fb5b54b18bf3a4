"""Keys and values as schedules hand them over. T tokens, H heads, D head dim."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sglang_mm.errors import ConfigError

Prefix = Callable[[int], tuple[Tensor, Tensor] | None]
"""request -> its cached (k, v) [layout.start, Hkv, D], positions 0 .. start-1, or None where nothing is cached."""

State = tuple[Tensor, Tensor]
"""Partial results of this rank's rows over keys that a schedule does not see: out [T, Hq, D], lse [Hq, T]."""


@dataclass(frozen=True)
class Piece:
    """The keys and values [T, Hkv, D] that rank `source` brings, in the order of its holdings. T may be 0."""

    source: int
    k: Tensor
    v: Tensor


def cached_rows(prefix: Prefix | None, request: int, start: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """k, v [start, Hkv, D] of a request's cached prefix; rows cut from `like` where there are none.

    Raises ConfigError when the prefix does not have `start` rows.
    """
    k, v = (prefix(request) if prefix else None) or (like[:0], like[:0])
    for tensor in (k, v):
        expect_rows(f"cached prefix of request {request}", tensor, start)
    return k, v


def expect_rows(what: str, tensor: Tensor, rows: int) -> None:
    if len(tensor) != rows:
        raise ConfigError(f"{what} with {len(tensor)} rows", f"{rows} rows", "use the layout that made the tensor")
