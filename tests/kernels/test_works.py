"""The tables of the attention kernel, walked as the kernel walks them: each visit of each item once, in fair shares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.kernels.packing import packing_order
from sglang_mm.kernels.triton_backend import works
from sglang_mm.kernels.triton_backend.works import make_works
from tests.exactness.layers import Layer
from tests.exactness.strategies import layers
from tests.exactness.tables import Item, tile_program

pytestmark = pytest.mark.usefixtures("one_thread")


def walk(entries, row, step: int) -> list[tuple[int, int, int]]:
    """(entry, first packed row, one past the last) of each visit of a work, as the kernel's loop finds them."""
    entry, first, last, begin = row.tolist()
    found = []
    for visit in range(first, last):
        key = int(entries.key[entry]) + (visit - begin) * step
        found.append((entry, key, min(key + step, int(entries.stop[entry]))))
        if visit + 1 >= int(entries.end[entry]):
            begin, entry = visit + 1, entry + 1
    return found


def wanted(ptr, tile, count, start, item: int, step: int) -> list[tuple[int, int, int]]:
    """The same of a whole item, from the program."""
    found = []
    for entry in range(int(ptr[item]), int(ptr[item + 1])):
        first, stop = int(start[tile[entry]]), int(start[tile[entry] + count[entry]])
        found += [(entry, key, min(key + step, stop)) for key in range(first, stop, step)]
    return found


@settings(deadline=None, max_examples=25)
@given(layers(), st.sampled_from([16, 64, 128]), st.integers(1, 40), st.sampled_from([1, 16]))
def test_works_cover_each_item_once(layer: Layer, step, processors, shortest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(works, "SHORTEST", shortest)
        for program in [program for *_, program in layer.programs[:6] if program.items]:
            assert bool((program.full_count > 0).all()) and bool((program.part_count > 0).all())
            assert bool((program.key_ptr.diff() > 0).all()) and int(program.row_ptr.diff().max()) <= 128
            order = packing_order(program)
            made = make_works(program, order, step, processors)
            full, part = [[] for _ in range(program.items)], [[] for _ in range(program.items)]
            for item, of_full, of_part in zip(made.item.tolist(), made.full, made.part):
                if item >= 0:
                    full[item] += walk(made.full_entries, of_full, step)
                    part[item] += walk(made.part_entries, of_part, step)
            for item in range(program.items):
                tables = program.full_ptr, program.full_tile, program.full_count, order.start
                assert full[item] == wanted(*tables, item, step)
                tables = program.part_ptr, program.part_tile, program.part_count, order.start
                assert part[item] == wanted(*tables, item, step)
            check_order(made, program, processors, shortest)


def check_order(made, program, processors: int, shortest: int) -> None:
    """Parts are consecutive, first and within the slots; none is longer than a fair share."""
    visits = made.full_entries.visits + made.part_entries.visits
    heads = torch.tensor([len(unit) for unit in program.heads])[program.item_unit.long()]
    share = max(shortest, -(-int((visits * heads).sum()) // (works.SHARES * processors)))
    lengths = (made.full[:, 2] - made.full[:, 1] + made.part[:, 2] - made.part[:, 1])[made.item >= 0]
    assert not len(lengths) or int(lengths.max()) <= share
    in_parts = made.slot >= 0
    taken = [slot + head for item, slot in zip(made.item, made.slot) if slot >= 0 for head in range(int(heads[item]))]
    assert [int(slot) for slot in taken] == list(range(len(taken))) and len(taken) <= made.slots
    split = [
        (item, slot)
        for item, slots in zip(made.split_item.tolist(), made.split_slots.tolist())
        for slot in range(*slots)
        if item >= 0
    ]
    assert split == [(item, slot) for item, slot in zip(made.item.tolist(), made.slot.tolist()) if slot >= 0]
    whole = made.item[(made.item >= 0) & ~in_parts].long()
    unit = program.item_unit[whole]
    assert bool((unit.diff() >= 0).all())
    assert bool(((visits[whole].diff() <= 0) | (unit.diff() > 0)).all())


def program_of(visits: list[int], heads: tuple[tuple[int, ...], ...]):
    """An item of 128 rows for each unit, of so many visits of 64 keys."""
    keys = [range(first, first + 64) for first in range(0, 64 * max(visits), 64)]
    items = [Item(unit, 0, full=[(0, count)]) for unit, count in enumerate(visits)]
    group = sum(map(len, heads))
    return tile_program(torch.arange(128), torch.arange(64 * max(visits)), [range(128)], keys, items, heads, group)


@pytest.mark.parametrize(
    ("visits", "heads", "processors", "slots"),
    [
        ([4, 4, 4], ((0,), (1,), (2,)), 1, 6),  # a share of 3: two parts each, more than the four shares there are
        ([90, 2], (tuple(range(7)), (7,)), 8, 35),  # 632 visits, a share of 20: five parts of seven heads
        ([2, 90], (tuple(range(7)), (7,)), 8, 23),  # 104 visits, a share of 4
        ([90, 2], (tuple(range(7)), (7,)), 1, 0),  # a share of 158
    ],
)
def test_slots_suffice_for_units_of_any_size(visits, heads, processors, slots, monkeypatch):
    monkeypatch.setattr(works, "SHORTEST", 1)
    program = program_of(visits, heads)
    made = make_works(program, packing_order(program), 64, processors)
    assert int(made.split_slots[:, 1].where(made.split_item >= 0, 0).max()) == slots <= made.slots


def test_a_long_row_among_short_ones_is_split():
    keys = [range(first, first + 128) for first in range(0, 128 * 100, 128)]
    items = [Item(0, 0, full=[(0, 100)]), *(Item(unit, 0, full=[(unit, 1)]) for unit in range(1, 5))]
    heads = tuple((head,) for head in range(5))
    program = tile_program(torch.arange(128), torch.arange(128 * 100), [range(128)], keys, items, heads, group=5)
    made = make_works(program, packing_order(program), 64, processors=2)
    assert made.slot.tolist()[:8] == list(range(8)), "208 visits, shares of 26: eight parts of 25"
    assert made.item.tolist()[:12] == [0] * 8 + [1, 2, 3, 4]
    assert made.split_item.tolist()[0] == 0 and set(made.split_item.tolist()[1:]) == {-1}
    assert made.split_slots[0].tolist() == [0, 8, 1]
