"""Every choice of one probe: which sets make which pattern, from one pass of masses for all candidates together."""

from collections.abc import Mapping, Sequence

from sglang_mm.patterns.catalog import Blocks, Grid, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import Chosen, Nothing
from sglang_mm.patterns.select.held import Heads, Held
from sglang_mm.patterns.select.lines import choose_lines
from sglang_mm.patterns.select.masses import Want, measure_masses
from sglang_mm.patterns.select.phases import ClassMass, choose_phases
from sglang_mm.patterns.select.pooled import choose_blocks
from sglang_mm.patterns.select.probe import Probe
from sglang_mm.types import Modality

ClassKey = tuple[Heads, Modality | None, Modality | None, Pattern]
ClassMasses = Mapping[ClassKey, ClassMass]
"""Running class masses of a prompt that comes in chunks: by heads, rows, keys and grid."""


def choose(
    held: Held, probe: Probe, units: Sequence[Heads], wants: Sequence[Want], previous: ClassMasses
) -> tuple[list[Chosen], dict[ClassKey, ClassMass]]:
    """What each want takes, the same on all ranks, and the class masses with those of `previous` in them."""
    found: list[Chosen] = [Nothing()] * len(wants)
    running: dict[ClassKey, ClassMass] = {}

    def fill(kind: type, chosen_of) -> None:
        numbers = [number for number, want in enumerate(wants) if isinstance(want.pattern, kind)]
        if numbers:
            for number, chosen in zip(numbers, chosen_of([wants[number] for number in numbers])):
                found[number] = chosen

    def phases_of(grids: Sequence[Want]):
        keys = [(units[want.unit], probe.modality, want.keys, want.pattern) for want in grids]
        chosen, sums = choose_phases(held, masses, grids, [previous.get(key) for key in keys])
        running.update(zip(keys, sums))
        return chosen

    if any(isinstance(want.pattern, VerticalSlash | Grid) for want in wants):
        masses = measure_masses(held, probe, units, wants)
    fill(VerticalSlash, lambda lines: choose_lines(held, masses, lines))
    fill(Grid, phases_of)
    fill(Blocks, lambda blocks: choose_blocks(held, probe, units, blocks))
    return found, running
