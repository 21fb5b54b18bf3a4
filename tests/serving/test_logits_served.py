"""Log-probabilities of prompts in a batch of unequal requests: what C ranks say is what one rank says, in its lists."""

import pytest

from tests.serving import compare
from tests.serving.test_values import SHARDED

NAME = "unequal scores"
TABLES = ("input_top_logprobs", "input_token_ids_logprobs")


@pytest.fixture(params=SHARDED, ids=lambda t: f"tp{t[0]}-cp{t[1]}-{t[2]}")
def pairs(answers, request) -> list[tuple[dict, dict]]:
    """meta_info of each request of the batch, from C ranks and from one."""
    batches = answers(*request.param)[NAME], answers(1, 1)[NAME]
    assert all(compare.record_of(answer)["batch"] == 5 for answer in batches[0])
    return [(mine["meta_info"], single["meta_info"]) for mine, single in zip(*batches, strict=True)]


def test_the_batch_is_sharded_and_asks_unequally(pairs):
    """What the other tests compare is there: per request, rows with next, likeliest and given tokens."""
    assert all(record["schedule"] != "stock" for mine, _ in pairs for record in mine["sglang_mm"] if record)
    lengths = [[len(mine.get(key) or []) for key in ("input_token_logprobs", *TABLES)] for mine, _ in pairs]
    assert lengths == [[695, 695, 695], [36, 36, 0], [0, 0, 0], [0, 0, 0], [1, 0, 1]]


def test_next_tokens(pairs):
    for mine, single in pairs:
        rows = zip(mine.get("input_token_logprobs") or [], single.get("input_token_logprobs") or [], strict=True)
        assert all(a[1] == b[1] and same(a[0], b[0]) for a, b in rows)


@pytest.mark.parametrize("key", TABLES)
def test_likeliest_and_given_tokens(pairs, key):
    for mine, single in pairs:
        for own, other in zip(mine.get(key) or [], single.get(key) or [], strict=True):
            assert (own is None) == (other is None) and len(own or []) == len(other or [])
            values = [{token: value for value, token, _ in row or []} for row in (own, other)]
            common = values[0].keys() & values[1].keys()
            assert len(common) >= len(values[0]) - 1, "the least likely one may be tied"
            assert all(same(values[0][token], values[1][token]) for token in common)


def same(a: float | None, b: float | None) -> bool:
    return a is b is None or abs(a - b) <= compare.TOLERANCE
