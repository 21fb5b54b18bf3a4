"""FlashInfer's backend, without a GPU: what it hands to the library, decoded; and the numbers that come of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_mm.kernels.flashinfer_backend import attend, unfit
from sglang_mm.kernels.merge import empty_state
from sglang_mm.kernels.problem import problem_of
from tests.exactness.layers import SCALE
from tests.exactness.oracle import allowed, errors, exact, largest
from tests.kernels.flashinfer_cases import (
    HAND_WRITTEN,
    attended,
    compiled,
    decoded,
    draw,
    excess,
    one_rank,
    seen_by_head,
)
from tests.kernels.flashinfer_twin import Installed, Twin, put_in_place

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


@pytest.fixture(params=[Twin, Installed])
def ran(request, monkeypatch):
    """What the library's kernels were given, call by call: by a twin of the library, and by the library."""
    return put_in_place(monkeypatch, request.param).ran


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_masks_and_numbers(ran, name):
    program = HAND_WRITTEN[name]
    assert torch.equal(decoded(program, ran), seen_by_head(program).byte())
    for dtype in (torch.float16, torch.bfloat16):
        assert max(excess(program, dtype)) <= 1


@pytest.mark.parametrize("tiles", [{}, {"row_tile": 48, "key_tile": 20}], ids=["128", "48 x 20"])
def test_compiled_programs(ran, tiles):
    for program in compiled(**tiles):
        ran.clear()
        assert torch.equal(decoded(program, ran), seen_by_head(program).byte())
        assert max(excess(program, torch.bfloat16)) <= 1


def test_pieces_that_come_by(ran):
    """One state, all pieces and axes: each result is merged into those before it, a weighted mean again."""
    q, k, v, seen, programs = one_rank(torch.bfloat16)
    state = empty_state(q)
    for keys, program in programs:
        attend(q, k[keys], v[keys], program, SCALE, *state)
    assert len(ran) > len(programs)
    expected = exact(q, k, v, seen)
    limits = allowed(expected, q, k, v, seen, torch.float32, 2 * len(ran))
    limits[0] += 2.01 * 2**-8 * largest(v)
    assert all(error <= limit for error, limit in zip(errors(state, expected), limits))


class HostileTwin(Twin):
    """Rows that see no key are undefined, as are those of padding."""

    def run(self, *given, **how):
        out, lse = super().run(*given, **how)
        empty = lse.isinf()
        return out.masked_fill(empty.unsqueeze(-1), float("nan")), lse.masked_fill(empty, -5e4)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_what_the_library_says_of_rows_without_keys_does_not_matter(monkeypatch, name):
    put_in_place(monkeypatch, HostileTwin)
    assert max(excess(HAND_WRITTEN[name], torch.float16)) <= 1


class NaturalTwin(Twin):
    def run(self, *given, **how):
        out, lse = super().run(*given, **how)
        return out, lse * 0.6931471805599453


class ForgetfulTwin(Twin):
    """The last page of every list is the first one instead."""

    def plan(self, indptr, indices, **how):
        wrong = indices.clone()
        wrong[indptr[1:].long() - 1] = indices[indptr[:-1].long()]
        super().plan(indptr, wrong, **how)


class BitOffsetTwin(Twin):
    """The library as it is when nobody puts its offsets right; those beyond the mask start over."""

    def run(self, *given, **how):
        given_mask = self._given.packed_mask
        if given_mask is not None:
            self._mask_indptr_buf = self._mask_indptr_buf * 8 % len(given_mask)
            self._given.packed_mask = given_mask.repeat(2)
        return super().run(*given, **how)


class UnscaledTwin(Twin):
    def plan(self, *given, sm_scale, **how):
        super().plan(*given, **how)


@pytest.mark.parametrize("fault", [NaturalTwin, ForgetfulTwin, BitOffsetTwin, UnscaledTwin])
def test_a_fault_shows(monkeypatch, fault):
    program = HAND_WRITTEN["groups of heads, ragged tiles"]
    put_in_place(monkeypatch, Twin)
    assert max(excess(program, torch.bfloat16)) <= 1
    put_in_place(monkeypatch, fault)
    assert max(excess(program, torch.bfloat16)) > 3


def test_merged_results_are_hardly_worse_than_one_pass(monkeypatch):
    """Against fp64 on the same inputs: 1.5 times as far off at most."""
    put_in_place(monkeypatch, Twin)
    q, k, v, seen, programs = one_rank(torch.bfloat16, dim=64)
    state = empty_state(q)
    for keys, program in programs:
        attend(q, k[keys], v[keys], program, SCALE, *state)
    expected = exact(q, k, v, seen)[0]
    passes = torch.stack([_one_pass(q[:, head], k[:, 0], v[:, 0], seen[head]) for head in range(8)], 1)
    merged, one_pass = ((each - expected).abs() for each in (state[0], passes))
    assert float(one_pass.max()) > 1e-3, "bfloat16 is seen at all"
    assert float(merged.norm()) <= 1.5 * float(one_pass.norm()) and float(merged.max()) <= 1.5 * float(one_pass.max())


def _one_pass(q_TD: Tensor, k_KD: Tensor, v_KD: Tensor, seen_TK: Tensor) -> Tensor:
    """As a 16-bit kernel does it: fp32 scores and sums, weights and result rounded."""
    scores = (q_TD.float() @ k_KD.float().T * SCALE).masked_fill(~seen_TK, float("-inf"))
    weights = (scores - scores.amax(1, keepdim=True).clamp(min=-1e30)).exp()
    total = weights.sum(1, keepdim=True).clamp(min=1e-30)
    return (weights.bfloat16().float() @ v_KD.float() / total).bfloat16()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_library_on_a_gpu(dtype, head_dim):
    """The same programs by the real kernels.

    They round to 16 bits once more than the twin where they cut rows over keys: three times, and one in reserve. Tensor
    cores truncate when they add, to 2^-22 of the largest sum, once for each 16 numbers of a head: the share of scores.
    """
    pytest.importorskip("flashinfer")
    for program in [*HAND_WRITTEN.values(), *compiled()]:
        q, k, v = draw(program, dtype, head_dim)
        on_gpu = replace(program, **{name: x.cuda() for name, x in vars(program).items() if isinstance(x, Tensor)})
        why = unfit(problem_of(q.cuda(), k.cuda(), on_gpu))
        if why:
            pytest.skip(why)
        state = [each.cpu() for each in attended(on_gpu, q.cuda(), k.cuda(), v.cuda())]
        seen = seen_by_head(program)
        expected = exact(q, k, v, seen)
        limits = allowed(expected, q, k, v, seen, torch.float32, 8)
        score = SCALE * largest(q.double().norm(dim=-1)) * largest(k.double().norm(dim=-1))
        limits[0] += 4 * torch.finfo(dtype).eps / 2 * largest(v)
        limits[1] += head_dim / 16 * 2**-22 * score
        assert all(error <= limit for error, limit in zip(errors(state, expected), limits))
