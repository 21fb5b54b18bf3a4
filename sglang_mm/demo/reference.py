"""A process of its own that answers the demo's question on one rank: SGLang, then transformers on the same input.

python -m sglang_mm.demo.reference JOB.json OUT.json, where JOB has model_path, prompt, video and new_tokens.
SGLang ends the whole process when one of its workers fails, hence the process.
"""

import json
import sys

from sglang_mm.demo import huggingface

TOP = 20  # log-probabilities compared at each output token


def answer(job: dict) -> dict:
    """Greedy tokens of both references, and the log-probabilities needed to compare a third run with them."""
    output, prompt = _single_rank_sglang(job)
    tokens, logprobs = huggingface.greedy(huggingface.load(job["model_path"]), prompt, job["new_tokens"])
    return {
        "prompt_tokens": len(prompt.input_ids),
        "stock_output_tokens": output["output_ids"],
        "stock_logprobs": top_logprobs(output),
        "hf_output_tokens": tokens,
        "hf_logprobs": logprobs.tolist(),
    }


def top_logprobs(output: dict) -> list[dict[str, float]]:
    """For each output token: {token id: log-probability} of the TOP likeliest."""
    rows = output["meta_info"]["output_top_logprobs"]
    return [{str(token): value for value, token, _ in row} for row in rows]


def largest_difference(mine: list[dict[str, float]], stock: list[dict[str, float]], hf: list[list[float]]) -> float:
    """Largest |difference| of a log-probability, over my TOP tokens at every output token, against both references.

    Infinite when single-rank SGLang lists other tokens: two of TOP may change places with the next ones, not more.
    """
    if not len(mine) == len(stock) == len(hf):
        return float("inf")
    largest = 0.0
    for row, stock_row, hf_row in zip(mine, stock, hf):
        common = row.keys() & stock_row.keys()
        if len(common) < len(row) - 2:
            return float("inf")
        largest = max(largest, *(abs(row[token] - stock_row[token]) for token in common))
        largest = max(largest, *(abs(value - hf_row[int(token)]) for token, value in row.items()))
    return largest


def _single_rank_sglang(job: dict) -> tuple[dict, huggingface.Prompt]:
    from sglang_mm import Engine

    engine = Engine(model_path=job["model_path"], cp=1)
    try:
        processor, seen = engine.tokenizer_manager.mm_processor, []
        process = processor.process_mm_data_async

        async def remember(*args, **kwargs):
            prepared = await process(*args, **kwargs)
            seen.append(huggingface.prompt_of(prepared))
            return prepared

        processor.process_mm_data_async = remember
        output = engine.generate(
            job["prompt"],
            {"temperature": 0, "max_new_tokens": job["new_tokens"], "ignore_eos": True},
            video_data=[job["video"]],
            return_logprob=True,
            top_logprobs_num=TOP,
        )
    finally:
        engine.shutdown()
    return output, seen[0]


if __name__ == "__main__":
    with open(sys.argv[1]) as job_file:
        answered = answer(json.load(job_file))
    with open(sys.argv[2], "w") as out_file:
        json.dump(answered, out_file)
