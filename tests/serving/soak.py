"""A mixed load: many requests at once, of all kinds and lengths, some of them aborted. The same for every engine."""

import asyncio
import json
import random
from dataclasses import dataclass

from tests.serving.cases import TOP, Case

DEADLINE_S = 150
NEW_TOKENS = 4
PROMPTS = {  # kind: (share of the load, shortest, longest text)
    "short text": (20, 5, 200),
    "text": (25, 300, 700),
    "long text": (5, 1200, 2400),
    "one image": (10, 5, 100),
    "three images": (10, 5, 100),
    "one video": (25, 5, 400),
}
SAMPLING = [
    {"max_new_tokens": NEW_TOKENS, "ignore_eos": True},
    {"max_new_tokens": NEW_TOKENS, "ignore_eos": True},
    {"max_new_tokens": 1},
    {"max_new_tokens": 12, "stop": ["a", "Q"]},
    {"max_new_tokens": 12, "regex": "[0-9]{2,4}-[a-f]{2}"},
]


@dataclass(frozen=True)
class Load:
    """One request. at: seconds after the start. abort_after: seconds from there, or None."""

    name: str
    at: float
    request: dict
    abort_after: float | None


def build(prompts: list[Case], count: int, seed: int = 11) -> list[Load]:
    rng = random.Random(seed)
    media = {case.name: case.request for case in prompts}
    kinds, weights = list(PROMPTS), [share for share, _, _ in PROMPTS.values()]
    drawn = rng.choices(kinds, weights, k=count)
    loads = []
    for i, kind in enumerate(drawn):
        request = _request(kind, media.get(kind if kind != "text" else ""), rng)
        abort_after = rng.uniform(0, 0.5) if rng.random() < 0.12 else None
        loads.append(Load(f"{i} {kind}", i * 0.02 + rng.uniform(0, 0.3), request, abort_after))
    return loads


def _request(kind: str, shown: dict | None, rng: random.Random) -> dict:
    """Text before media makes a prompt that no cache knows; text behind it, a second question about cached media."""
    _, shortest, longest = PROMPTS[kind]
    text = [rng.randint(97, 122) for _ in range(rng.randint(shortest, longest))]
    request = {"sampling_params": {"temperature": 0, **rng.choice(SAMPLING)}, "return_logprob": True}
    request["top_logprobs_num"] = TOP
    if shown is None:
        request["input_ids"] = text
    else:
        first = rng.random() < 0.5
        request |= {**shown, "input_ids": [*text, *shown["input_ids"]] if first else [*shown["input_ids"], *text]}
    if rng.random() < 0.2:
        request["logprob_start_len"] = rng.randrange(len(request["input_ids"]))
    return request


def run(engine, prompts: list[Case], count: int) -> dict:
    """Everything at its time; per name what came back, and before and after it what each rank holds."""
    loads = build(prompts, count)
    loop = engine.loop
    states = [ranks_state(engine)]
    told = {}
    for half in (loads[: count // 2], loads[count // 2 :]):
        told |= loop.run_until_complete(asyncio.wait_for(_all(engine, half), DEADLINE_S))
        states.append(ranks_state(engine))
    return {"answers": told, "states": states}


def ranks_state(engine) -> list[dict]:
    """What observed.py tells of every rank, once the engine is idle."""
    return engine.rank_states()


async def _all(engine, loads: list[Load]) -> dict:
    start = min(load.at for load in loads)
    answers = await asyncio.gather(*(_one(engine, load, load.at - start) for load in loads))
    return dict(zip((load.name for load in loads), answers))


async def _one(engine, load: Load, wait_s: float) -> dict:
    await asyncio.sleep(wait_s)
    rid = f"soak {load.name} {json.dumps(load.at)}"
    if load.abort_after is not None:
        asyncio.get_running_loop().call_later(load.abort_after, engine.tokenizer_manager.abort_request, rid)
    try:
        answer = await engine.async_generate(**load.request, rid=rid)
    except ValueError as error:  # SGLang's way of telling that a request was aborted while its grammar was compiled
        if load.abort_after is None or "Aborted" not in str(error):
            raise
        answer = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}
    kept = ("output_top_logprobs", "input_top_logprobs", "finish_reason", "sglang_mm", "cached_tokens")
    meta = {key: answer["meta_info"].get(key) for key in kept}
    return {"output_ids": answer["output_ids"], "meta_info": meta}
