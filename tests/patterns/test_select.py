"""Selection with a plan: what was planted is found, recall decides, and nothing is sparse without it."""

import logging
from functools import partial

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, KBoundary, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import Lines
from sglang_mm.patterns.density import density
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import select
from sglang_mm.types import Axis, Modality, Run
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import layout_shards, probabilities, recall, scores
from tests.patterns.planted import Columns, Diagonal, Line, Noise, Shift, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(80, 4, 6), Text(30))  # 1990
RUNS = [Run(0, 40), Run(40, 1920, 80, "video"), Run(1960, 30)]
COLUMNS = (100, 333, 777, 1200)
GRID = {"sink": 8, "window": 64}
PLANTS = [Line(Axis.FRAME, 7), Line(Axis.ROW, 3), Shift(Axis.FRAME, 5), Diagonal(3), Columns(), Noise()]
PATTERNS = [Grid(**GRID), Grid(**GRID), Grid(vertical=False, slash=1, **GRID)]
PATTERNS += [VerticalSlash(8, 128, **GRID), VerticalSlash(12, 128, **GRID), Grid(**GRID)]
PLANS = [((head,), QBoundary(video=pattern)) for head, pattern in enumerate(PATTERNS)]


def alone(plans, q, k, tokens=TOKENS, **options):
    everything = Shard(tokens, torch.arange(len(tokens)))
    return select(plans, q, k, everything, everything, scale=1.0, **options)


def of_video(selection, head):
    return next(panel for panel in selection.units[head].panels if panel.rows == Modality.VIDEO)


