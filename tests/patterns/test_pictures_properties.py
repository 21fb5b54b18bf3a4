"""What pictures show is the oracle's mask and the compiler's programs: any prompt, pattern, boundary, sets and tile."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.patterns.boundary import panels
from sglang_mm.patterns.catalog import Blocks, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Panel, Selection, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.pictures import illustrate
from sglang_mm.patterns.pictures.parts import Part, part_of_pairs
from sglang_mm.patterns.pictures.permuted import State, permuted
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import TileProgram
from tests.patterns.strategies import head_plans, maps, units

pytestmark = pytest.mark.usefixtures("one_thread")
ON_LINES = torch.tensor([Part.LINES, Part.SEPARATORS])


def all_rows_listed(unit: Unit, tokens) -> Unit:
    """The compiler takes no rows without a list of blocks: such rows get their own block here."""
    blocks = -(-len(tokens) // BLOCK)
    found = []
    for panel in unit.panels:
        if isinstance(panel.pattern, Blocks):
            named = panel.chosen.row_blocks.tolist()
            ends = pairwise(panel.chosen.ptr.tolist())
            lists = dict(zip(named, (panel.chosen.key_blocks[first:last] for first, last in ends)))
            each = [lists.get(row, torch.tensor([row])) for row in range(blocks)]
            ptr = torch.tensor([0, *map(len, each)]).cumsum(0)
            panel = Panel(panel.rows, panel.keys, panel.pattern, BlockSet(torch.arange(blocks), ptr, torch.cat(each)))
        found.append(panel)
    return Unit(unit.heads, tuple(found))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_parts_make_up_the_mask(data):
    tokens = data.draw(maps)
    unit = data.draw(units(tokens))
    assert torch.equal(part_of_pairs(unit, tokens) != Part.UNSEEN, unit_mask(unit, tokens))


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from([16, 32, 64, 128]))
def test_programs_show_every_pair_once_and_in_the_list_of_its_part(data, tile):
    tokens = data.draw(maps)
    unit = all_rows_listed(data.draw(units(tokens)), tokens)
    part_SS = part_of_pairs(unit, tokens)
    shown_SS = torch.zeros(part_SS.shape, dtype=torch.int64)
    for program in permuted(unit, tokens, tile):
        row, key = (program.state_RN >= State.PARTIAL).nonzero(as_tuple=True)
        i, j = program.rows[row], program.keys[key]
        shown_SS.index_put_((i, j), torch.ones_like(i), accumulate=True)
        names = [name for name, size in program.key_groups for _ in range(size)]
        in_lines = torch.tensor([name.endswith("lines") for name in names])
        by_class = torch.tensor([name == "keys by class" for name in names])
        assert torch.equal(torch.isin(part_SS[i, j], ON_LINES), in_lines[key])
        assert bool((part_SS[i, j][by_class[key]] == Part.SLASH).all())
        assert [sum(size for _, size in groups) for groups in (program.row_groups, program.key_groups)] == [
            len(program.rows),
            len(program.keys),
        ]
    assert torch.equal(shown_SS, unit_mask(unit, tokens).long())


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([16, 128]))
def test_visits_are_those_of_the_programs(data, tile):
    tokens = data.draw(maps)
    unit = all_rows_listed(data.draw(units(tokens)), tokens)
    shard = Shard(tokens, torch.arange(len(tokens)))
    programs = compile_piece(compile_rows(Selection((unit,), 1), shard, tile=tile), shard, tile=tile)
    programs = [program for program in programs if program.items]
    found = permuted(unit, tokens, tile)
    assert [each.full for each in found] == [int(program.full_count.sum()) for program in programs]
    assert [each.full + each.partial for each in found] == [program.visits for program in programs]
    for each, program in zip(found, programs):
        sizes = program.row_ptr.diff()[program.item_rows.long()].tolist(), program.key_ptr.diff().tolist()
        computed = [cut.split(sizes[1], 1) for cut in (each.state_RN != State.SKIPPED).split(sizes[0], 0)]
        assert {(n, t) for n, cut in enumerate(computed) for t, pairs in enumerate(cut) if pairs.any()} == met(program)
        assert all(pairs.all() or not pairs.any() for cut in computed for pairs in cut)


def met(program: TileProgram) -> set[tuple[int, int]]:
    """(item, tile of keys) of all entries, read one after another."""
    found = set()
    for kind in ("full", "part"):
        ptr, first, count = (getattr(program, f"{kind}_{name}").tolist() for name in ("ptr", "tile", "count"))
        for item in range(program.items):
            for entry in range(ptr[item], ptr[item + 1]):
                found |= {(item, first[entry] + n) for n in range(count[entry])}
    return found


@settings(deadline=None, max_examples=60)
@given(maps, head_plans)
def test_illustrations_are_what_a_request_could_have_found(tokens, head_plan):
    unit = illustrate(head_plan, tokens)
    assert [(panel.rows, panel.keys, panel.pattern) for panel in unit.panels] == panels(head_plan, tokens.modalities)
    again = illustrate(head_plan, tokens)
    for panel, other in zip(unit.panels, again.panels):
        for table, same in zip(panel.chosen.tables(), other.chosen.tables()):
            assert torch.equal(table, same)
        match panel.pattern:
            case VerticalSlash(vertical=vertical, slash=slash):
                keys = (tokens.modality == panel.keys) if panel.keys is not None else torch.ones(len(tokens))
                after_sink = int(keys[panel.pattern.sink :].sum())
                assert len(panel.chosen.columns.unique()) == min(vertical, after_sink)
                blocks = -(-len(tokens) // BLOCK)
                assert len(panel.chosen.diagonals.unique()) == min(-(-slash // BLOCK), blocks)
            case Grid(phases=phases, slash=slash):
                starts = tokens.classes(panel.chosen.axis).starts
                sizes = [stop - start for start, stop in pairwise(starts)]
                lines = phases * (panel.pattern.vertical or panel.pattern.horizontal)
                assert len(panel.chosen.classes.unique()) == sum(min(size, lines) for size in sizes)
                assert len(panel.chosen.shifts.unique(dim=0)) == sum(min(size, slash) for size in sizes)
                assert not len(panel.chosen.classes) or int(panel.chosen.classes.max()) < starts[-1]
