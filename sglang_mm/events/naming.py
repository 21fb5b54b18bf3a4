"""One door for a rank that fails with an exception: the hub is told, and the error names the rank that is the cause.

gloo and NCCL name a neighbour at best: the one whose connection closed, or whose message did not come.
"""

import re
from collections import Counter

from sglang_mm.errors import RankMismatch, RingBroken
from sglang_mm.events.asking import ask
from sglang_mm.events.messages import Fault, Verdict
from sglang_mm.events.vitals import Vitals, vitals
from sglang_mm.events.wire import ASK_WITHIN_S, LONGEST_REASON

DIGEST = re.compile(r"rank (\d+): (0x[0-9a-f]+)")
CUT = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|nccl|remote process exited|"
    r"socket (closed|timeout)|process group.*(abort|destroy)",
    re.IGNORECASE,
)
_NAMED = "named_by_hub"


def named(error: Exception, within_s: float = ASK_WITHIN_S, who: Vitals = vitals) -> Exception:
    """What this rank should raise for `error`, after at most within_s; the hub has heard of it then.

    A RingBroken becomes one that names the cause, the same on all ranks that ask; a RankMismatch names the odd one out
    where there is a majority; any other error comes back itself, with a note where another rank is the cause. Without
    a hub: `error`, with the layer that it lacks. Never raises.
    """
    if getattr(error, _NAMED, False):
        return error
    fault = fault_of(error, who)
    verdict = ask(fault, within_s, who.address)
    told = _told(error, fault, verdict)
    setattr(told, _NAMED, True)
    return told


def fault_of(error: Exception, who: Vitals = vitals) -> Fault:
    """`error` as this rank tells it."""
    text = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    reason = f"{type(error).__name__}: {text}"[:LONGEST_REASON]
    at = {"rank": who.rank, "node": who.node, "layer": who.layer, "stage": who.stage, "reason": reason}
    if isinstance(error, RingBroken):
        waited = max(0.0, error.waited_s)
        return Fault(what="waited", blames=error.rank, silent=list(error.silent), waited_s=waited, **at)
    if isinstance(error, RankMismatch):
        return Fault(what="differ", blames=odd_one_out(str(error)), **at)
    if _is_torn(error):
        return Fault(what="cut", **at)
    return Fault(what="own", **at)


def odd_one_out(text: str) -> int | None:
    """The one rank whose number in a RankMismatch differs from what more than half of the ranks hold."""
    numbers = {int(rank): value for rank, value in DIGEST.findall(text)}
    if not numbers:
        return None
    common, times = Counter(numbers.values()).most_common(1)[0]
    odd = [rank for rank, value in numbers.items() if value != common]
    return odd[0] if len(odd) == 1 and 2 * times > len(numbers) else None


def _is_torn(error: Exception) -> bool:
    """Whether it is what a collective says when another rank has gone, in the words of gloo and NCCL."""
    of_network = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return of_network or (type(error) is RuntimeError and CUT.search(str(error)) is not None)


def _told(error: Exception, fault: Fault, verdict: Verdict | None) -> Exception:
    if isinstance(error, RingBroken):
        return _renamed(error, fault, verdict)
    if verdict is None or verdict.rank is None:
        return error
    if isinstance(error, RankMismatch) and verdict.what == "differ":
        return RankMismatch(f"{error} Rank {verdict.rank} is the one that differs from the others.")
    if verdict.rank != fault.rank:
        error.add_note(f"sglang_mm: the cause is {verdict}")
    return error


def _renamed(error: RingBroken, fault: Fault, verdict: Verdict | None) -> RingBroken:
    if verdict is None or verdict.rank is None:
        layer = fault.layer if error.layer is None and fault.layer >= 0 else error.layer
        cause = verdict.reason if verdict else error.cause
        told = RingBroken(error.rank, error.stage, error.waited_s, cause, layer, error.silent)
    else:
        layer = verdict.layer if verdict.layer >= 0 else None
        where = ", ".join(filter(None, (verdict.stage and f"stage {verdict.stage}", verdict.node)))
        cause = f"{verdict.reason}{f' ({where})' if where else ''}"
        told = RingBroken(verdict.rank, error.stage, error.waited_s, cause, layer, error.silent)
    told.__cause__ = error.__cause__
    return told
