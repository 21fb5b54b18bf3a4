"""The probe's passes in plain torch against tables of all pairs, and on a GPU the kernels against them."""

import logging

import pytest
import torch

from sglang_mm.kernels import probe
from sglang_mm.kernels.probe import ClassCounts, key_masses, row_lse
from sglang_mm.kernels.triton_backend import probe as triton_passes
from tests.kernels.probing import SCALE, UNITS, assert_lse, assert_masses, draw, exact_lse, exact_masses

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
SIZES = [(300, 64, None), (131, 17, None), (90, 1, None), (70, 64, 0), (70, 5, 10_000), (3, 64, 1), (0, 64, 7)]
"""Keys, rows, first row: most keys before the rows, all among them, all before them, and none."""


@pytest.mark.parametrize("keys, rows, first", SIZES)
@pytest.mark.parametrize("group", UNITS)
@pytest.mark.parametrize("at_once", [1 << 20, 6000])
def test_the_plain_passes_are_the_tables_sums(group, keys, rows, first, at_once, monkeypatch):
    monkeypatch.setitem(probe.SCORES, "cpu", at_once)
    case = draw(group, 16, keys, rows, first=first)
    lse_HR = row_lse(*case.inputs, scale=SCALE)
    torch.testing.assert_close(lse_HR[case.heads], exact_lse(case)[case.heads], rtol=0, atol=1e-12)
    masses = key_masses(*case.inputs, case.lse_HR, scale=SCALE, by_class=case.by_class)
    expected = exact_masses(case)
    torch.testing.assert_close(masses.columns, expected.columns, rtol=0, atol=1e-12)
    torch.testing.assert_close(masses.early, expected.early, rtol=0, atol=1e-12)
    torch.testing.assert_close(masses.by_class.double(), expected.by_class, rtol=1e-12, atol=0.5 * max(keys, 1))


def test_by_hand():
    """Two rows at 66 and 67, keys at 0, 3 and 67: at distances 66, 67 | 63, 64 | none, 0."""
    q, k = torch.zeros(2, 2, 4), torch.zeros(3, 1, 4)
    q[1, 1, 0], k[1, 0, 0] = 1.0, 3.0
    pos_k, rows, units = torch.tensor([0, 3, 67]), range(66, 68), [(1,), (0,)]
    lse_HR = row_lse(q, k, pos_k, rows, units, scale=0.5)
    assert lse_HR.exp().tolist() == [pytest.approx([2, 3]), pytest.approx([2, 2 + torch.e**1.5])]
    counts = ClassCounts(*(torch.tensor(x).int() for x in ([0, 0], [0, 0, -1], [1, 0, 0])), 2, ((1, 0, 64), (1, 1, 1)))
    columns, early, by_class = key_masses(q, k, pos_k, rows, units, torch.zeros(2, 2), scale=0.5, by_class=counts)
    assert columns.tolist() == [[2, pytest.approx(1 + torch.e**1.5), 1], [2, 2, 1]]
    assert early.tolist() == [[2, 1, 0], [2, 1, 0]]  # row 66 is before the key at 67: nothing
    assert (by_class >> 40).tolist() == [[[0, 1], [1, 1]], [[1, 0], [1, 0]]]


def test_heads_without_a_unit_and_rows_without_a_key():
    case = draw(1, 8, 40, rows=10, first=0)
    lse_HR = row_lse(*case.inputs[:2], case.pos_k + 4, *case.inputs[3:], scale=SCALE)
    assert lse_HR[3].isnan().all() and lse_HR[:3, :4].eq(float("-inf")).all() and lse_HR[:3, -1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_short_floats_are_fp32(dtype):
    case = draw(4, 64, 300, dtype=dtype)
    lse_HR = row_lse(*case.inputs, scale=SCALE)
    masses = key_masses(*case.inputs, case.lse_HR, scale=SCALE, by_class=case.by_class)
    assert_lse(lse_HR, case, step=300)
    assert_masses(masses, case)


@pytest.mark.parametrize("change", [0.999, 1.001])
def test_control_a_wrong_scale_is_seen(change):
    case = draw(4, 64, 300, dtype=torch.float32)
    with pytest.raises(AssertionError, match="log-sum-exp: error"):
        assert_lse(row_lse(*case.inputs, scale=change * SCALE), case)
    with pytest.raises(AssertionError, match="columns"):
        assert_masses(key_masses(*case.inputs, case.lse_HR, scale=change * SCALE, by_class=case.by_class), case)


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "message"),
    [
        ((64, 4, 128), torch.bfloat16, 75, "cpu has capability 75, the kernels need 80"),
        ((64, 4, 128), torch.float64, 90, "torch.float64, the kernels take torch.float16"),
        ((64, 4, 129), torch.float16, 90, "head dim 129, the kernels take up to 128"),
        ((65, 4, 128), torch.float32, 90, "65 rows, the kernels take up to 64"),
    ],
)
def test_what_the_kernels_do_not_take(shape, dtype, capability, message):
    assert triton_passes.unfit(torch.zeros(64, 4, 80, dtype=torch.bfloat16), 80) is None
    assert triton_passes.unfit(torch.zeros(shape, dtype=dtype), capability).startswith(message)


def test_a_fallback_is_said_once(caplog):
    """The meta device: any that is not the CPU, and has no capability."""
    q = torch.zeros(5, 1, 8, device="meta")
    with caplog.at_level(logging.WARNING):
        assert probe._triton_passes(q) is None and probe._triton_passes(q) is None
    assert [line.getMessage() for line in caplog.records] == [
        "the probe is computed in plain torch: meta has capability 0, the kernels need 80"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("group", UNITS)
@pytest.mark.parametrize("keys, rows, first", [*SIZES, (5000, 64, None)])
def test_on_a_gpu(group, dim, dtype, keys, rows, first):
    """Twice, with the same bits."""
    case = draw(group, dim, keys, rows, dtype, first)
    there = case.to("cuda")
    lse_HR, again = (row_lse(*there.inputs, scale=SCALE) for _ in range(2))
    share = {"scale": SCALE, "by_class": there.by_class}
    masses, masses_again = (key_masses(*there.inputs, there.lse_HR, **share) for _ in range(2))
    assert_lse(lse_HR, case)
    assert_masses(masses, case)
    assert torch.equal(lse_HR[case.heads], again[case.heads]) and all(map(torch.equal, masses, masses_again))
