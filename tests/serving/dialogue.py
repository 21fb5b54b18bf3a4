"""What one call of generate cannot ask; each function runs in the engine's process."""

import asyncio

from tests.serving.cases import SAMPLING, TOP

DEADLINE_S = 60


def streamed(engine, request: dict) -> dict:
    """The answer as it arrives: how many pieces, and the last one, which SGLang's engine makes of all before."""
    pieces = list(engine.generate(**request, stream=True))
    return {"pieces": [piece["output_ids"] for piece in pieces], **pieces[-1]}


def sampled_then_scored(engine, request: dict) -> dict:
    """Draw an answer at temperature 1, then let prefill score it, and ask on from it.

    Ranks that had drawn different tokens would differ in what they find in their caches, which ends the prefill.
    """
    drawn = {**SAMPLING, "temperature": 1.0}
    answer = engine.generate(**request, sampling_params=drawn, return_logprob=True)
    whole = {**request, "input_ids": request["input_ids"] + answer["output_ids"]}
    one_token = {**SAMPLING, "max_new_tokens": 1}
    start = len(request["input_ids"]) - 1
    scored = engine.generate(**whole, sampling_params=one_token, return_logprob=True, logprob_start_len=start)
    further = {**whole, "input_ids": whole["input_ids"] + list(range(97, 117)) * 40}
    asked = engine.generate(**further, sampling_params=SAMPLING, return_logprob=True, top_logprobs_num=TOP)
    n = len(answer["output_ids"])
    return {
        "drawn": [value for value, *_ in answer["meta_info"]["output_token_logprobs"]],
        "scored": [value for value, *_ in scored["meta_info"]["input_token_logprobs"][-n:]],
        "asked": asked,
    }


def aborted(engine, request: dict, after_s: float) -> dict:
    """Abort a request `after_s` seconds after it was sent; how it ended, and what each rank holds afterwards."""

    async def ask() -> dict:
        loop = asyncio.get_running_loop()
        loop.call_later(after_s, engine.tokenizer_manager.abort_request, "to be aborted")
        return await asyncio.wait_for(engine.async_generate(**request, rid="to be aborted"), DEADLINE_S)

    answer = engine.loop.run_until_complete(ask())
    engine.get_server_info()
    return {"finish_reason": answer["meta_info"]["finish_reason"], "states": engine.rank_states()}
