"""What ran for each request, told by the server's process: one log line, totals, metrics, and records by id.

GET /sglang_mm/requests/{id}   the record of one request; `id` is the id of the response or of its stream chunks
GET /sglang_mm/status          totals since the start, and where `python -m sglang_mm.launch.monitor` can listen
"""

import logging
from collections import Counter, OrderedDict
from statistics import fmean

from sglang_mm.events import EventHub, Publisher
from sglang_mm.events.messages import RequestRecord
from sglang_mm.serving import metrics
from sglang_mm.serving.record import KEY

KEPT = 1024
RANKS_IN_FULL = 8
logger = logging.getLogger(__name__)
_records: OrderedDict[str, dict] = OrderedDict()
_totals: dict[str, Counter] = {name: Counter() for name in ("requests", "fallbacks", "ends", "tokens", "bytes_sent")}
_hub: EventHub | None = None
_publisher = Publisher(None)


def remember(result, manager, meta_info: dict, state, customized_info: dict, index: int, finish_reason):
    """After-hook on SGLang's TokenizerManager.update_request_meta_info, which runs with every chunk of a stream.

    A record counts once, when it arrives; a request is told once, when it ends, be it by an abort. Whatever goes wrong
    here is logged: it must not end the loop that serves all requests.
    """
    try:
        _remember(manager, meta_info, state, finish_reason)
    except Exception:
        logger.exception("what ran for request %r could not be told", meta_info.get("id"))
    return result


def _remember(manager, meta_info: dict, state, finish_reason: dict | None) -> None:
    found = [record for record in meta_info.get(KEY) or () if record]
    if not found:
        return  # it ended before its prefill did
    rid, record, seen = meta_info["id"], found[-1], getattr(state, "sglang_mm_seen", 0)
    state.sglang_mm_seen = len(found)
    if len(found) > seen:
        _records[rid] = record
        _records.move_to_end(rid)
        while len(_records) > KEPT:
            _records.popitem(last=False)
    if not state.obj.log_metrics:
        return  # SGLang's own health checks
    for position in range(seen, len(found)):  # a request that was retracted is prefilled again
        _count(found[position], first=position == 0)
        if manager.enable_metrics:
            metrics.observe(found[position], first=position == 0)
    if finish_reason:
        finish, answer = finish_reason.get("type", ""), meta_info.get("completion_tokens", 0)
        _totals["ends"][finish] += 1
        logger.info("%s; %d tokens answered, %s", line(rid, record), answer, finish)
        _publisher.emit(RequestRecord(request=rid, record=record, finish=finish, answer_tokens=answer))


def _count(record: dict, first: bool) -> None:
    if first:
        _totals["requests"][record["schedule"]] += 1
    _totals["fallbacks"].update(record.get("fallbacks", ()))
    counted = {"new": "new_tokens", "cached": "cached_tokens", "differing": "differing_tokens"}
    _totals["tokens"].update({name: record.get(key, 0) for name, key in counted.items()})
    batch, sent = record.get("batch", 1), record.get("bytes_sent", {})  # bytes are those of the whole batch
    _totals["bytes_sent"].update({kind: round(sum(each) / batch) for kind, each in sent.items()})


