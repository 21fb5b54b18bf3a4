"""Records of the last requests, for clients that cannot see meta info (OpenAI streams carry none of it).

GET /sglang_mm/requests/{id}   the record of one request; `id` is the id of the response or of its stream chunks
GET /sglang_mm/status          totals since the start: requests by schedule, fallbacks by reason
"""

from collections import Counter, OrderedDict

from sglang_mm.serving.record import KEY

KEPT = 1024
_records: OrderedDict[str, dict] = OrderedDict()
_schedules: Counter = Counter()
_fallbacks: Counter = Counter()


def remember(result, manager, meta_info: dict, state, customized_info: dict, index: int, finish_reason):
    """After-hook on SGLang's TokenizerManager.update_request_meta_info: keep what this response's meta info says."""
    found = [record for record in meta_info.get(KEY) or () if record]
    if found and not getattr(state, "sglang_mm_seen", False):  # once per request, however many chunks it streams
        state.sglang_mm_seen = True
        _records[meta_info["id"]] = found[-1]
        _records.move_to_end(meta_info["id"])
        _schedules[found[-1]["schedule"]] += 1
        _fallbacks.update(found[-1]["fallbacks"])
        while len(_records) > KEPT:
            _records.popitem(last=False)
    return result


def status() -> dict:
    """Totals since the start of this process."""
    return {"requests": dict(_schedules), "fallbacks": dict(_fallbacks)}


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