@pytest.mark.parametrize("share, recalls", [(0, 0.98), (0.25, 0.84), (0.5, 0.4), (1, 0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_planted_is_found_exactly_under_noise(share, recalls, seed):
    """Noise: standard deviation, as a share of the planted logit of 10; theta 0 keeps what was chosen.

    Each of 64 rows hands out a mass of 1. Noise as large as the logit leaves about half of it to a line or diagonal,
    and to a wrong class what a few rows put on single keys: lines are found at all levels. A column of four has a
    quarter of the mass, and single keys of large noise have up to 1 row's: columns are found to half the logit.
    """
    q, k = plant(TOKENS, PLANTS, noise=10.0 * share, columns=COLUMNS, seed=seed)
    selection, report = alone(PLANS, q, k, theta=1e-9)
    chosen = [of_video(selection, head).chosen for head in range(5)]
    assert (chosen[0].axis, chosen[0].classes.tolist()) == (Axis.FRAME, [7])
    assert (chosen[1].axis, chosen[1].classes.tolist()) == (Axis.ROW, [3])
    assert (chosen[2].axis, chosen[2].shifts.tolist()) == (Axis.FRAME, [[0, 5]])
    assert chosen[3].diagonals.tolist() == [3]
    assert set(COLUMNS) <= set(chosen[4].columns.tolist()) or share == 1
    found = [verdict.recall for verdict in report.verdicts if verdict.rows == Modality.VIDEO]
    print(f"\nnoise {share:4.0%} of the logit: recall", "  ".join(f"{recall:.4f}" for recall in found))
    assert min(found[:5]) > recalls and found[5] < 0.3
    assert min(found[:4]) > (0.9 if share <= 0.5 else 0.4)


def test_structure_stays_sparse_and_noise_becomes_dense_with_a_reason(caplog):
    q, k = plant(TOKENS, PLANTS, noise=1.0, columns=COLUMNS)
    with caplog.at_level(logging.INFO, "sglang_mm"):
        selection, report = alone(PLANS, q, k, title="layer 3")
    verdicts = {verdict.heads: verdict for verdict in report.verdicts if verdict.rows == Modality.VIDEO}
    for head in range(5):
        assert verdicts[head,].is_sparse and verdicts[head,].recall >= 0.9 and not verdicts[head,].reason
        assert type(of_video(selection, head).pattern) is type(PATTERNS[head])
    noise = verdicts[5,]
    assert isinstance(of_video(selection, 5).pattern, Dense) and not noise.is_sparse and noise.recall == 1
    reason = "dense: recall below 0.9, and blocks would compute more than 0.75 of the pairs"
    assert noise.reason == reason and report.fallbacks == {reason: 1}
    (asked, blocks) = noise.trials
    assert asked.patterns == ((None, PATTERNS[5]),) and asked.recall < 0.3 and "blocks" in str(blocks)
    assert f"heads 5, video rows: dense, recall 1.0000; {reason} (tried grid 0." in str(report)
    (record,) = [each for each in caplog.records if each.name.startswith("sglang_mm")]
    assert record.levelname == "WARNING" and record.message.startswith(
        "layer 3: 5 of 12 verdicts sparse, lowest recall 0.9"
    )
    assert f"1 x {reason}" in record.message


def test_no_warning_where_all_is_as_asked(caplog):
    q, k = plant(TOKENS, PLANTS[:2])
    with caplog.at_level(logging.INFO, "sglang_mm"):
        _, report = alone(PLANS[:2], q, k)
    assert [record.levelname for record in caplog.records] == ["INFO"] and not report.fallbacks
    assert report.lowest_recall > 0.99


def test_the_first_fallback_is_blocks():
    """Three blocks of columns, of which the plan has room for eight."""
    columns = [column for block in (2, 5, 9) for column in range(128 * block, 128 * block + 128)]
    q, k = plant(TOKENS, [Columns()], columns=tuple(columns))
    selection, report = alone([((0,), QBoundary(video=VerticalSlash(8, 0, **GRID)))], q, k)
    panel = of_video(selection, 0)
    assert panel.pattern == Blocks() and panel.keys is None
    listed = panel.chosen.key_blocks[panel.chosen.ptr[-2] :].tolist()
    assert listed == [0, 2, 5, 9, 15]
    assert report.fallbacks == {"blocks: recall below 0.9": 1} and report.densities[0] < 0.5


def test_blocks_that_recall_too_little_are_dense():
    """A diagonal in noise of its own size: mean-pooling finds too few blocks."""
    q, k = plant(TOKENS, [Diagonal(3)] * 2, noise=10.0)
    plans = [((0,), QBoundary(video=Blocks())), ((1,), QBoundary(video=AShape(8, 64)))]
    _, report = alone(plans, q, k)
    first, second = (verdict for verdict in report.verdicts if verdict.rows == Modality.VIDEO)
    assert first.reason == second.reason == "dense: recall below 0.9"
    assert len(first.trials) == 1 and len(second.trials) == 2  # blocks are not tried again


def test_pairs_of_modalities_share_one_softmax():
    """16 rows of text look at text (0.9997) and at column A; 14 at column B of the video, and at no text.

    Normalised among video keys, A would have 16 rows' mass and B 14: the wrong column, recall 0.53.
    """
    tokens = token_map(Text(40), Media(80, 4, 6), Text(30))
    column_text, column_a, column_b = 10, 200, 900
    q, k = torch.zeros(1990, 1, 3), torch.zeros(1990, 1, 3)
    k[[column_text, column_a, column_b], 0, [0, 1, 2]] = 1
    q[1960:1976, 0] = torch.tensor([20.0, 12.0, 0.0])
    q[1976:, 0] = torch.tensor([0.0, 0.0, 12.0])
    one_column = VerticalSlash(vertical=1, slash=0, sink=0, window=1)
    plans = [((0,), Boundary2D({"text-video": one_column}))]
    selection, report = alone(plans, q, k, tokens)
    panels = selection.units[0].panels
    (panel,) = [panel for panel in panels if panel.pattern == one_column]
    assert (panel.rows, panel.keys, panel.chosen.columns.tolist()) == (Modality.TEXT, Modality.VIDEO, [column_b])
    assert next(verdict.recall for verdict in report.verdicts if verdict.rows == Modality.TEXT) > 0.98

    is_video = tokens.modality == Modality.VIDEO
    alone_HRV = scores(q, k, range(1960, 1990))[..., is_video].softmax(-1)
    by_pair = int(is_video.nonzero().flatten()[alone_HRV[0].sum(0).argmax()])
    assert by_pair == column_a
    wrong = [
        type(each)(each.rows, each.keys, each.pattern, Lines(torch.tensor([by_pair]), torch.tensor([]).long()))
        if each is panel
        else each
        for each in panels
    ]
    p_HRS = probabilities(q, k, range(1960, 1990))
    assert recall(p_HRS, range(1960, 1990), type(selection.units[0])((0,), tuple(wrong)), tokens) < 0.54


def test_2d_panels_fall_back_together():
    q, k = plant(TOKENS, [Noise()], noise=1.0)
    plan = Boundary2D({"video-video": Grid(**GRID), "video-text": AShape(8, 64)})
    selection, report = alone([((0,), plan)], q, k)
    assert [(panel.rows, panel.keys) for panel in selection.units[0].panels] == [
        (Modality.TEXT, Modality.TEXT),
        (Modality.TEXT, Modality.VIDEO),
        (Modality.VIDEO, None),
    ]
    assert "tried a_shape to text + grid to video 0." in str(report)


@pytest.mark.parametrize("boundary", [NoBoundary, KBoundary])
def test_without_a_row_boundary_the_prompts_last_rows_decide(boundary):
    q, k = plant(TOKENS, [Columns()], columns=COLUMNS)
    selection, report = alone([((0,), boundary(VerticalSlash(4, 0, **GRID)))], q, k)
    (panel,) = selection.units[0].panels
    assert panel.rows is None and panel.chosen.columns.tolist() == list(COLUMNS)
    assert [verdict.rows for verdict in report.verdicts] == [None] and "all rows" in str(report)


def test_dense_heads_need_no_probe():
    q, k = (torch.full((len(TOKENS), 2, 4), float("nan")) for _ in range(2))
    selection, report = alone([((0,), NoBoundary(Dense())), ((1,), QBoundary())], q, k)
    assert report.densities == (1.0, 1.0) and report.lowest_recall == 1 and not report.fallbacks
    assert all(isinstance(panel.pattern, Dense) for unit in selection.units for panel in unit.panels)


def test_a_group_has_one_selection_from_the_sum_of_its_heads():
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7), Line(Axis.FRAME, 9)], group=2)
    grid = QBoundary(video=Grid(axis="frame", phases=2, **GRID))
    selection, report = alone([((0, 1), grid)], q, k)
    assert of_video(selection, 0).chosen.classes.tolist() == [7, 9] and selection.units[0].heads == (0, 1)
    assert report.lowest_recall > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_choose_as_fp32_does(dtype):
    q, k = plant(TOKENS, PLANTS[:5], noise=1.0, columns=COLUMNS)
    expected = alone(PLANS[:5], q.to(dtype).float(), k.to(dtype).float())[0]
    assert alone(PLANS[:5], q.to(dtype), k.to(dtype))[0].digest() == expected.digest()