def line(rid: str, record: dict) -> str:
    """A record for people, in one line. Only schedule, ranks, new_tokens and cached_tokens must be in it.

    Stages are means over the ranks, so that they add up; the prefill took as long as its slowest rank.
    """
    tokens = ", ".join(f"{name} {count:,}" for name, count in record.get("tokens", {}).items() if count)
    parts = [
        f"request {rid if rid.isprintable() else repr(rid)}: {record['schedule']} on {record['ranks']} ranks",
        f"{record['new_tokens']:,} new tokens{f' ({tokens})' if tokens else ''}, {record['cached_tokens']:,} cached",
    ]
    if (way := record.get("cached_by", "none")) in ("keys", "queries"):
        parts[-1] += f" ({way} travelled)"
    if record.get("chunks", 1) > 1:
        parts.append(f"{record['chunks']} chunks")
    if record.get("batch", 1) > 1:
        parts.append(f"in a batch of {record['batch']}")
    if rows := record.get("rows_per_rank"):
        parts.append(f"rows per rank {_each(rows)}")
    if any(frames := record.get("frames_encoded") or []):
        parts.append(f"frames encoded per rank {_each(frames)}")
    if seconds := record.get("seconds"):
        stages = ", ".join(f"{name} {fmean(each):.3f}" for name, each in seconds.items() if each and name != "total")
        parts.append(f"prefill {max(seconds.get('total') or [0]):.3f} s ({stages})")
    if predicted := record.get("predicted_seconds"):
        parts.append("predicted " + ", ".join(f"{name} {value:.3f} s" for name, value in predicted.items()))
    if sparse := record.get("sparse"):
        parts.append(_sparse(sparse))
    if sent := record.get("bytes_sent"):
        sizes = [f"{kind} {_size(sum(each))}" for kind, each in sent.items() if sum(each)]
        parts.append(f"sent {', '.join(sizes) or 'nothing'}")
    if fallbacks := record.get("fallbacks"):
        parts.append(f"fell back: {', '.join(fallbacks)}")
    return "; ".join(parts)


def _sparse(sparse: dict) -> str:
    if "density" not in sparse:
        return f"dense: {sparse['dense']}"
    reasons = "".join(f", {count} x {reason}" for reason, count in sparse["fallbacks"].items())
    told = f"density {sparse['density']:.3f}, lowest recall {sparse['recall']:.3f}{reasons}"
    return f"sparse by {sparse['plan']} on {'+'.join(sparse['kernels']) or 'no kernel'}: {told}"


def _each(rows: list[int]) -> str:
    if len(rows) > RANKS_IN_FULL:
        return f"{min(rows):,} to {max(rows):,}"
    return " ".join(f"{count:,}" for count in rows)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024


def show(hub: EventHub) -> None:
    """Tell the ends of requests to this hub, and its address at /sglang_mm/status."""
    global _hub, _publisher
    _publisher.close(linger_s=0)
    _hub, _publisher = hub, Publisher(hub.ranks_address)


def hide(hub: EventHub) -> None:
    """Undo `show`, unless another hub has taken its place."""
    global _hub, _publisher
    if _hub is hub:
        _hub, _publisher = None, Publisher(None)


def status() -> dict:
    """Totals since the start of this process; `events`: a subscriber's address, or None without a hub; `ranks`: what
    the newest heartbeat of each told, and how many seconds ago."""
    told = {name: dict(counts) for name, counts in _totals.items()}
    hub = {"events": None, "events_malformed": 0, "ranks": []}
    if _hub is not None:
        hub = {"events": _hub.address, "events_malformed": _hub.malformed, "ranks": _ranks(_hub)}
    return {**told, **hub}


def _ranks(hub: EventHub) -> list[dict]:
    told = ((rank, beat, age_s) for rank, (beat, age_s) in sorted(hub.beats().items()))
    return [
        {
            "rank": rank,
            "node": beat.node,
            "pid": beat.pid,
            "stage": beat.stage,
            "layer": beat.layer,
            "silent_s": round(age_s, 1),
        }
        for rank, beat, age_s in told
    ]


def add_routes(app) -> None:
    """Add the two routes to SGLang's FastAPI app; SGLang's API key guards them like the others."""
    from fastapi import HTTPException

    @app.get("/sglang_mm/status")
    async def get_status():
        return status()

    @app.get("/sglang_mm/requests/{rid}")
    async def get_request(rid: str):
        if rid not in _records:
            raise HTTPException(404, f"no record of request {rid!r}; the last {KEPT} sampled requests are kept")
        return _records[rid]
