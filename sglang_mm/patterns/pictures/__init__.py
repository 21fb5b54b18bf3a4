"""What a head attends to, drawn: `draw_plan` for a plan file, `draw_unit` for the sets of a request."""

from sglang_mm.patterns.pictures.draw import ILLUSTRATION, LONGEST, draw_plan, draw_unit
from sglang_mm.patterns.pictures.illustration import illustrate

__all__ = ["ILLUSTRATION", "LONGEST", "draw_plan", "draw_unit", "illustrate"]
