"""Whether one request is to be sparse: what the server does, unless the request asks for dense attention."""

from sglang_mm.config import Config
from sglang_mm.serving.media_access import RequestError
from sglang_mm.serving.sparse_method import KEY, cache_key, is_sparse

PARAMETER = "sparse"  # of a request's custom_params
OFF, ON = "off", "on"
_key: str | None = None  # of this process's engine; see sparse_method.cache_key


def serve(config: Config) -> None:
    """What this process's requests are to be from now on."""
    global _key
    _key = cache_key(config)


def mark_sparse(manager, obj) -> None:
    """Put our part into the prefix-cache key of SGLang's GenerateReqInput, of one request; ranks read it there too.

    So what is cached and how it is computed cannot differ. Raises RequestError for a wrong value of the parameter, and
    for a key of the client's that looks like ours.
    """
    params = getattr(obj, "sampling_params", None)
    if not isinstance(params, dict):  # a request for embeddings
        return
    asked, key = _asked({**(manager.preferred_sampling_params or {}), **params}), _key
    given = obj.extra_key or None  # a list only for requests that SGLang has not split yet
    if asked == ON and key is None:
        raise RequestError(f"{PARAMETER} {ON!r} of a server that was started with --sparse off", OFF, "leave it out")
    if given and KEY in given and not is_sparse(given, key):
        raise RequestError(f"extra_key {given!r}", f"a key without {KEY!r}", "choose another one")
    if key is not None and asked != OFF and not is_sparse(given, key):
        obj.extra_key = f"{given}|{key}" if given else key


def _asked(params: dict) -> str | None:
    custom = params.get("custom_params")
    value = custom.get(PARAMETER) if isinstance(custom, dict) else None
    if isinstance(value, bool):  # YAML and some clients write off and on so
        return ON if value else OFF
    if value not in (None, OFF, ON):
        raise RequestError(f"{PARAMETER} {value!r} in custom_params", f"{OFF!r} | {ON!r}", "leave it out")
    return value
