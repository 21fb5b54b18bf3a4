"""What heads attend to by a plan does not depend on the nodes: pieces come in another order, and mean the same."""

import pytest
import torch

from sglang_mm.config import Config
from sglang_mm.kernels import causal_attention
from sglang_mm.parallel.gather import GatherTables, attend_gathered
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.ring import attend_pieces, ring_pieces
from sglang_mm.parallel.stopwatch import unwatched
from sglang_mm.patterns.plan import Model, Plan, one_of_each
from sglang_mm.patterns.plan_file import save
from sglang_mm.serving.prompts import Known, Prompt
from sglang_mm.serving.sparse_method import SparseMethod
from sglang_mm.serving.sparse_prefill import SparsePrefill
from sglang_mm.serving.sparse_record import SparseLog
from sglang_mm.types import BatchLayout, Residence, Run
from tests.token_maps import uniform_video

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
HEADS, KV_HEADS, DIM, SCALE, LAYERS = 8, 4, 16, 0.25, 2
TOKENS = uniform_video(frames=24, rows=4, cols=6)
RUNS = [Run(0, 20), Run(20, 24 * 24, 24, "video"), Run(20 + 24 * 24, 30)]
DRAW = torch.Generator().manual_seed(7)
Q, K, V = (torch.randn(len(TOKENS), heads, DIM, generator=DRAW).double() for heads in (HEADS, KV_HEADS, KV_HEADS))


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> SparseMethod:
    model = Model("Qwen2_5_VLForConditionalGeneration", layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    path = str(tmp_path_factory.mktemp("plan") / "plan.json")
    plan = Plan(model, one_of_each(model).layers, theta=0.01)  # so low that heads stay sparse over random keys
    save(plan, path)
    return SparseMethod(Config(sparse=path), first=0, heads=HEADS, group=HEADS // KV_HEADS)


def attended(schedule: str, method: SparseMethod, ranks: int, nodes: int) -> torch.Tensor:
    """[S, Hq, D] of all ranks in order of positions, of the last of two layers that share what is made once."""
    layout = BatchLayout((make_layout(RUNS, ranks),))
    rows = [own.tolist() for own in layout.requests[0].rows]

    def run(transport):
        log = SparseLog(transport, HEADS)
        known = {0: Known(Prompt("one", range(len(TOKENS)), True), TOKENS, digest=1)}
        residence = Residence(1, 0, 64)
        prefill = SparsePrefill(method, layout, residence, "none", transport, known, None, log, unwatched)
        q, k, v = (whole[rows[transport.rank]] for whole in (Q, K, V))
        counts = [len(own) for own in rows]
        for layer in range(LAYERS):
            attend = prefill.layer(layer, q, lambda request: k, SCALE)
            if schedule == "gather":
                tables = GatherTables(layout, "cpu")
                out = attend_gathered(q, k, v, tables, transport, scale=SCALE, attend=attend)
            else:
                pieces = ring_pieces(k, v, counts, transport)
                out = attend_pieces(q, layout, transport.rank, pieces, scale=SCALE, attend=attend)
        assert log.kernels and sum(layer.tiles for layer in log.told(0).layers)
        return out

    whole = torch.empty(len(TOKENS), HEADS, DIM, dtype=torch.float64)
    for own, out in zip(rows, run_ranks(run, ranks, nodes=nodes)):
        whole[own] = out
    return whole


@pytest.fixture(scope="module")
def alone(method) -> torch.Tensor:
    return attended("ring", method, 1, 1)


@pytest.mark.parametrize("schedule, ranks, nodes", [("ring", 6, 2), ("gather", 4, 2)])
def test_sparse_attention_on_several_nodes_is_that_of_one_rank(method, alone, schedule, ranks, nodes):
    torch.testing.assert_close(attended(schedule, method, ranks, nodes), alone, rtol=0, atol=1e-12)


def test_control_something_is_left_out(alone):
    positions = torch.arange(len(TOKENS))
    dense = causal_attention(Q, K, V, positions, positions, scale=SCALE)[0]
    assert (alone - dense).abs().max() > 1e-2
