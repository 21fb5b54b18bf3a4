"""Which requests of a prefill batch are sparse, and why others are not."""

from dataclasses import dataclass

from sglang_mm.errors import ConfigError
from sglang_mm.parallel.transport import Transport
from sglang_mm.serving.prompts import Known, KnownPrompts, prompts_of
from sglang_mm.serving.sparse_keep import Keeper
from sglang_mm.serving.sparse_method import SparseMethod
from sglang_mm.serving.sparse_prefill import SparsePrefill
from sglang_mm.serving.sparse_record import SparseLog, gather_told, join_replica, join_ring, record_of
from sglang_mm.types import BatchLayout, digest64

ASKED_DENSE = "the request asked for dense attention"
FEW_TOKENS = "fewer new tokens than --sparse-min-tokens"
UNCLEAR = "media whose frames cannot be told apart"


@dataclass(frozen=True, eq=False)
class SparseChoice:
    """known: by request, the prompts of those that are sparse. dense: why the others are not."""

    known: dict[int, Known]
    dense: dict[int, str]

    def words(self, method: SparseMethod) -> str:
        """For the digest that ranks compare."""
        maps = [
            f"{request}:{digest64([len(known.tokens)], known.tokens.span.cpu(), known.tokens.place.cpu()):x}"
            for request, known in self.known.items()
        ]
        return ",".join([method.title, *maps])


def wants_sparse(forward_batch, fewest: int) -> bool:
    """Whether any request of an extend batch is to be sparse. fewest: new tokens of such a request."""
    lengths = forward_batch.extend_seq_lens_cpu
    found = zip(prompts_of(forward_batch), lengths)
    return any(prompt is not None and prompt.is_sparse and new >= fewest for prompt, new in found)


def choose_sparse(forward_batch, method: SparseMethod, prompts: KnownPrompts) -> SparseChoice:
    """The same on every rank."""
    known, dense = {}, {}
    starts, lengths = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    media = forward_batch.mm_inputs or [None] * len(lengths)
    found = zip(prompts_of(forward_batch), media, starts, lengths, strict=True)
    for request, (prompt, mm_inputs, start, new) in enumerate(found):
        if prompt is None or not prompt.is_sparse:
            dense[request] = ASKED_DENSE
        elif new < method.fewest:
            dense[request] = FEW_TOKENS
        else:
            try:
                known[request] = prompts.of(prompt, mm_inputs, start)
            except ConfigError as error:
                dense[request] = f"{UNCLEAR}: {error.given}"
    return SparseChoice(known, dense)


class SparsePart:
    """The sparse part of a batch's plan. replica: the T ranks that have the other heads of the same rows, if any."""

    def __init__(self, method: SparseMethod, choice: SparseChoice, prefill: SparsePrefill, replica: Transport | None):
        self.method, self.choice, self.prefill, self.replica = method, choice, prefill, replica

    def told(self, requests: int) -> list[dict]:
        """Per request what its record says of sparse attention. Collective."""
        log, ring = self.prefill.log, self.prefill.transport
        by_rank = gather_told([log.told(request) for request in range(requests)], ring)
        joined = [join_ring(list(told)) for told in zip(*by_rank)]
        tiles = [
            [sum(layer.tiles for layer in rank[request].layers) for rank in by_rank] for request in range(requests)
        ]
        of_replica = gather_told(joined, self.replica)
        found = []
        for request in range(requests):
            if request in self.choice.dense:
                found.append({"sparse": {"plan": self.method.title, "dense": self.choice.dense[request]}})
            else:
                whole = join_replica([told[request] for told in of_replica])
                found.append({"sparse": record_of(self.method.title, whole, tiles[request])})
        return found


def plan_sparse(model, choice: SparseChoice, layout: BatchLayout, cached: str, watch) -> SparsePart:
    """model: ours, with mm_sparse. watch: the stopwatch of the prefill."""
    method, transport = model.mm_sparse, model.mm_transport
    keeper = None
    if model.mm_config.keep_selections:
        writes = transport.rank == 0 and method.first == 0
        keeper = Keeper(model.mm_config.keep_selections, method.title, writes=writes)
    prefill = SparsePrefill(
        method=method,
        layout=layout,
        residence=model.mm_residence,
        cached=cached,
        transport=transport,
        known=choice.known,
        log=SparseLog(transport, method.heads),
        watch=watch,
        keeper=keeper,
    )
    return SparsePart(method, choice, prefill, model.mm_replica)
