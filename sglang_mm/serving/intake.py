"""What a request may ask, checked in the server's own process: a rank that raises takes the server down with it.

SGLang calls these three, in this order, for every request that comes over HTTP or through an Engine. What they raise is
a ValueError, which SGLang answers with status 400, and nothing has reached a rank by then.
"""

import re

from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import SessionParams

from sglang_mm.serving.media_access import RequestError, resolve
from sglang_mm.serving.prompt_limit import PromptLimit
from sglang_mm.serving.sparse_request import mark_sparse
from sglang_mm.serving.storing import LEASE

MAX_SAMPLES = 1024  # `n`: SGLang copies the whole request so often before it looks at it
LARGEST_BIAS = 1e30  # a bias of every token by -1e38 leaves no token to sample
KINDS = ("image", "video", "audio")


def admit_fields(normalize, obj):
    """Around-hook on GenerateReqInput.normalize_batch_and_arguments: fields that are wrong for any prompt."""
    for params in _all(obj.sampling_params):
        _check_sampling(params)
    _within("logprob_start_len", obj.logprob_start_len, -1, None, "-1 scores the answer alone, 0 the whole prompt too")
    _within("top_logprobs_num", obj.top_logprobs_num, 0, None, "0 asks for none")
    overrides = _all(obj.positional_embed_overrides)
    if not all(found is None or isinstance(found, PositionalEmbeds) for found in overrides):
        raise RequestError(
            "positional_embed_overrides over HTTP", "SGLang's PositionalEmbeds, in Python", "use sglang_mm.Engine"
        )
    fields = SessionParams.__struct_fields__
    if isinstance(obj.session_params, dict) and (unknown := set(obj.session_params).difference(fields)):
        raise RequestError(f"session_params with {', '.join(sorted(unknown))}", ", ".join(fields), "leave it out")
    return normalize(obj)


def admit_media(check_limits, manager, obj):
    """Around-hook on TokenizerManager._validate_mm_limits: which names of media may be read, before any is loaded."""
    check_limits(manager, obj)
    for kind in KINDS:
        media = getattr(obj, f"{kind}_data", None)
        if media:
            setattr(obj, f"{kind}_data", [resolve(medium, kind) for medium in media])
    manager.mm_processor.prompt_limit = PromptLimit.of(manager)  # ours refuses what is too long before decoding it


def admit_prompt(validate, manager, obj, input_ids):
    """Around-hook on TokenizerManager._validate_one_request: the ids a rank would get, media expanded."""
    try:
        _check_prompt(manager, obj, input_ids)
        mark_sparse(manager, obj)
        return validate(manager, obj, input_ids)
    except Exception:
        if (lease := getattr(obj, LEASE, None)) is not None:
            lease.discard()  # its pixels are stored already, and no rank has heard of them
        raise


def _check_prompt(manager, obj, input_ids) -> None:
    ids = input_ids if input_ids is not None else []
    if not len(ids) and obj.input_embeds is None and not (getattr(obj, "session_params", None) or {}).get("id"):
        raise RequestError("a prompt of no tokens", "at least one token", "send text, or input_ids")
    limit, with_media = PromptLimit.of(manager), obj.contains_mm_input()
    if limit and not (manager.allow_auto_truncate and not with_media):  # cutting media off would leave none whole
        limit.check(len(ids), f"a prompt of {len(ids):,} tokens" + (", media included" if with_media else ""))
    vocabulary = manager.model_config.vocab_size
    if with_media and not hasattr(manager.mm_processor, "marker_ids"):  # some models have markers beyond it
        vocabulary = max(vocabulary, *ids, 0) + 1
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocabulary):
        wrong = next(token for token in ids if not 0 <= token < vocabulary)
        raise RequestError(f"input_ids with {wrong}", f"0 to {vocabulary - 1}", "tokenize with the model's tokenizer")
    if not with_media:
        _check_no_markers(manager, ids)
    elif manager.mm_processor is None:
        raise RequestError("media for a model that takes text", "text", "serve a model that reads them")
    _within(
        "top_logprobs_num", getattr(obj, "top_logprobs_num", None), 0, manager.model_config.vocab_size, "ask for fewer"
    )
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        _within(name, getattr(obj, name, None), 0, len(ids) - 1, "name places of the prompt")


def _check_no_markers(manager, ids) -> None:
    for kind, token in getattr(manager.mm_processor, "marker_ids", {}).items():
        if token in ids:
            raise RequestError(
                f"a prompt with {kind} markers and no {kind}", f"a marker for each {kind}, and no other",
                f"send the {kind}, or take the marker out of the text"
            )  # fmt: skip


def _check_sampling(params) -> None:
    if not isinstance(params, dict):
        return
    _within(
        "n", params.get("n"), 1, MAX_SAMPLES, "leave it out for one answer; for more than that, send the request again"
    )
    for pattern in _all(params.get("stop_regex")):
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise RequestError(f"stop_regex {pattern!r} ({error})", "a regular expression", "correct it") from None
    bias = params.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise RequestError(f"logit_bias {bias!r}", "an object, token id to bias", 'as {"42": -100}')
    _within("logit_bias", list(bias.values()), -LARGEST_BIAS, LARGEST_BIAS, "-100 bans a token, 100 forces it")


def _within(name: str, value, low, high, remedy: str) -> None:
    """Raise RequestError unless every number in `value`, however nested, lies in [low, high]; None stands for open."""
    for number in _all(value):
        if isinstance(number, list):
            _within(name, number, low, high, remedy)
        elif number is not None and not (
            isinstance(number, int | float) and low <= number and (high is None or number <= high)
        ):
            allowed = f"{low} to {high}" if high is not None else f"{low} or more"
            raise RequestError(f"{name} {number}", allowed, remedy)


def _all(value) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
