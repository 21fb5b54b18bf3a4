"""The question, asked of one server densely and sparsely, and the two answers beside each other."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sglang_mm.demo import server
from sglang_mm.demo.reference import TOP, top_logprobs

SPARSE_FLAGS = ("--sparse", "auto", "--sparse-min-tokens", "512")
DENSE_REQUEST = {"sparse": "off"}  # custom_params by which a request asks a sparse server for dense attention
LEAST_RECALL = 0.9  # what the server itself asks of every head that leaves keys out
SHOWN_TOKENS = 6


@dataclass(frozen=True)
class Side:
    """Two answers to the same question: streamed, with its record, and from SGLang's native endpoint, with values."""

    streamed: dict
    ran: dict
    answer: dict

    @property
    def record(self) -> dict:
        """Of the native answer: the server is warm by then."""
        return self.answer["meta_info"]["sglang_mm"][0]

    @property
    def stock_reasons(self) -> list[str]:
        return sorted({*self.ran["fallbacks"], *self.record["fallbacks"]})

    @property
    def cached_tokens(self) -> int:
        return max(self.ran["cached_tokens"], self.answer["meta_info"]["cached_tokens"])


def ask_both(url: str, prompt: str, video: Path, question: str, new_tokens: int, sparse: bool, say) -> dict[str, Side]:
    """`dense`, and `sparse` of a sparse server. Each comes once before and once after the other.

    The prefix cache is emptied before each round, and not between the two: neither may find K/V of the other.
    """
    kinds = {"dense": DENSE_REQUEST, "sparse": None} if sparse else {"dense": None}
    streamed, ran = {}, {}
    server.forget(url)  # SGLang's own first request left some, under the server's key
    for kind, params in kinds.items():
        say(f"{f'{kind} answer' if sparse else 'answer'}:".ljust(16 if sparse else 10), end="")
        streamed[kind] = server.ask(url, video, question, new_tokens, lambda t: say(repr(t)[1:-1], end=""), params)
        say("")
        ran[kind] = server.record(url, streamed[kind]["id"])
    server.forget(url)
    asked = reversed(kinds.items())
    answers = {kind: server.generate(url, prompt, video, new_tokens, TOP, params) for kind, params in asked}
    return {kind: Side(streamed[kind], ran[kind], answers[kind]) for kind in kinds}


def compare_sides(dense: Side, sparse: Side) -> dict:
    """What the sparse answer adds to the demo's JSON object; seconds are means over the ranks."""
    told = sparse.record.get("sparse") or {"dense": "; ".join(sparse.stock_reasons)}
    if "dense" in told:  # why all of it is
        told = {"density": 1.0, "recall": 1.0, "fallbacks": {told["dense"]: 1}, "layers": [], "kernels": []}
    cached = {"dense": dense.cached_tokens, "sparse": sparse.cached_tokens}
    density, recall = told["density"], told["recall"]
    return {
        "density": round(density, 4),
        "density_by_layer": [round(layer["attended"] / layer["causal"], 4) for layer in told["layers"]],
        "recall": round(recall, 4),
        "fallbacks": told["fallbacks"],
        "not_sharded": sorted({*dense.stock_reasons, *sparse.stock_reasons}),
        "kernels": told["kernels"],
        "seconds": {"over_ranks": "mean", "dense": mean_seconds(dense.record), "sparse": mean_seconds(sparse.record)},
        "cached_tokens": cached,
        "sparse_output_tokens": sparse.answer["output_ids"],
        "sparse_ttft_s": round(sparse.streamed["ttft_s"], 3),
        "kept": kept(dense.answer, sparse.answer),
        "sparse_in_bounds": bool(recall >= LEAST_RECALL and density < 1 and not any(cached.values())),
    }


def mean_seconds(record: dict) -> dict[str, float]:
    return {stage: round(fmean(each), 4) for stage, each in record.get("seconds", {}).items() if any(each)}


def kept(dense: dict, sparse: dict) -> dict:
    """How far a sparse answer is from the dense one: a figure, with nothing to pass.

    equal_tokens: before the first that differs. max_logprob_diff: of tokens that both have among their TOP, up to the
    step of that first one; what follows answers another text.
    """
    mine, other = sparse["output_ids"], dense["output_ids"]
    equal = next((n for n, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))
    rows = list(zip(top_logprobs(sparse), top_logprobs(dense)))[: equal + 1]
    largest = max((abs(a[token] - b[token]) for a, b in rows for token in a.keys() & b.keys()), default=float("inf"))
    return {"max_logprob_diff": largest, "equal_tokens": equal}


def table(result: dict) -> str:
    """Dense and sparse side by side."""
    by_layer = " ".join(f"{density:.2f}" for density in result["density_by_layer"])
    seconds = result["seconds"]
    stages = [stage for stage in seconds["sparse"] or seconds["dense"] if stage != "total"]
    rows = [
        ("density", "1", f"{result['density']:.2f}", by_layer and f"by layer {by_layer}"),
        ("lowest recall", "1", f"{result['recall']:.3f}", f"{LEAST_RECALL} or more wherever keys are left out"),
        *((stage, *_times(seconds, stage), "") for stage in stages),
        ("whole prefill", *_times(seconds, "total"), "seconds, means over the ranks"),
        ("first token", f"{result['ttft_s']:.3f}", f"{result['sparse_ttft_s']:.3f}", "seconds until a client has it"),
        ("found in cache", *map(str, result["cached_tokens"].values()), "of the other's tokens"),
    ]
    tokens = (result["output_tokens"], result["sparse_output_tokens"])
    lines = [f"{'':16}{'dense':>10}{'sparse':>10}"]
    lines += [f"{name:16}{dense:>10}{sparse:>10}  {note}".rstrip() for name, dense, sparse, note in rows]
    lines += [f"first tokens    {' '.join(map(str, each[:SHOWN_TOKENS]))} ({kind})" for kind, each in
              zip(("dense", "sparse"), tokens)]  # fmt: skip
    lines += [f"left dense      {count} x {reason}" for reason, count in result["fallbacks"].items()]
    return "\n".join(lines)


def verdict(result: dict) -> list[str]:
    """Of the sparse answer, for people."""
    same, found, seconds = result["kept"], len(result["sparse_output_tokens"]), result["seconds"]
    lines = [
        f"sparse against dense: {same['equal_tokens']} of {found} tokens equal, log-probabilities differ by up to "
        f"{same['max_logprob_diff']:.1e} (a figure: sparse answers are not exact)",
        f"sparse answer {'within' if result['sparse_in_bounds'] else 'NOT within'} its bounds: recall of "
        f"{LEAST_RECALL} or more, density below 1, no K/V of dense requests",
    ]
    if seconds["sparse"].get("total", 0) > seconds["dense"].get("total", float("inf")):
        lines.append("sparse was slower: for a prompt this short the selection costs more than the attention it saves")
    return lines


def _times(seconds: dict, stage: str) -> tuple[str, str]:
    found = (seconds[kind].get(stage) for kind in ("dense", "sparse"))
    return tuple(f"{value:.3f}" if value else "-" for value in found)
