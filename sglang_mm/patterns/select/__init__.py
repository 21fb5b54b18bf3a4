"""The online selection: what each head of a layer attends to in this prompt, found from a few rows of its own.

    select(head_plans, q, k, rows, keys, scale=...)     with a plan         -> (Selection, Report)
    auto_select(units, layer, q, k, rows, keys, ...)    without one         -> (Selection, Report)

    probe  ->  masses  ->  lines, phases, pooled  ->  recall  ->  kept, blocks or dense
    64 rows    per key     sets for each pattern      exact       with a reason

Every rank calls with its own rows and keys, and with `peers` to reach the others; all hold the same selection.
"""

from sglang_mm.patterns.select.auto import auto_select, candidates_for
from sglang_mm.patterns.select.peers import Alone, Peers
from sglang_mm.patterns.select.planned import select
from sglang_mm.patterns.select.report import Report, Trial, Verdict

__all__ = ["Alone", "Peers", "Report", "Trial", "Verdict", "auto_select", "candidates_for", "select"]