def select_here(plans, q, k, rows, keys, peers):
    return select(plans, q, k, rows, keys, scale=1.0, peers=peers)


def test_rank_counts_from_1_to_8_select_alike():
    """The plan's layouts and any others; blocks of all ranks together are those of one rank; one report for all."""
    q, k = plant(TOKENS, [*PLANTS, Columns(), Diagonal(2)], group=2, noise=1.0, columns=tuple(range(256, 384)))
    plans = [*PLANS[:4], ((4, 5), NoBoundary(Blocks(0.8))), ((6, 7), QBoundary(text=AShape(8, 99), video=Grid(**GRID)))]
    everything = [torch.arange(len(TOKENS))]
    ((expected, told),) = spread(partial(select_here, plans), q, k, TOKENS, everything)
    assert told.fallbacks
    assert told.densities == pytest.approx([density(unit, TOKENS) for unit in expected.units])
    for ranks in range(2, 9):
        shards = layout_shards(RUNS, ranks) if ranks % 2 else random_shards(len(TOKENS), ranks, seed=ranks)
        results = spread(partial(select_here, plans), q, k, TOKENS, shards)
        for selection, report in results:
            assert selection.digest() == expected.digest()
            assert report.densities == pytest.approx(told.densities)
            assert [verdict.reason for verdict in report.verdicts] == [verdict.reason for verdict in told.verdicts]
            for mine, his in zip(report.verdicts, told.verdicts):
                assert mine.recall == pytest.approx(his.recall, abs=1e-6)
            assert str(report) == str(results[0][1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"theta": 0.0}, "0 < theta <= 1"),
        ({"theta": 1.5}, "0 < theta <= 1"),
        ({"chunk": range(5, 5)}, "rows of a prompt of 1990 tokens"),
        ({"chunk": range(2000)}, "rows of a prompt of 1990 tokens"),
        ({"chunk": range(0, 1990, 2)}, "rows of a prompt of 1990 tokens"),
        ({"chunk": range(1000)}, "check shard and chunk"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options, message):
    q, k = plant(TOKENS, [Noise()])
    with pytest.raises(ConfigError, match=message):
        alone(PLANS[:1], q, k, **options)
