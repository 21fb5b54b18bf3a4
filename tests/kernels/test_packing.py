"""How often K and V are copied, and that the copy is counted as the stage `permutation`."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_mm.kernels import empty_state, fa4_backend, packing, sparse_attention
from sglang_mm.kernels.flashinfer_backend import Numbers, attend, plan_of
from sglang_mm.kernels.packing import Packer, packing_order
from sglang_mm.types import TileProgram
from tests.exactness.layers import SCALE
from tests.exactness.oracle import errors
from tests.kernels.fa4_twin import Twin
from tests.kernels.flashinfer_twin import Twin as FlashinferTwin
from tests.kernels.flashinfer_twin import put_in_place
from tests.kernels.test_fa4 import BY_HAND
from tests.kernels.test_tiles import TWO_UNITS, draw

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


class Stages:
    """A watch that counts how often each stage is entered, and in which it is now."""

    def __init__(self):
        self.entered, self.inside = Counter(), []

    @contextmanager
    def __call__(self, stage: str):
        self.entered[stage] += 1
        self.inside.append(stage)
        yield
        self.inside.pop()


def twice(program: TileProgram) -> list[TileProgram]:
    """Two programs of the same lists of keys, and between them one whose lists are equal but not the same."""
    return [program, replace(program, keys=program.keys.clone()), replace(program, heads=program.heads)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_programs_of_the_same_keys_share_a_copy(backend):
    stages = Stages()
    q, k, v = draw(3, 1, torch.float32)
    got = sparse_attention(q, k, v, twice(TWO_UNITS), scale=SCALE, backend=backend, watch=stages)
    assert stages.entered == {"permutation": 2}
    want = sparse_attention(q, k, v, [TWO_UNITS] * 3, scale=SCALE, backend="reference")
    assert all(float(error) <= 1e-6 for error in errors(got, want))


def test_copies_are_made_inside_the_stage(monkeypatch):
    stages, seen = Stages(), []
    usual = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *given: seen.append(list(stages.inside)) or usual(*given))
    q, k, v = draw(3, 1, torch.float32)
    sparse_attention(q, k, v, [TWO_UNITS], scale=SCALE, backend="reference", watch=stages)
    assert seen == [["permutation"]] and stages.inside == []


def test_fa4_and_triton_share_a_copy(monkeypatch):
    """Of tiles of 128: the rest reads it too."""
    Twin(monkeypatch)
    stages, aligned = Stages(), []

    def rest(q, packer: Packer, program: TileProgram, scale, out, lse, align: int = 1) -> None:
        aligned.append(align)
        packer.pack(program, align)

    monkeypatch.setattr(fa4_backend, "attend_rest", rest)
    draws = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(size, heads, 16, generator=draws) for size, heads in ((300, 6), (556, 3), (556, 3)))
    fa4_backend.attend(q, k, v, BY_HAND, SCALE, *empty_state(q), Packer(k, v, stages))
    assert stages.entered == {"permutation": 1} and aligned == [fa4_backend.TILE]


def test_flashinfer_copies_inside_the_stage(monkeypatch):
    put_in_place(monkeypatch, FlashinferTwin)
    stages = Stages()
    q, k, v = draw(3, 1, torch.float16, dim=64)
    packer = Packer(k, v, stages)
    for _ in range(2):
        attend(q, k, v, TWO_UNITS, SCALE, *empty_state(q), packer)
    assert plan_of(TWO_UNITS, Numbers(q.device, q.dtype, 1, 64, SCALE)).calls and stages.entered == {"permutation": 1}


def test_ranges_of_tiles_end_before_their_padding():
    order, sizes = packing_order(BY_HAND, align=128), BY_HAND.key_ptr.diff()
    assert torch.equal(order.stop[1:] - order.start[:-1], sizes) and int(order.stop[0]) == 0
    shown: Tensor = order.index[order.start[2] : order.stop[3]]
    assert torch.equal(shown, BY_HAND.keys[BY_HAND.key_ptr[2] : BY_HAND.key_ptr[3]].long())
