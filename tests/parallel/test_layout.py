"""Layouts: the rule on typical prompts, the tables that follow from it, and what is refused."""

import pytest
import torch

from benchmarks.balance import CASES, imbalance, prompt, text, video
from sglang_mm.errors import ConfigError
from sglang_mm.parallel.layout import make_layout
from sglang_mm.types import BatchLayout, Layout, Run

pytestmark = pytest.mark.usefixtures("one_thread")


def owners(runs: list[Run], ranks: int) -> list[int]:
    return make_layout(runs, ranks).owner().tolist()


def borders(layout: Layout) -> list[int]:
    """Positions at which the owner changes."""
    owner = layout.owner()
    return (layout.start + 1 + (owner[1:] != owner[:-1]).nonzero().flatten()).tolist()


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("case", CASES)
def test_typical_prompts_are_balanced(case, ranks):
    rows, pairs = imbalance(make_layout(CASES[case](ranks), ranks))
    assert rows <= 1.05 and pairs <= 1.05


def test_the_drawing_of_the_docstring():
    owner = owners(prompt(text(32), (2048, 1, "video"), text(32)), 4)
    assert owner[:8] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert owner[32:2080] == [rank for rank in (0, 1, 2, 3, 3, 2, 1, 0) for _ in range(256)]
    assert owner[2080:2088] == [0, 1, 2, 3, 3, 2, 1, 0]


def test_stripes_go_on_where_the_last_short_run_stopped():
    assert owners(prompt(text(3), (2, 1, "image"), text(7)), 3) == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]
    long = prompt(text(2), text(512), text(3))
    assert owners(long, 2)[:2] + owners(long, 2)[-3:] == [0, 1, 1, 0, 0]


def test_a_run_is_long_from_256_tokens_per_rank():
    assert owners([Run(0, 767)], 3)[:6] == [0, 1, 2, 2, 1, 0]
    assert borders(make_layout([Run(0, 768)], 3)) == [128, 256, 512, 640]  # the middle two pieces are neighbours


def test_many_frames_are_cut_between_frames():
    layout = make_layout([Run(5, 15), Run(20, 165 * 100, 165, "video")], 4)
    assert all((border - 20) % 100 == 0 for border in borders(layout) if border > 20)


def test_few_frames_are_cut_inside_them():
    layout = make_layout([Run(20, 150 * 1000, 150, "video")], 4)
    assert all(border % 128 == 0 for border in borders(layout))


def test_frame_borders_are_given_up_where_they_cost_balance():
    """With few frames more than 40 a rank, whole frames can put 4% above the mean on one rank."""
    layouts = [make_layout([Run(0, frames * 64, frames, "video")], 8) for frames in range(320, 400)]
    refined = [layout for layout in layouts if any(border % 64 for border in borders(layout))]
    assert 0 < len(refined) < len(layouts) // 4
    assert all(max(imbalance(layout)) <= 1.01 for layout in refined)


def test_one_rank_has_every_row():
    layout = make_layout(prompt(text(100), video(50), start=9), 1)
    assert torch.equal(layout.rows[0], torch.arange(9, 9 + 100 + 50 * 264))


def test_a_prompt_shorter_than_the_ranks_leaves_some_without_rows():
    layout = make_layout([Run(4, 3)], 5)
    assert [rows.tolist() for rows in layout.rows] == [[4], [5], [6], [], []]
    assert layout.attended_pairs() == [5, 6, 7, 0, 0]


def test_digest_is_stable_and_sees_every_change():
    runs = prompt(text(40), video(60), text(9))
    digest = make_layout(runs, 4).digest()
    assert digest == make_layout(runs, 4).digest() and 0 <= digest < 2**64
    others = [make_layout(runs, 3), make_layout(prompt(text(44), video(60), text(5)), 4)]
    others += [make_layout(prompt(text(40), video(60), text(9), start=1), 4)]
    layout = make_layout(runs, 4)
    others += [Layout(layout.start, layout.length, (layout.rows[1], layout.rows[0], *layout.rows[2:]))]
    assert len({digest, *(other.digest() for other in others)}) == 5


def test_digest_is_the_same_in_every_process():
    """A fixed value: nothing of the process (hash seed, addresses) may enter."""
    assert make_layout([Run(0, 12)], 3).digest() == 3698589271830335160


@pytest.mark.parametrize(
    "runs, ranks, message",
    [
        ([Run(0, 5), Run(6, 5)], 2, "starts at 5"),
        ([Run(0, 5), Run(4, 5)], 2, "starts at 5"),
        ([], 2, "at least one run"),
        ([Run(0, 5)], 0, ">= 1"),
    ],
)
def test_runs_that_do_not_tile_are_refused(runs, ranks, message):
    with pytest.raises(ConfigError, match=message):
        make_layout(runs, ranks)


@pytest.mark.parametrize("fields", [(-1, 5), (0, 0), (0, 5, 0), (0, 10, 3, "video")])
def test_impossible_runs_are_refused(fields):
    with pytest.raises(ConfigError):
        Run(*fields)


def test_layout_counts_its_rows():
    with pytest.raises(ConfigError, match="give every row to one rank"):
        Layout(0, 5, (torch.arange(3), torch.arange(1)))


def test_batch_layout_on_paper():
    batch = BatchLayout((make_layout([Run(0, 5)], 2), make_layout([Run(7, 1)], 2), make_layout([Run(3, 4)], 2)))
    assert batch.offsets == [0, 5, 6, 10]
    assert [batch.rows(0), batch.rows(1)] == [3 + 1 + 2, 2 + 0 + 2]
    assert batch.segments(0) == [slice(0, 3), slice(3, 4), slice(4, 6)]
    assert batch.segments(1) == [slice(0, 2), slice(2, 2), slice(2, 4)]
    assert batch.flat(0).tolist() == [0, 3, 4, 5, 6, 9]
    assert batch.flat(1).tolist() == [1, 2, 7, 8]


def test_batch_digest_sees_the_order_of_requests():
    one, two = make_layout([Run(0, 50)], 2), make_layout([Run(0, 51)], 2)
    assert BatchLayout((one, two)).digest() != BatchLayout((two, one)).digest()


@pytest.mark.parametrize("widths", [(), (2, 3)])
def test_batches_need_one_ring(widths):
    with pytest.raises(ConfigError, match="all for the same ranks"):
        BatchLayout(tuple(make_layout([Run(0, 9)], ranks) for ranks in widths))
