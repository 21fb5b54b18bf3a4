"""Random programs that no compiler made: FlashInfer's kernels are told to show what the tables say."""

import pytest
import torch
from hypothesis import given, settings

from sglang_mm.types import TileProgram
from tests.kernels.flashinfer_cases import decoded, excess, seen_by_head
from tests.kernels.flashinfer_twin import Twin, put_in_place
from tests.kernels.test_tiles_properties import programs

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


@settings(deadline=None, max_examples=40)
@given(programs())
def test_any_program(program: TileProgram):
    with pytest.MonkeyPatch.context() as patch:
        library = put_in_place(patch, Twin)
        assert torch.equal(decoded(program, library.ran), seen_by_head(program).byte())
        assert max(excess(program, torch.bfloat16)) <= 1
