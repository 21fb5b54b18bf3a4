"""How answers are compared: the 20 likeliest tokens at every output token, and the tokens themselves."""

from tests.serving.cases import NEW_TOKENS, TOP

TOLERANCE = 1e-4  # of a log-probability, fp32; the difference of two orders of summation is about 3e-6 here


def rows_of(output: dict, key: str = "output_top_logprobs") -> list[dict[int, float]]:
    """{token id: log-probability} for each output token (or, by key, each input token that has one)."""
    return [{token: value for value, token, _ in row} for row in output["meta_info"][key] if row]


def largest_difference(mine: dict, other: dict, key: str = "output_top_logprobs") -> float:
    """Over the tokens that both runs list; runs that agree within the tolerance list the same but for ties."""
    pairs = list(zip(rows_of(mine, key), rows_of(other, key), strict=True))
    assert all(len(a.keys() & b.keys()) >= TOP - 2 for a, b in pairs), "the likeliest tokens differ"
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())


def difference_to_huggingface(mine: dict, tokens: list[int], logprobs) -> float:
    """logprobs [NEW_TOKENS, vocabulary]: transformers' own, along its own greedy tokens."""
    assert mine["output_ids"] == tokens
    rows = rows_of(mine)
    assert len(rows) == NEW_TOKENS
    return max(abs(value - float(logprobs[i, token])) for i, row in enumerate(rows) for token, value in row.items())


def record_of(output: dict) -> dict:
    (record,) = [found for found in output["meta_info"]["sglang_mm"] if found]
    return record


def same_answer(mine: dict, single: dict) -> float:
    """The largest difference up to the end, or to a token at which the two likeliest are tied; asserts the tokens.

    For load tests: batches form as requests happen to arrive, and each adds up in its own order.
    """
    pairs = zip(rows_of(mine), rows_of(single))
    largest = 0.0
    for i, (a, b) in enumerate(pairs):
        largest = max(largest, *(abs(a[token] - b[token]) for token in a.keys() & b.keys()))
        if mine["output_ids"][i] != single["output_ids"][i]:
            first, second = sorted(b.values(), reverse=True)[:2]
            assert first - second <= TOLERANCE, f"token {i}: {mine['output_ids']}, single rank {single['output_ids']}"
            return largest
    assert mine["output_ids"] == single["output_ids"]
    return largest


def scores_of(output: dict) -> list[float]:
    """Log-probabilities of the prompt that were asked for: of its tokens, of the likeliest, of given ones."""
    meta, scores = output["meta_info"], []
    for key in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
        rows = meta.get(key) or []
        flat = rows if key == "input_token_logprobs" else [entry for row in rows if row for entry in row]
        scores += [value for value, *_ in flat if value is not None]
    return scores
