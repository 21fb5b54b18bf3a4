"""Sets from masses: the heaviest, ties, what sink and window show anyway, name spaces, axes; equal on all ranks."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from sglang_mm.kernels.probe import SCORES
from sglang_mm.patterns.catalog import Blocks, Grid, VerticalSlash
from sglang_mm.patterns.select.choose import choose
from sglang_mm.patterns.select.heaviest import heaviest, number_of, rank_key
from sglang_mm.patterns.select.held import Held
from sglang_mm.patterns.select.masses import Want
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import by_class, by_difference, by_distance, hold, probabilities
from tests.patterns.planted import Columns, Diagonal, Line, Noise, Shift, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
VIDEO = token_map(Text(40), Media(40, 4, 6), Text(30))  # 1030 tokens
TWO_SIZES = token_map(Text(10), Media(12, 3, 5), Text(9), Media(20, 4, 6), Text(9), Media(8, 3, 5))


def one(q, k, tokens, want, modality, units=((0,),), scale=1.0):
    held = hold(q, k, tokens, scale)
    (chosen,), _ = choose(held, take_probe(held, modality, units), units, [want], {})
    return chosen


def test_rank_keys_order_by_20_bits_then_by_number():
    def key(mass, number):
        return int(rank_key(torch.tensor([mass], dtype=torch.float64), torch.tensor([number])))

    assert key(1.0 + 2**-18, 9) > key(1.0, 0) > key(1.0, 5) > key(1.0 - 2**-18, 0)
    assert key(1.0 + 2**-22, 0) > key(1.0, 1) and key(1.0, 0) > key(1.0 + 2**-22, 1)  # a tie: the lower number first
    assert key(0.0, 3) == key(-1.0, 4) == -1
    assert number_of(torch.tensor(key(0.3, 123_456_789))) == 123_456_789


def test_the_heaviest_of_each_name_space():
    mass = torch.tensor([[3.0, 1, 2, 0, 9, 9, 9], [1, 1, 1, 1, 0, 0, 5]])
    spaces = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    taken = heaviest(mass, torch.tensor([2, 3]), spaces)
    assert [row.nonzero().flatten().tolist() for row in taken] == [[0, 2, 4, 5], [0, 1, 2, 6]]


def test_columns_are_the_tables_heaviest_beyond_sink_and_window():
    draw = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(len(VIDEO), 2, 8, generator=draw) for _ in range(2))
    want = Want(0, None, VerticalSlash(vertical=25, slash=0, sink=8, window=100))
    chosen = one(q, k, VIDEO, want, Modality.VIDEO, [(1,)])
    column = probabilities(q, k, range(936, 1000))[1].sum(0)
    column[:8], column[999 - 99 :] = 0, 0  # rows are 1000 at most: all of them see keys from 900 on in their window
    assert chosen.columns.tolist() == column.topk(25).indices.sort().values.tolist()
    assert len(chosen.diagonals) == 0


def test_columns_of_one_modality():
    q, k = plant(VIDEO, [Columns()], columns=(5, 20, 100, 200, 300))
    for keys, columns in ((Modality.TEXT, [5, 20]), (Modality.VIDEO, [100, 200, 300]), (None, [5, 20, 100, 200, 300])):
        want = Want(0, keys, VerticalSlash(vertical=len(columns), slash=0, sink=2, window=16))
        assert one(q, k, VIDEO, want, Modality.VIDEO).columns.tolist() == columns


def test_fewer_columns_than_asked_for_where_fewer_are_not_seen():
    q, k = plant(VIDEO, [Noise()])
    want = Want(0, None, VerticalSlash(vertical=2000, slash=0, sink=900, window=64))
    assert one(q, k, VIDEO, want, Modality.VIDEO).columns.tolist() == list(range(900, 936))


def test_equal_columns_take_the_lower():
    q, k = torch.zeros(len(VIDEO), 1, 4), torch.zeros(len(VIDEO), 1, 4)
    want = Want(0, None, VerticalSlash(vertical=7, slash=200, sink=3, window=1))
    chosen = one(q, k, VIDEO, want, Modality.VIDEO)
    assert chosen.columns.tolist() == list(range(3, 10))


def test_diagonals_by_triangular_weights_of_the_tables_distances():
    draw = torch.Generator().manual_seed(3)
    q, k = (2 * torch.randn(len(VIDEO), 1, 8, generator=draw) for _ in range(2))
    for window, sink in ((128, 0), (64, 50), (300, 0), (1, 200)):
        want = Want(0, None, VerticalSlash(vertical=0, slash=300, sink=sink, window=window))
        p = probabilities(q, k, range(936, 1000))[0]
        p[:, :sink] = 0
        bins = by_distance(p, range(936, 1000), 18).tolist()
        bins = [0 if 64 * number + 64 <= window else mass for number, mass in enumerate(bins)]
        share = {-2: 0.25, -1: 0.75, 0: 0.75, 1: 0.25}
        score = [sum(w * bins[2 * d + i] for i, w in share.items() if 2 * d + i >= 0) for d in range(8)]
        expected = sorted(sorted(range(8), key=lambda d: (-score[d], d))[:3])
        assert one(q, k, VIDEO, want, Modality.VIDEO).diagonals.tolist() == expected


@pytest.mark.parametrize("diagonal", [0, 1, 4, 7])
def test_a_planted_diagonal(diagonal):
    q, k = plant(VIDEO, [Diagonal(diagonal)])
    want = Want(0, None, VerticalSlash(vertical=0, slash=1, sink=0, window=1))
    assert one(q, k, VIDEO, want, Modality.VIDEO).diagonals.tolist() == [diagonal]


def test_classes_by_mean_mass_per_visible_pair():
    """Two of every name space, for a unit of two heads, against the whole table."""
    draw = torch.Generator().manual_seed(4)
    q, k = (2 * torch.randn(len(TWO_SIZES), heads, 8, generator=draw) for heads in (2, 1))
    rows, sink, window = range(len(TWO_SIZES) - 64, len(TWO_SIZES)), 30, 90
    unseen = torch.ones(64, len(TWO_SIZES), dtype=torch.float64).tril(rows.start)
    unseen[:, :sink], unseen[:, len(TWO_SIZES) - window :] = 0, 0
    p = probabilities(q, k, rows).sum(0) * unseen
    for axis in Axis:
        classes = TWO_SIZES.classes(axis)
        mean = by_class(p, classes) / by_class(unseen, classes).clamp(min=1)
        expected = []
        for start, stop in pairwise(classes.starts):
            expected += (mean[start:stop].topk(2).indices + start).sort().values.tolist()
        want = Want(0, None, Grid(axis=axis, phases=2, sink=sink, window=window))
        chosen = one(q, k, TWO_SIZES, want, Modality.VIDEO, [(0, 1)])
        assert chosen.axis == axis and chosen.classes.tolist() == expected and len(expected) == 4


GRID = {"sink": 8, "window": 64}


@pytest.mark.parametrize("klass", [0, 7, 23])
def test_a_line_along_the_frame_axis(klass):
    q, k = plant(VIDEO, [Line(Axis.FRAME, klass)])
    chosen = one(q, k, VIDEO, Want(0, None, Grid(**GRID)), Modality.VIDEO)
    assert chosen.axis == Axis.FRAME and chosen.classes.tolist() == [klass]


@pytest.mark.parametrize("klass", [0, 3, 5])
def test_a_line_along_the_row_axis(klass):
    """Frame by frame a column of every row is four places, the heaviest as far above the mean as the column is."""
    q, k = plant(VIDEO, [Line(Axis.ROW, klass)], noise=1.0)
    chosen = one(q, k, VIDEO, Want(0, None, Grid(**GRID)), Modality.VIDEO)
    assert chosen.axis == Axis.ROW and chosen.classes.tolist() == [klass]
    p = probabilities(q, k, range(936, 1000))[0]
    means = [by_class(p, VIDEO.classes(axis)) / VIDEO.classes(axis).counts for axis in Axis]
    frame, row = (mean.max() / mean.mean() for mean in means)
    assert frame >= row  # so the larger peak over mean would have taken the frame axis


def test_axes_that_tie_take_the_frame():
    """Frames of one row: both axes have the same classes."""
    tokens = token_map(Text(5), Media(30, 1, 6))
    q, k = plant(tokens, [Line(Axis.ROW, 2)])
    chosen = one(q, k, tokens, Want(0, None, Grid(sink=2, window=8)), Modality.VIDEO)
    assert chosen.axis == Axis.FRAME and chosen.classes.tolist() == [2]


@pytest.mark.parametrize(
    "axis, shift", [(Axis.FRAME, 0), (Axis.FRAME, 5), (Axis.FRAME, 23), (Axis.ROW, 0), (Axis.ROW, 4)]
)
def test_a_shift_of_classes(axis, shift):
    q, k = plant(VIDEO, [Shift(axis, shift)])
    chosen = one(q, k, VIDEO, Want(0, None, Grid(vertical=False, slash=1, **GRID)), Modality.VIDEO)
    assert chosen.axis == axis and chosen.shifts.tolist() == [[0, shift]] and len(chosen.classes) == 0


def test_shifts_are_the_tables_heaviest_and_known_for_the_probes_name_space_alone():
    draw = torch.Generator().manual_seed(5)
    q, k = (2 * torch.randn(len(TWO_SIZES), 1, 8, generator=draw) for _ in range(2))
    rows = range(len(TWO_SIZES) - 64, len(TWO_SIZES))
    want = Want(0, None, Grid(axis="frame", slash=3, sink=30, window=40))
    chosen = one(q, k, TWO_SIZES, want, Modality.VIDEO)
    mass = by_difference(probabilities(q, k, rows)[0], rows, TWO_SIZES, TWO_SIZES.classes(Axis.FRAME), 30, 40)
    assert TWO_SIZES.classes(Axis.FRAME).starts == (0, 15, 39) and mass[15:].sum() == 0  # the last video has 3 x 5
    assert chosen.shifts.tolist() == [[0, shift] for shift in mass.topk(3).indices.sort().values.tolist()]


def test_a_phase_of_one_video_serves_the_others_of_its_size():
    q, k = plant(TWO_SIZES, [Line(Axis.FRAME, 4)])
    chosen = one(q, k, TWO_SIZES, Want(0, None, Grid(axis="frame", sink=0, window=16)), Modality.VIDEO)
    assert 4 in chosen.classes.tolist()
    spaces = TWO_SIZES.classes(Axis.FRAME).spaces[chosen.classes]
    assert spaces.tolist() == [0, 1]  # and each name space has a class of its own


def test_a_prompt_of_text_has_no_classes():
    tokens = token_map(Text(300))
    q, k = plant(tokens, [Noise()])
    chosen = one(q, k, tokens, Want(0, None, Grid(slash=2, sink=1, window=8)), None)
    assert len(chosen.classes) == len(chosen.shifts) == 0


def blocks_of(chosen, row_block):
    at = chosen.row_blocks.tolist().index(row_block)
    return chosen.key_blocks[chosen.ptr[at] : chosen.ptr[at + 1]].tolist()


def naive_blocks(q, k, tokens, rows, keys, threshold, row_block):
    """Mean-pooled scores of one row block and one head, in Python floats."""
    block_S = torch.arange(len(tokens)) // 128
    row_S = torch.ones(len(tokens), dtype=bool) if rows is None else tokens.modality == rows
    key_S = torch.ones(len(tokens), dtype=bool) if keys is None else tokens.modality == keys
    q_mean = q[row_S & (block_S == row_block)].double().mean(0)
    weights = {}
    for key_block in range(row_block + 1):
        members = k[key_S & (block_S == key_block)].double()
        if len(members):
            weights[key_block] = len(members) * float((q_mean @ members.mean(0)).exp())
    kept, total = {0, row_block}, 0.0
    for key_block in sorted(weights, key=lambda block: (-weights[block], block)):
        if total < threshold:
            kept.add(key_block)
        total += weights[key_block] / sum(weights.values())
    return sorted(kept)


@pytest.mark.parametrize("keys", [None, Modality.TEXT, Modality.VIDEO])
@pytest.mark.parametrize("rows", [None, Modality.TEXT, Modality.VIDEO])
def test_blocks_are_the_smallest_sets_of_mean_pooled_attention(rows, keys, monkeypatch):
    monkeypatch.setitem(SCORES, "cpu", 30)  # a few row blocks at a time
    draw = torch.Generator().manual_seed(6)
    q, k = (3 * torch.randn(len(VIDEO), 1, 8, generator=draw) for _ in range(2))
    q, k = q + torch.randn(1, 1, 8, generator=draw), k + 0.1 * torch.randn(1, 1, 8, generator=draw)
    chosen = one(q, k, VIDEO, Want(0, keys, Blocks(0.7)), rows)
    present = VIDEO.modality == rows if rows is not None else torch.ones(len(VIDEO), dtype=bool)
    assert chosen.row_blocks.tolist() == (present.nonzero().flatten() // 128).unique().tolist()
    lists = {row: blocks_of(chosen, row) for row in chosen.row_blocks.tolist()}
    assert lists == {row: naive_blocks(q[:, 0], k[:, 0], VIDEO, rows, keys, 0.7, row) for row in lists}


def test_blocks_of_a_unit_follow_the_sum_of_its_heads():
    q, k = plant(VIDEO, [Diagonal(2), Diagonal(4)], group=2)
    units = [(0,), (1,), (0, 1)]
    lists = []
    for unit in units:
        chosen = one(q, k, VIDEO, Want(0, None, Blocks(0.9)), Modality.VIDEO, [unit])
        lists.append(blocks_of(chosen, 7))
    assert lists == [[0, 5, 7], [0, 3, 7], [0, 3, 5, 7]]


def test_a_threshold_of_one_keeps_every_block():
    """Also those of so little mass that sums before and after them are the same in fp32."""
    q, k = plant(VIDEO, [Columns()], columns=tuple(range(128)), logit=25.0)
    chosen = one(q, k, VIDEO, Want(0, None, Blocks(1.0)), None)
    assert chosen.key_blocks.tolist() == [key for row in range(9) for key in range(row + 1)]


def chosen_by(wants, units, tokens, modality, q, k, rows, keys, peers):
    held = Held(q, k, rows, keys, 1.0, peers, range(len(tokens)))
    return choose(held, take_probe(held, modality, units), units, wants, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modality", [None, Modality.VIDEO])
def test_every_rank_count_chooses_alike(modality, dtype):
    """Also with keys that lie elsewhere than rows. Blocks: each rank lists its rows' and the probe's, and agrees."""
    plants = [Line(Axis.FRAME, 9), Line(Axis.ROW, 2), Shift(Axis.FRAME, 5), Diagonal(3), Columns(), Noise()]
    q, k = plant(VIDEO, plants, group=3, noise=2.0, columns=(77, 500, 600), dtype=dtype)
    units = [(0, 1), (2,), (3,), (4, 5)]
    patterns = [VerticalSlash(20, 256, 8, 32), Grid(phases=2, slash=2, **GRID), Blocks(0.6), Blocks(0.9)]
    wants = [Want(unit, None, pattern) for unit in range(4) for pattern in patterns]
    (alone, masses), *_ = spread(partial(chosen_by, wants, units, VIDEO, modality), q, k, VIDEO, [torch.arange(1030)])
    for ranks in range(2, 9):
        rows = random_shards(len(VIDEO), ranks, seed=ranks)
        keys = random_shards(len(VIDEO), ranks, seed=50) if ranks % 2 else rows
        results = spread(partial(chosen_by, wants, units, VIDEO, modality), q, k, VIDEO, rows, keys)
        for chosen, class_masses in results:
            for mine, his in zip(chosen, alone):
                assert all(torch.equal(a, b) for a, b in zip(mine.tables(), his.tables()))
                if hasattr(mine, "ptr"):
                    listed = mine.row_blocks.tolist()
                    assert [blocks_of(mine, row) for row in listed] == [blocks_of(his, row) for row in listed]
            assert class_masses.keys() == masses.keys()


def test_ranks_may_differ_only_between_masses_that_are_equal_to_1e_5():
    """Columns of equal mass up to rounding: a rank count may take others, but never lighter ones."""
    draw = torch.Generator().manual_seed(7)
    k = torch.randn(8, 1, 64, generator=draw).repeat(len(VIDEO) // 8 + 1, 1, 1)[: len(VIDEO)]
    q = torch.randn(1, 1, 64, generator=draw).expand(len(VIDEO), -1, -1).contiguous()
    wants = [Want(0, None, VerticalSlash(vertical=60, slash=0, sink=0, window=1))]
    mass = probabilities(q, k, range(936, 1000))[0].sum(0)
    for ranks in range(1, 9):
        shards = random_shards(len(VIDEO), ranks, seed=ranks)
        for (chosen,), _ in spread(partial(chosen_by, wants, [(0,)], VIDEO, Modality.VIDEO), q, k, VIDEO, shards):
            lightest, heaviest_left = mass[chosen.columns].min(), _without(mass, chosen.columns).max()
            assert len(chosen.columns) == 60 and lightest >= heaviest_left * (1 - 1e-5)


def _without(mass, columns):
    return mass[~torch.isin(torch.arange(len(mass)), columns)]
