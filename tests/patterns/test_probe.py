"""The probe: which rows, gathered from whichever ranks hold them; their log-sum-exp without any rows x keys table."""

from functools import partial

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.probe import SCORES, score_tiles
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.held import Held, make_slots
from sglang_mm.patterns.select.peers import Alone
from sglang_mm.patterns.select.probe import probe_range, take_probe
from sglang_mm.types import Modality, Run
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import hold, layout_shards, probabilities, scores
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
VIDEO = token_map(Text(30), Media(9, 4, 6), Text(20), Media(1, 5, 5), Text(41))  # 332 tokens: 30, 216, 20, 25, 41
RUNS = [Run(0, 30), Run(30, 216, 9, "video"), Run(246, 86)]


def random(tokens=VIDEO, heads=6, group=3, dim=16, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(len(tokens), n, dim, generator=draw, dtype=torch.float64) for n in (heads, heads // group))
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize(
    "modality, rows",
    [
        (Modality.VIDEO, range(182, 246)),
        (Modality.IMAGE, range(266, 291)),  # the whole image: it is shorter than 64
        (Modality.TEXT, range(291, 332)),  # the last span alone, although there is text before
        (None, range(268, 332)),
    ],
)
def test_the_last_64_rows_of_a_modalitys_last_span(modality, rows):
    assert probe_range(VIDEO, modality, range(332)) == rows


@pytest.mark.parametrize(
    "modality, chunk, rows",
    [
        (Modality.VIDEO, range(100, 150), range(100, 150)),
        (Modality.VIDEO, range(100, 200), range(136, 200)),
        (Modality.VIDEO, range(240, 300), range(240, 246)),
        (Modality.TEXT, range(20, 100), range(20, 30)),
        (None, range(20, 100), range(36, 100)),
        (None, range(90, 100), range(90, 100)),
        (Modality.IMAGE, range(100, 200), range(0)),
    ],
)
def test_a_chunk_has_a_probe_of_its_own(modality, chunk, rows):
    assert probe_range(VIDEO, modality, chunk) == rows


def take_for(modality, units, q, k, rows, keys, peers):
    return take_probe(Held(q, k, rows, keys, 0.3, peers, range(len(VIDEO))), modality, units)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("layout", ["zigzag", "random", "keys elsewhere"])
def test_queries_and_lse_on_every_rank(ranks, layout):
    q, k = random()
    rows = layout_shards(RUNS, ranks) if layout == "zigzag" else random_shards(len(VIDEO), ranks, seed=ranks)
    keys = random_shards(len(VIDEO), ranks, seed=99) if layout == "keys elsewhere" else rows
    units = [(0,), (1, 2), (4,)]  # heads 3 and 5 are not asked for
    probes = spread(partial(take_for, Modality.VIDEO, units), q, k, VIDEO, rows, keys)
    expected = torch.logsumexp(scores(q, k, range(182, 246), 0.3), dim=-1)
    for probe in probes:
        assert torch.equal(probe.q_RHD, q[182:246])
        torch.testing.assert_close(probe.lse_HR[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], rtol=0, atol=1e-12)
        assert probe.lse_HR[[3, 5]].isnan().all()
        assert torch.equal(probe.lse_HR[[0, 1, 2, 4]], probes[0].lse_HR[[0, 1, 2, 4]])  # the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_fp32_for_short_floats(dtype):
    """Products of values that are exact in fp32, in fp32: D rounding errors of 2^-24 of the largest score."""
    q, k = random(dtype=dtype)
    probe = take_probe(hold(q, k, VIDEO, 0.3), Modality.VIDEO, [(0,), (5,)])
    table = scores(q, k, probe.rows, 0.3)
    largest = table.masked_fill(table.isinf(), 0).abs().max()
    allowed = 2**-24 * (16 * float(largest) + 10)
    assert probe.lse_HR.dtype == torch.float32
    expected = torch.logsumexp(table, dim=-1)[[0, 5]]
    assert float((probe.lse_HR[[0, 5]].double() - expected).abs().max()) <= allowed


def test_tiles_of_any_size_give_the_same_scores(monkeypatch):
    q, k = random()
    held, rows = hold(q, k, VIDEO), range(182, 246)
    slots = make_slots([(0,), (4, 5)], held)
    assert slots.heads.tolist() == [0, 0, 4, 5] and slots.weights.tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]
    for scores_at_once in (1, 4 * 64 * 7, 1 << 20):
        monkeypatch.setitem(SCORES, "cpu", scores_at_once)
        tiles = list(score_tiles(q[182:246], held.k_KGD, held.pos_k, rows, slots, scale=held.scale))
        assert max(tile.numel() for _, tile in tiles) <= max(scores_at_once, 4 * 64)
        assert [keys.start for keys, _ in tiles] == [0, *(keys.stop for keys, _ in tiles[:-1])]
        assert tiles[-1][0].stop == 246  # keys after the last probe row are left out
        table = torch.cat([tile for _, tile in tiles], dim=2)
        expected = scores(q, k, rows)[[0, 0, 4, 5], :, :246]
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-12)


