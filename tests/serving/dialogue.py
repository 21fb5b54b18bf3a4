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


def long_answers(engine, requests: list[dict], tokens: int, temperature: float = 1.0) -> list[dict]:
    """Answers of so many tokens, all decoded in one batch, if there is room; with the two likeliest tokens."""
    drawn = {"temperature": temperature, "max_new_tokens": tokens, "ignore_eos": True}
    asked = {"sampling_params": drawn, "return_logprob": True, "top_logprobs_num": 2}

    async def ask() -> list[dict]:
        answers = (engine.async_generate(**request, **asked) for request in requests)
        return await asyncio.wait_for(asyncio.gather(*answers), DEADLINE_S)

    return engine.loop.run_until_complete(ask())


def scored_answer(engine, request: dict, answer: dict) -> dict:
    """Another engine's answer as a prompt: what this engine thinks of each of its tokens, by prefill alone."""
    whole = {**request, "input_ids": request["input_ids"] + answer["output_ids"]}
    first = answer["meta_info"]["prompt_tokens"] - 1
    scores = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": first}
    return engine.generate(**whole, sampling_params={"temperature": 0, "max_new_tokens": 1}, **scores)


def aborted(engine, request: dict, after_s: float) -> dict:
    """Abort a request `after_s` seconds after it was sent; how it ended, and what each rank holds afterwards."""

    async def ask() -> dict:
        loop = asyncio.get_running_loop()
        loop.call_later(after_s, engine.tokenizer_manager.abort_request, "to be aborted")
        return await asyncio.wait_for(engine.async_generate(**request, rid="to be aborted"), DEADLINE_S)

    answer = engine.loop.run_until_complete(ask())
    return {"finish_reason": answer["meta_info"]["finish_reason"], "states": engine.rank_states()}
