"""Keys and values as schedules hand them over. T tokens, H heads, D head dim."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import causal_attention

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


class Attend(Protocol):
    """What a schedule calls for some rows of one request and some of its keys; it knows nothing of patterns itself."""

    def __call__(
        self, request: int, source: int | None, heads: slice, q: Tensor, k: Tensor, v: Tensor,
        positions_q: Tensor, positions_k: Tensor,
    ) -> State:  # fmt: skip
        """Partial result (out [T, Hq, D], lse [Hq, T]) of rows q [T, Hq, D] over k, v [K, Hkv, D].

        positions_q, positions_k: int64 CPU, ascending. source: the rank whose piece the keys are, None for all keys
        that the rows may see. heads: K/V heads that k and v hold; q holds the query heads of these.
        """
        ...


def causal(scale: float, backend: str = "auto") -> Attend:
    """Dense: every row sees all keys up to its own. scale: of the scores."""

    def attend(request, source, heads, q, k, v, positions_q, positions_k) -> State:
        return causal_attention(q, k, v, positions_q, positions_k, scale=scale, backend=backend)

    return attend


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
