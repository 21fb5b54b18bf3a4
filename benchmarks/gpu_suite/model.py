"""Prefill of a decoder of 7B shape with random weights: what sparse attention does to the time of a whole model.

Work, not accuracy: with random weights nothing is worth attending to. All layers run, each with weights of its own, in
plain torch modules: no fusion of norms, rotary embedding and activation, so dense and sparse pay more than a server
does for what they share. Embedding, vision tower and the head for one row are left out; selections are given, the guard
is off. Linear maps run over some rows at a time. S tokens, C rows of a chunk, E hidden, Hq, Hkv heads, D head dim.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.gpu_suite.ceilings import MATMUL
from benchmarks.gpu_suite.dense import baselines
from benchmarks.gpu_suite.prompts import video_prompt
from benchmarks.gpu_suite.selections import layer_selection, mean_density
from benchmarks.gpu_suite.sizes import Decoder, Point
from benchmarks.gpu_suite.sparse import forget_plans
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.timing import Timing, once, summary
from sglang_mm.kernels import sparse_attention
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows

NOTE = "model: work, not accuracy (random weights, fixed selections, guard off, no vision tower, plain torch modules)"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [S, Hq, D], k, v [S, Hkv, D] to out [S, Hq, D]."""


class Layer(nn.Module):
    """Of Qwen2.5: biases on q, k and v alone, rotary embedding, gated MLP, RMS norms."""

    def __init__(self, shape: Decoder, dtype: torch.dtype, device: torch.device, draw: torch.Generator):
        super().__init__()
        self.shape = shape

        def weight(outputs: int, inputs: int) -> nn.Parameter:
            values = torch.randn(outputs, inputs, dtype=dtype, device=device, generator=draw)
            return nn.Parameter(values.mul_(inputs**-0.5), requires_grad=False)

        widths = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.qkv = weight(widths[0] + 2 * widths[1], shape.hidden)
        self.qkv_bias = nn.Parameter(torch.zeros_like(self.qkv[:, 0]), requires_grad=False)
        self.out = weight(shape.hidden, widths[0])
        self.gate_up = weight(2 * shape.mlp, shape.hidden)
        self.down = weight(shape.hidden, shape.mlp)
        self.norms = nn.Parameter(torch.ones(2, shape.hidden, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x_SE: Tensor, cos_SD: Tensor, sin_SD: Tensor, attend: Attention) -> None:
        """Changes x in place."""
        shape, size = self.shape, len(x_SE)
        chunks = [slice(first, first + shape.chunk) for first in range(0, size, shape.chunk)]
        counts = shape.heads, shape.kv_heads, shape.kv_heads
        q, k, v = (x_SE.new_empty(size, count, shape.head_dim) for count in counts)
        for at in chunks:
            mixed = linear(rms_norm(x_SE[at], (shape.hidden,), self.norms[0]), self.qkv, self.qkv_bias)
            parts = mixed.view(-1, sum(counts), shape.head_dim).split(counts, dim=1)
            q[at], k[at] = (_rotate(part, cos_SD[at], sin_SD[at]) for part in parts[:2])
            v[at] = parts[2]
        attended = attend(q, k, v)
        del q, k, v
        for at in chunks:
            x_SE[at] += linear(attended[at].flatten(1).to(x_SE.dtype), self.out)
        del attended
        for at in chunks:
            both = linear(rms_norm(x_SE[at], (shape.hidden,), self.norms[1]), self.gate_up)
            gate, up = both.chunk(2, dim=-1)
            x_SE[at] += linear(silu(gate).mul_(up), self.down)


def time_model(suite: Suite, tokens: int) -> None:
    """Dense, then the fastest backend at every density."""
    sizes, shape, backend = suite.sizes, suite.sizes.decoder, suite.fastest
    suite.report.note(NOTE)
    draw = torch.Generator(suite.device).manual_seed(5)
    layers = [Layer(shape, sizes.dtype, suite.device, draw) for _ in range(shape.layers)]
    point = Point(tokens, shape.heads, shape.kv_heads)
    with torch.inference_mode():
        dense_s, dense_is = _dense(suite, layers, point)
        if backend is not None:
            _sparse(suite, layers, point, backend, dense_s, dense_is)


def _sparse(
    suite: Suite, layers: list[Layer], point: Point, backend: str, dense_s: float | None, dense_is: str
) -> None:
    tokens = point.tokens
    prompt = video_prompt(tokens, suite.device, suite.sizes.frame)
    shard = Shard(prompt.tokens, torch.arange(tokens, device=suite.device))
    for share in suite.sizes.shares:
        cost = _linear_s(suite, tokens) + len(layers) * suite.expected(point, share)
        if not suite.budget.allows(f"model of {tokens} tokens at {100 * share:g} %", 1.3 * cost):
            continue
        selection = layer_selection(prompt, point.heads, point.kv_heads, share)

        def attend(q, k, v):
            forget_plans(backend)
            programs = compile_piece(compile_rows(selection, shard), shard)  # noqa: B023
            return sparse_attention(q, k, v, programs, scale=q.shape[2] ** -0.5, backend=backend)[0]

        where = {"tokens": tokens, "backend": backend, "aim": f"{100 * share:g} %"}
        with suite.trying(backend, f"model of {tokens} tokens at {where['aim']}"):
            seconds = _prefill(suite, layers, tokens, attend)
            figures: dict[str, object] = {"density": mean_density(selection, prompt)}
            if dense_s:
                figures |= {"dense s": dense_s, "dense is": dense_is, "times dense": dense_s / seconds.median}
            suite.report.add("model", where, seconds, **figures)
        suite.free()


def _dense(suite: Suite, layers: list[Layer], point: Point) -> tuple[float | None, str]:
    """Seconds with the best dense baseline, and whether they are measured, or predicted from what is."""
    name = next(iter(suite.by_speed(point)), None)
    if name is None:
        return None, ""
    where = {"tokens": point.tokens, "backend": f"dense, {name}", "aim": "100 %"}
    predicted, how = predict(suite, point)
    cost = predicted or _linear_s(suite, point.tokens) + len(layers) * suite.expected(point)
    if suite.budget.allows(f"dense model of {point.tokens} tokens", 1.2 * cost):
        attend = baselines(suite.device)[name]()
        with suite.trying(name, f"dense model of {point.tokens} tokens"):
            seconds = _prefill(suite, layers, point.tokens, lambda q, k, v: attend(q, k, v, q.shape[2] ** -0.5))
            suite.ladder[point.tokens] = seconds.median
            suite.report.add("model", where, seconds)
            return seconds.median, "measured"
    suite.free()
    if predicted:
        suite.report.add("model", where, None, **{"dense s": predicted, "dense is": how})
    return predicted, how


def predict(suite: Suite, point: Point) -> tuple[float | None, str]:
    """Seconds of the dense model, and from what. Attention as it was measured at this very point, and the rest in
    proportion to the tokens, is better than to extrapolate both."""
    layers, rest = suite.sizes.decoder.layers, {}
    for tokens, seconds in suite.ladder.items():
        timed = suite.best_dense(replace(point, tokens=tokens))
        if timed:
            rest[tokens] = max(0.0, seconds - layers * timed[1].median)
    here = suite.best_dense(point)
    if here and rest:
        longest = max(rest)
        seconds = rest[longest] * point.tokens / longest + layers * here[1].median
        return seconds, f"computed: {layers} times the attention measured here, the rest from {longest} tokens"
    return extrapolate(suite.ladder, point.tokens), f"extrapolated from {', '.join(map(str, suite.ladder))} tokens"


def extrapolate(ladder: dict[int, float], tokens: int) -> float | None:
    """Seconds at `tokens` by a S + b S^2, of the least relative errors at measured lengths; None for fewer than two."""
    if len(ladder) < 2:
        return None
    size, seconds = torch.tensor([*ladder.items()], dtype=torch.float64).T
    terms = torch.stack([size, size**2], 1) / seconds[:, None]
    scale = terms.norm(dim=0)
    fit = torch.linalg.lstsq(terms / scale, torch.ones_like(seconds)[:, None]).solution[:, 0] / scale
    return float(fit @ torch.tensor([tokens, tokens**2], dtype=torch.float64))


def _prefill(suite: Suite, layers: Iterable[Layer], tokens: int, attend: Attention) -> Timing:
    """One run of all layers, after one of the first layer that is not timed."""
    shape = suite.sizes.decoder
    draw = torch.Generator(suite.device).manual_seed(6)
    x = torch.randn(tokens, shape.hidden, dtype=suite.sizes.dtype, device=suite.device, generator=draw)
    rotary = _rotary(tokens, shape.head_dim, x)
    [first, *_] = layers
    first(x, *rotary, attend)

    def run():
        for layer in layers:
            layer(x, *rotary, attend)

    seconds = summary([once(run, suite.device)])
    if not bool(x[:: max(1, tokens // 64)].isfinite().all()):
        suite.report.fail(f"model of {tokens} tokens", "its hidden states are not finite")
    return seconds


def _linear_s(suite: Suite, tokens: int) -> float:
    """What everything but attention should take, at two thirds of the measured matrix rate."""
    shape = suite.sizes.decoder
    rate = suite.ceilings.get(MATMUL, 3e14)
    return 2 * tokens * shape.layers * shape.weights / (rate * 2 / 3)


def _rotary(tokens: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    frequency = 1e6 ** (-torch.arange(0, head_dim, 2, device=like.device) / head_dim)
    angle_SD = torch.outer(torch.arange(tokens, device=like.device), frequency).repeat(1, 2)
    return angle_SD.cos().to(like.dtype), angle_SD.sin().to(like.dtype)


def _rotate(x_CHD: Tensor, cos_CD: Tensor, sin_CD: Tensor) -> Tensor:
    left, right = x_CHD.chunk(2, dim=-1)
    return x_CHD * cos_CD[:, None] + torch.cat([-right, left], dim=-1) * sin_CD[:, None]
