"""From a selection to tile programs: which tiles of keys each tile of rows meets.

    rows = compile_rows(selection, Shard(tokens, pos_q))       once per layer
    for piece in ring:
        for program in compile_piece(rows, Shard(tokens, pos_k)):
            ...attend, merge...

Shards hold what no head changes and are made once per request. There is one program per piece, and one more for each
axis of class differences; a row's results over all pieces and programs are merged by log-sum-exp.
"""

from sglang_mm.patterns.program.compile import compile_piece, compile_rows
from sglang_mm.patterns.program.shard import Shard

__all__ = ["Shard", "compile_piece", "compile_rows"]