def test_control_a_lost_rank_changes_the_lse():
    q, k = random()
    rows = random_shards(len(VIDEO), 3)
    keys = [rows[0], rows[1], rows[2][:0]]
    probe = spread(partial(take_for, None, [(0,)]), q, k, VIDEO, rows, keys)[0]
    expected = torch.logsumexp(scores(q, k, probe.rows, 0.3), dim=-1)
    assert (expected[0] - probe.lse_HR[0]).min() > 0.01
    assert probabilities(q, k, probe.rows, 0.3)[0, :, rows[2]].sum(-1).min() > 0.01


def test_a_probe_row_held_by_no_rank_or_by_two_is_refused():
    q, k = random()
    rows = random_shards(len(VIDEO), 2)
    without = [shard[shard != 200] for shard in rows]
    with pytest.raises(ConfigError, match=r"probe rows 182 \.\. 245"):
        spread(partial(take_for, Modality.VIDEO, [(0,)]), q, k, VIDEO, without, rows)
    twice = [torch.cat([shard, torch.tensor([200])]).unique() for shard in rows]
    with pytest.raises(ConfigError, match="one rank for each row"):
        spread(partial(take_for, Modality.VIDEO, [(0,)]), q, k, VIDEO, twice, rows)


def test_a_chunk_without_such_rows_has_no_probe():
    q, k = random()
    assert take_probe(hold(q, k, VIDEO, chunk=range(100, 200)), Modality.IMAGE, [(0,)]) is None


@pytest.mark.parametrize(
    "units, message",
    [([(0, 3)], "heads of one group of 3"), ([(0,), (0, 1)], "at most once"), ([(6,)], "at most once")],
)
def test_units_that_cannot_be_are_refused(units, message):
    q, k = random()
    with pytest.raises(ConfigError, match=message):
        make_slots(units, hold(q, k, VIDEO))


def test_tensors_that_do_not_fit_are_refused():
    q, k = random()
    everything = Shard(VIDEO, torch.arange(len(VIDEO)))
    some, chunk = Shard(VIDEO, torch.arange(5)), range(len(VIDEO))
    for refused, message in (
        ((q[:, :5], k, everything, everything, chunk), "H a multiple of G"),
        ((q.float(), k, everything, everything, chunk), "of one dtype"),
        ((q[..., :3], k, everything, everything, chunk), "q \\[T,H,D\\]"),
        ((q, k[:5], everything, everything, chunk), "k of 5 tokens at 332 positions"),
        ((q, k[:5], everything, some, range(300)), "as many, in 0 .. 299"),
        ((q, k[:5], everything, some, range(1, 332)), "as many, in 1 .. 331"),
    ):
        q_, k_, rows, keys, part = refused
        with pytest.raises(ConfigError, match=message):
            Held(q_, k_, rows, keys, 1.0, Alone(), part)
