"""One prefill batch, sparsely: per layer and request what each head attends to, then its tile programs, piece by piece.

    q, k of a layer --select, over all ranks--> selection --compile_rows--> rows --compile_piece--> programs of a piece

Selection and rows are made once per layer; each piece that comes by gets its programs. A request of the batch that is
not to be sparse, and a layer whose heads are all dense, take dense attention.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import causal_attention
from sglang_mm.kernels.problem import problem_of
from sglang_mm.kernels.selector import choose_backend, sparse_attention
from sglang_mm.parallel.pieces import State
from sglang_mm.parallel.transport import Transport
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.patterns.select.shared import share_blocks
from sglang_mm.serving.peers import RingPeers
from sglang_mm.serving.prompts import Known, KnownPrompts
from sglang_mm.serving.sparse_keep import Keeper
from sglang_mm.serving.sparse_method import SparseMethod
from sglang_mm.serving.sparse_record import SparseLog
from sglang_mm.types import BatchLayout, Residence, page_for

Watch = Callable[[str], AbstractContextManager]
KeysOf = Callable[[int], Tensor]
"""request -> K [K, Hkv, D] of the keys in `SparsePrefill.own_positions`."""


@dataclass(frozen=True, eq=False)
class SparsePrefill:
    """Of one rank. known: the requests that are sparse, of `prompts`; log: for the record; keeper: for files.

    cached: as in PrefillPlan. residence: who keeps which cached keys.
    """

    method: SparseMethod
    layout: BatchLayout
    residence: Residence
    cached: str
    transport: Transport
    known: Mapping[int, Known]
    prompts: KnownPrompts
    log: SparseLog
    watch: Watch
    keeper: Keeper | None = None

    def __post_init__(self):
        object.__setattr__(self, "_peers", RingPeers(self.transport))
        object.__setattr__(self, "_shards", {})

    def own_cached(self, request: int) -> Tensor:
        """int64 CPU, ascending: positions of the cached keys that this rank scores for a selection, and no other."""
        ring = self.transport
        shared = self.residence if self.residence.ranks > 1 else Residence(ring.size, ring.rank, page_for(ring.size))
        return shared.positions(0, self.layout.requests[request].start)

    def own_positions(self, request: int) -> Tensor:
        """The same of all keys: then come those of its rows."""
        return torch.cat([self.own_cached(request), self.layout.requests[request].rows[self.transport.rank]])

    def layer(self, layer: int, q: Tensor, keys_of: KeysOf, scale: float) -> "SparseLayer":
        """Selects for every sparse request. q [T, Hq, D]: this rank's rows of the batch. Collective."""
        segments, selections = self.layout.segments(self.transport.rank), {}
        for request, known in self.known.items():
            began = perf_counter()
            with self.watch("index"):
                selections[request] = self._select(layer, request, known, q[segments[request]], keys_of, scale)
            self.log.took(request, layer, index_s=perf_counter() - began)
        return SparseLayer(self, layer, selections, scale)

    def _select(self, layer: int, request: int, known: Known, q: Tensor, keys_of: KeysOf, scale: float) -> Selection:
        own = self.layout.requests[request]
        rows = self.shard(request, ("rows", self.transport.rank), own.rows[self.transport.rank])
        keys = self.shard(request, "own", self.own_positions(request))
        chunk, previous = range(own.start, own.start + own.length), known.masses.get(layer)
        selection, report = self.method.select(
            layer, q, keys_of(request), rows, keys, scale=scale, peers=self._peers, chunk=chunk, previous=previous
        )
        if chunk.stop < len(known.tokens):  # they are for the next chunk
            known.masses[layer] = report.class_masses
        if self.cached == "queries" or self.keeper:  # else the lists of its own rows are all that a rank needs
            selection = share_blocks(selection, self._peers)
        if self.keeper:
            self.keeper.add(known, chunk, layer, selection, report)
        self.log.selected(request, layer, selection, report, known.tokens, chunk)
        return selection

    def shard(self, request: int, name, positions: Tensor) -> Shard:
        """Made once per batch for each name; it serves all layers."""
        if (request, name) not in self._shards:
            tokens = self.known[request].tokens
            self._shards[request, name] = Shard(tokens, positions.to(tokens.modality.device))
        return self._shards[request, name]

    def done(self) -> None:
        """When all layers have run."""
        for request, known in self.known.items():
            own = self.layout.requests[request]
            known.until = own.start + own.length  # where its next chunk has to begin
            if known.is_done:
                self.prompts.forget(known)
                if self.keeper:
                    self.keeper.save(known, self.method.group)


class SparseLayer:
    """Attention of one layer, as parallel.pieces.Attend."""

    def __init__(self, prefill: SparsePrefill, layer: int, selections: Mapping[int, Selection], scale: float):
        self._prefill, self._layer, self._scale = prefill, layer, scale
        self._selections = {n: found for n, found in selections.items() if not found.is_dense}
        self._rows = {}

    def __call__(self, request, source, heads, q, k, v, positions_q, positions_k) -> State:
        name = ("rows", self._prefill.transport.rank)
        return self._attend(request, name, ("keys", source), heads, q, k, v, positions_q, positions_k)

    def over_resting(self, request: int, rank: int, q, k, v, positions_q, positions_k) -> State:
        """Rows of another rank over the cached keys that rest with this one."""
        names = ("rows", rank), ("keys", "resting")
        return self._attend(request, *names, slice(None), q, k, v, positions_q, positions_k)

    def _attend(self, request, rows_name, keys_name, heads, q, k, v, positions_q, positions_k) -> State:
        if request not in self._selections:
            return causal_attention(q, k, v, positions_q, positions_k, scale=self._scale)
        prefill, began = self._prefill, perf_counter()
        with prefill.watch("compile"):
            rows = self._compiled_rows(request, rows_name, heads, positions_q)
            programs = compile_piece(rows, prefill.shard(request, keys_name, positions_k))
        prefill.log.took(request, self._layer, compile_s=perf_counter() - began)
        state, given = None, {"scale": self._scale, "watch": prefill.watch}
        by_backend = {}
        for program in programs:
            by_backend.setdefault(self._backend(q, k, program), []).append(program)
            prefill.log.ran(request, self._layer, program)
        for backend, some in by_backend.items():
            state = sparse_attention(q, k, v, some, backend=backend, state=state, **given)
        return state

    def _compiled_rows(self, request: int, name, heads: slice, positions: Tensor):
        key = (request, name, heads.start, heads.stop)
        if key not in self._rows:
            selection = self._selections[request]
            if heads != slice(None):
                selection = selection.of_kv_heads(heads.start, heads.stop)
            self._rows[key] = compile_rows(selection, self._prefill.shard(request, name, positions))
        return self._rows[key]

    def _backend(self, q: Tensor, k: Tensor, program) -> str:
        """What --kernel-backend names, or, for a program that it cannot run, the next best: a request never fails for
        its program's size.
        """
        asked, problem, log = self._prefill.method.backend, problem_of(q, k, program), self._prefill.log
        try:
            choice = choose_backend(problem, asked)
        except ConfigError as error:
            log.passed_over(str(error.given))
            choice = choose_backend(problem)
        log.kernels.add(choice.backend)
        return choice.backend
