"""Which requests of a prefill batch are sparse, and why others are not."""

from dataclasses import dataclass

from sglang_mm.errors import ConfigError
from sglang_mm.parallel.transport import Transport
from sglang_mm.serving.prompts import Known, KnownPrompts, Prompt, prompts_of
from sglang_mm.serving.sparse_keep import Keeper
from sglang_mm.serving.sparse_method import SparseMethod
from sglang_mm.serving.sparse_prefill import SparsePrefill
from sglang_mm.serving.sparse_record import SparseLog, gather_told, join_replica, join_ring, record_of
from sglang_mm.types import BatchLayout

UNKNOWN = "SGLang's own request"
OWN_PATH = "the batch took SGLang's own path"
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
        return ",".join([method.title, *(f"{request}:{known.digest:x}" for request, known in self.known.items())])


def wants_sparse(forward_batch, prompts: KnownPrompts | None) -> bool:
    """Whether any request of an extend batch is to be sparse. prompts: None with --sparse off."""
    return prompts is not None and None in _why_dense(forward_batch, prompts)


def _why_dense(forward_batch, prompts: KnownPrompts) -> list[str | None]:
    """Per request, None for those that are to be sparse."""

    def of(prompt: Prompt | None, start: int) -> str | None:
        if prompt is None:
            return UNKNOWN
        if not prompt.is_sparse:
            return ASKED_DENSE
        return None if prompts.is_long(prompt, start) else FEW_TOKENS

    starts = forward_batch.extend_prefix_lens_cpu
    return [of(prompt, start) for prompt, start in zip(prompts_of(forward_batch), starts, strict=True)]


def choose_sparse(forward_batch, prompts: KnownPrompts) -> SparseChoice:
    """The same on every rank."""
    known, dense = {}, {}
    media = forward_batch.mm_inputs or [None] * forward_batch.batch_size
    found = zip(prompts_of(forward_batch), _why_dense(forward_batch, prompts), media, strict=True)
    for request, (prompt, why, mm_inputs) in enumerate(found):
        if why is not None:
            dense[request] = why
            continue
        try:
            known[request] = prompts.of(prompt, mm_inputs, forward_batch.extend_prefix_lens_cpu[request])
        except ConfigError as error:
            dense[request] = f"{UNCLEAR}: {error.given}"
    return SparseChoice(known, dense)


def told_of_stock(forward_batch, method: SparseMethod, prompts: KnownPrompts) -> list[dict]:
    """Per request what the record of a batch on SGLang's own path says of sparse attention."""
    return [_dense(method, why or OWN_PATH) for why in _why_dense(forward_batch, prompts)]


def _dense(method: SparseMethod, why: str) -> dict:
    return {"sparse": {"plan": method.title, "kernel_backend": method.backend, "dense": why}}


class SparsePart:
    """The sparse part of a batch's plan. replica: the T ranks that have the other heads of the same rows, if any."""

    def __init__(self, method: SparseMethod, choice: SparseChoice, prefill: SparsePrefill, replica: Transport | None):
        self.method, self.choice, self.prefill, self.replica = method, choice, prefill, replica

    def told(self, requests: int) -> list[dict]:
        """Per request what its record says of sparse attention. Collective."""
        if not self.choice.known:
            return [_dense(self.method, self.choice.dense[request]) for request in range(requests)]
        log, ring = self.prefill.log, self.prefill.transport
        by_rank = gather_told([log.told(request) for request in range(requests)], ring)
        joined = [join_ring(list(told)) for told in zip(*by_rank)]
        of_replica = gather_told(joined, self.replica)
        found = []
        for request in range(requests):
            if request in self.choice.dense:
                found.append(_dense(self.method, self.choice.dense[request]))
            else:
                whole = join_replica([told[request] for told in of_replica])
                found.append({"sparse": record_of(self.method.title, self.method.backend, whole)})
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
        prompts=model.mm_prompts,
        log=SparseLog(transport, method.heads),
        watch=watch,
        keeper=keeper,
    )
    return SparsePart(method, choice, prefill, model.mm_replica)
