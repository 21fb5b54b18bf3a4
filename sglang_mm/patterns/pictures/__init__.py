"""What a head attends to, drawn: `draw_plan` for a plan file, `draw_request` for what a request really did."""

from sglang_mm.patterns.pictures.draw import ILLUSTRATION, LONGEST, draw_plan, draw_unit
from sglang_mm.patterns.pictures.illustration import illustrate
from sglang_mm.patterns.pictures.request import draw_request

__all__ = ["ILLUSTRATION", "LONGEST", "draw_plan", "draw_request", "draw_unit", "illustrate"]
