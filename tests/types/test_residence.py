"""Which rank keeps which key: counts, positions and slots against a table drawn position by position."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.types import Residence, page_for


def keeper(position: int, page: int, ranks: int) -> int:
    return position % page // (page // ranks)


@pytest.mark.parametrize(("ranks", "page"), [(1, 1), (1, 64), (2, 64), (3, 66), (4, 64), (4, 4), (8, 64)])
def test_every_position_rests_on_one_rank(ranks, page):
    owners = [keeper(position, page, ranks) for position in range(3 * page + 5)]
    for rank in range(ranks):
        mine = Residence(ranks, rank, page)
        expected = [position for position, owner in enumerate(owners) if owner == rank]
        assert mine.positions(0, len(owners)).tolist() == expected
        assert mine.positions(page - 1, 2 * page + 1).tolist() == [p for p in expected if page - 1 <= p < 2 * page + 1]
        assert mine.positions(7 % page, 7 % page).tolist() == []
        lengths = torch.arange(len(owners) + 1)
        counts = [sum(owner == rank for owner in owners[:length]) for length in lengths]
        assert mine.held(lengths).tolist() == counts == [mine.held(int(length)) for length in lengths]


@pytest.mark.parametrize(("ranks", "page"), [(1, 1), (2, 64), (3, 66), (8, 64)])
def test_local_slots_are_dense_and_every_rank_knows_its_own(ranks, page):
    slots = torch.arange(5 * page)
    for rank in range(ranks):
        mine = Residence(ranks, rank, page)
        local = mine.local(slots)
        kept = torch.tensor([keeper(int(slot), page, ranks) == rank for slot in slots])
        assert local[kept].tolist() == list(range(5 * mine.share))
        assert not local[~kept].any()
        assert mine.local(slots.int()).dtype == torch.int32


def test_a_prompt_whose_pages_lie_anywhere():
    """Position p of the prompt is in slot pages[p // 6] * 6 + p % 6."""
    pages, mine = torch.tensor([7, 2, 5]), Residence(3, 1, 6)
    positions = mine.positions(0, 16)
    slots = pages[positions // 6] * 6 + positions % 6
    assert positions.tolist() == [2, 3, 8, 9, 14, 15]
    assert mine.local(slots).tolist() == [14, 15, 4, 5, 10, 11]


@pytest.mark.parametrize(("ranks", "page"), [(1, 64), (2, 64), (3, 66), (4, 64), (5, 65), (7, 70), (8, 64), (100, 100)])
def test_pages_are_shared_evenly(ranks, page):
    assert page_for(ranks) == page


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match=r"pages of 64 tokens for 3 ranks.*multiple of 3.*pass 66"):
        Residence(3, 0, 64)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        Residence(2, 2, 64)
