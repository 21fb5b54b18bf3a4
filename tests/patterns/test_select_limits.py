"""Where numbers end: a theta of 1, scores that are infinite or none, and arguments that cannot be."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import auto_select, select
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.patterns.select.recall import rounding
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import hold
from tests.patterns.planted import Noise, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(40, 4, 6), Text(30))
NOT_A_NUMBER = "dense: recall is not a number"
ALL_KEYS = [((head,), NoBoundary(AShape(8, 4096))) for head in range(8)]
EVERYTHING = Shard(TOKENS, torch.arange(len(TOKENS)))


def keep_all(q, k, rows, keys, peers):
    return select(ALL_KEYS, q, k, rows, keys, scale=1.0, theta=1.0, peers=peers)[1]


@pytest.mark.parametrize("ranks", range(1, 9))
def test_theta_1_keeps_what_loses_nothing_on_any_number_of_ranks(ranks):
    q, k = plant(TOKENS, [Noise()] * 8, noise=3.0)
    shards = random_shards(len(TOKENS), ranks, seed=ranks)
    for report in spread(keep_all, q, k, TOKENS, shards):
        assert all(verdict.is_sparse and abs(verdict.recall - 1) < 1e-5 for verdict in report.verdicts)


def test_theta_1_refuses_what_loses_a_little():
    """Every probe row loses key 100, and up to 63 more that have no mass: 1e-3, or 1e-4 with a smaller score."""
    for score, lost in ((0.0, 1e-3), (-2.0, 1.4e-4)):
        q, k = torch.ones(len(TOKENS), 1, 1), torch.zeros(len(TOKENS), 1, 1)
        k[100], k[101:164] = score, -50.0
        keep = AShape(100, len(TOKENS) - 164)
        _, report = select([((0,), NoBoundary(keep))], q, k, EVERYTHING, EVERYTHING, scale=1.0, theta=1.0)
        trial = report.verdicts[0].trials[0]
        assert 1 - trial.recall == pytest.approx(lost, rel=0.1) and report.verdicts[0].kept != trial.patterns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_allowance_grows_with_the_scores_and_the_dtypes_eps(dtype):
    eps = torch.finfo(dtype).eps
    for score, largest in ((0.0, 7.0), (100.0, 107.0)):
        q, k = torch.ones(len(TOKENS), 1, 1, dtype=dtype), torch.full((len(TOKENS), 1, 1), score, dtype=dtype)
        probe = take_probe(hold(q, k, TOKENS), None, [(0,)])
        assert rounding(probe, (0,)) == pytest.approx(32 * eps * largest, rel=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [5, 700, 1029])
def test_scores_that_are_no_numbers_are_dense_for_a_reason_of_their_own(value, at):
    """Also where the pattern does not show that key, so that its own sum would be finite."""
    q, k = plant(TOKENS, [Noise()] * 2, noise=1.0)
    q = q.abs() + 0.1
    k[at, 1] = value
    plans = [((head,), NoBoundary(AShape(8, 64))) for head in range(2)]
    _, planned = select(plans, q, k, EVERYTHING, EVERYTHING, scale=1.0, theta=1e-9)
    _, auto = auto_select([(0,), (1,)], 2, q, k, EVERYTHING, EVERYTHING, scale=1.0, theta=1e-9)
    for report in (planned, auto):
        assert {verdict.heads for verdict in report.verdicts if verdict.reason == NOT_A_NUMBER} == {(1,)}
    assert planned.verdicts[1].kept == ((None, Dense()),) and len(planned.verdicts[1].trials) == 1


def test_a_key_that_is_hidden_by_its_score_is_not_seen():
    """A score of minus infinity is a mass of 0."""
    q, k = plant(TOKENS, [Noise()], noise=1.0)
    q = q.abs() + 0.1
    k[700] = -float("inf")
    _, report = select([((0,), NoBoundary(AShape(8, 64)))], q, k, EVERYTHING, EVERYTHING, scale=1.0, theta=1e-9)
    assert report.verdicts[0].is_sparse


@pytest.mark.parametrize(
    "units, message",
    [
        ([], "one unit or more"),
        ([()], "a unit of heads"),
        ([(0,), ()], "a unit of heads"),
        ([(0, 2)], "heads of one group of 2"),
        ([(0,), (0,)], "at most once"),
        ([(0, 0)], "at most once"),
        ([(-1,)], "0 .. 3"),
        ([(4,)], "0 .. 3"),
    ],
)
def test_units_that_cannot_be_are_refused_though_none_is_probed(units, message):
    q, k = torch.zeros(len(TOKENS), 4, 2), torch.zeros(len(TOKENS), 2, 2)
    with pytest.raises(ConfigError, match=message):
        select([(heads, QBoundary()) for heads in units], q, k, EVERYTHING, EVERYTHING, scale=1.0)
    with pytest.raises(ConfigError, match=message):
        auto_select(units, 0, q, k, EVERYTHING, EVERYTHING, scale=1.0)


@pytest.mark.parametrize(
    "q_heads, kv_heads, dim, dtype, message",
    [
        (2, 0, 4, torch.float32, "H and G and D at least 1"),
        (0, 2, 4, torch.float32, "H and G and D at least 1"),
        (2, 2, 0, torch.float32, "H and G and D at least 1"),
        (3, 2, 4, torch.float32, "H a multiple of G"),
        (2, 2, 4, torch.int8, "before they are quantised"),
        (2, 2, 4, torch.float8_e4m3fn, "before they are quantised"),
    ],
)
def test_tensors_that_cannot_be_are_refused(q_heads, kv_heads, dim, dtype, message):
    q, k = (torch.zeros(len(TOKENS), heads, dim).to(dtype) for heads in (q_heads, kv_heads))
    with pytest.raises(ConfigError, match=message):
        select([((0,), NoBoundary(Blocks()))], q, k, EVERYTHING, EVERYTHING, scale=1.0)
