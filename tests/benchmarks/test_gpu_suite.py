"""The suite's own parts: what it calls wrong, counts, estimates, skips and writes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_suite.__main__ import main
from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.cases import KINDS, cases
from benchmarks.gpu_suite.correctness import check_case
from benchmarks.gpu_suite.dense import contenders
from benchmarks.gpu_suite.facts import gather_facts
from benchmarks.gpu_suite.model import Layer, extrapolate, predict
from benchmarks.gpu_suite.prompts import image, prompt, text, video, video_prompt
from benchmarks.gpu_suite.report import Report
from benchmarks.gpu_suite.selections import dense_selection, layer_selection, mean_density
from benchmarks.gpu_suite.sizes import REHEARSAL, Decoder, Point
from benchmarks.gpu_suite.spot import check_rows, sample_rows
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import random_qkv
from benchmarks.gpu_suite.timing import Timing, _is_pytorchs, kernel_seconds, measure
from benchmarks.gpu_suite.work import attention_flops, dense_pairs, visited_pairs
from sglang_mm.errors import ConfigError
from sglang_mm.kernels import merge, selector, sparse_attention, tiles
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.plan.geometry import parse_geometry
from sglang_mm.types import INF
from sglang_mm.types.tokens import COLUMNS
from tests.exactness.decode import times_shown

CPU = torch.device("cpu")


def backend(attend, why=None):
    """attend(q, k, v, program, scale): out and lse of the program."""

    def merged(q, k, v, program, scale, out, lse, packer=None):
        merge(out, lse, *attend(q, k, v, program, scale))

    return SimpleNamespace(NAME="planted", unfit=lambda problem: why, attend=merged)


def reference(q, k, v, program, scale):
    return tiles.attend_tiles(q, k, v, program, scale=scale)


def rounded_results(q, k, v, program, scale):
    """What a kernel that can write 16 bits alone does."""
    out, lse = reference(q, k, v, program, scale)
    return out.to(q.dtype).to(out.dtype), lse


def rounded_scores(q, k, v, program, scale):
    """Scores that went through 16 bits: here by way of the queries, whose scaled values are rounded."""
    return reference((q * (scale * 1.4)).to(q.dtype), k, v, program, 1 / 1.4)


def without_last_visit(q, k, v, program, scale):
    count = program.full_count.clone()
    count[-1] -= 1
    return reference(q, k, v, replace(program, full_count=count), scale)


def without_windows(q, k, v, program, scale):
    bounds = program.bounds.clone()
    bounds[:, 1] = INF
    return reference(q, k, v, replace(program, bounds=bounds), scale)


def without_bits(q, k, v, program, scale):
    return reference(q, k, v, replace(program, part_live=torch.full_like(program.part_live, -1)), scale)


def with_unwritten_rows(q, k, v, program, scale):
    out, lse = reference(q, k, v, program, scale)
    out[-1] = float("nan")
    return out, lse


def with_base_two(q, k, v, program, scale):
    out, lse = reference(q, k, v, program, scale)
    return out, lse / 0.6931471805599453


def raising(q, k, v, program, scale):
    raise RuntimeError("out of shared memory")


def refusing(q, k, v, program, scale):
    raise ConfigError("a long list", "short ones", "take another backend")


def case_of(kind: str, dtype=torch.bfloat16):
    found = cases(replace(REHEARSAL, check_dtypes=(dtype,), check_frames=6), CPU)
    return next(case for case in found if case.name == kind)


def status(monkeypatch, attend, kind: str, dtype=torch.bfloat16):
    module = backend(attend)
    monkeypatch.setitem(selector.BACKENDS, "planted", module)
    truth, check = check_case(case_of(kind, dtype), {"planted": module}, CPU)
    assert truth.status == "green"
    return check.status, check.why


@pytest.mark.parametrize("kind", ["all patterns", "3 ranks", "rows without keys"])
@pytest.mark.parametrize("attend", [reference, rounded_results])
def test_what_rounds_as_a_kernel_does_is_green(monkeypatch, attend, kind):
    assert status(monkeypatch, attend, kind) == ("green", "")


@pytest.mark.parametrize(
    ("attend", "kind", "dtype"),
    [
        (without_last_visit, "dense", torch.bfloat16),
        (without_windows, "a_shape", torch.bfloat16),
        (without_bits, "vertical_slash", torch.bfloat16),
        (with_unwritten_rows, "dense", torch.bfloat16),
        (with_base_two, "dense", torch.bfloat16),
        (rounded_scores, "dense", torch.bfloat16),
        (lambda *given: [each.bfloat16().float() for each in reference(*given)], "dense", torch.float32),
        (raising, "dense", torch.bfloat16),
    ],
)
def test_a_planted_fault_is_red(monkeypatch, attend, kind, dtype):
    found, why = status(monkeypatch, attend, kind, dtype)
    assert found == "red" and why


def test_what_is_refused_in_words_is_unfit(monkeypatch):
    found, why = status(monkeypatch, refusing, "dense")
    assert found == "unfit" and why.startswith("a long list.")


def test_what_is_red_is_reported_and_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(selector.BACKENDS, "planted", backend(without_windows))
    assert main(["--rehearse", "--out", str(tmp_path), "--steps", "sparse"]) == 1
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert {each["where"]["backend"] for each in found["measurements"] if each["step"] == "sparse"} == {"cpu"}
    assert "- RED planted, a_shape" in (tmp_path / "rehearsal.md").read_text()


def test_a_step_that_fails_is_reported_and_the_next_one_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gpu_suite.jobs.measure_ceilings", lambda suite: 1 / 0)
    monkeypatch.setattr("benchmarks.gpu_suite.jobs.check_backends", lambda suite: None)
    assert main(["--rehearse", "--out", str(tmp_path), "--steps", "ceilings", "ring"]) == 1
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert found["failures"] == [["ceilings", "ZeroDivisionError: division by zero"]]
    assert found["skipped"] == [["ring, 1.17188K tokens, 4/2 heads", "no backend is green"]]


def test_a_dense_model_beyond_the_budget_is_extrapolated(monkeypatch, tmp_path):
    beyond, allows = "dense model of 512 tokens", Budget.allows
    monkeypatch.setattr(Budget, "allows", lambda self, what, cost: allows(self, what, 1e9 if what == beyond else cost))
    assert main(["--rehearse", "--out", str(tmp_path), "--steps", "model"]) == 0
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    assert [what for what, _ in found["skipped"]] == [beyond]
    dense, *sparse = [each for each in found["measurements"] if each["where"]["tokens"] == 512]
    assert (dense["seconds"], dense["figures"]["dense is"]) == (None, "extrapolated from 256, 384 tokens")
    assert [each["figures"]["dense is"] for each in sparse] == ["extrapolated from 256, 384 tokens"] * 2


def test_all_kinds_of_entries_occur_in_the_cases():
    found = {"full": 0, "live": 0, "several": 0}
    for kind in KINDS:
        case = case_of(kind)
        shard = Shard(case.prompt.tokens, torch.arange(len(case.prompt)))
        programs = compile_piece(compile_rows(case.selection, shard), shard)
        found["full"] += sum(len(program.full_tile) for program in programs)
        found["live"] += sum(int((program.part_live >= 0).sum()) for program in programs)
        found["several"] += len(programs) > 1
    assert all(found.values()), found


def test_prompts_are_what_the_builder_makes_of_them():
    parts = text(17), video(3, 5, 7, newline=True), text(70), image(6, 4), text(1), video(4, 3, 5), image(2, 2), text(9)
    words = "text:17,video:3x5x7+newline,text:70,image:6x4,text:1,video:4x3x5,image:2x2,text:9"
    made, built = prompt(parts, CPU), parse_geometry(words)
    assert made.tokens.grids == built.grids
    assert {name: torch.equal(getattr(made.tokens, name), getattr(built, name)) for name in COLUMNS} == dict.fromkeys(
        COLUMNS, True
    )
    assert [run.stop for run in made.runs][-1] == len(built) and len(video_prompt(70_001, CPU)) == 70_001


@pytest.mark.parametrize("share", [0.02, 0.05, 0.10])
@pytest.mark.parametrize("tokens", [2**16, 2**18])
def test_selections_are_about_as_dense_as_asked(share, tokens):
    """Within a fifth: phases are whole, and a class of 264 is 0.76 % of the pairs."""
    of = video_prompt(tokens, CPU)
    selection = layer_selection(of, 7, 1, share)
    assert abs(mean_density(selection, of) / share - 1) < 0.2
    assert mean_density(dense_selection(4, 2), of) == 1


def test_visited_pairs_are_those_of_the_tiles():
    case = case_of("all patterns")
    shard = Shard(case.prompt.tokens, torch.arange(len(case.prompt)))
    for program in compile_piece(compile_rows(case.selection, shard), shard):
        tables = replace(program, bounds=torch.tensor([[-INF, INF, 0, INF]]).int().expand_as(program.bounds))
        everything = replace(tables, part_live=torch.full_like(program.part_live, -1))
        shown = times_shown(everything).sum((1, 2)).tolist()
        assert visited_pairs(program) == sum(len(heads) * pairs for heads, pairs in zip(program.heads, shown))
    assert (dense_pairs(4, 3), attention_flops(10, 8)) == (30, 320)


def test_rows_sampled_at_the_real_length_show_a_fault():
    of = video_prompt(3000, CPU, (3, 4))
    selection, keys = layer_selection(of, 4, 2, 0.3), Shard(of.tokens, torch.arange(3000))
    qkv = random_qkv(3000, 4, 2, 16, torch.bfloat16, CPU)
    programs = compile_piece(compile_rows(selection, keys), keys)
    sample = sample_rows(qkv, of, selection, keys, 0.25)
    out, lse = sparse_attention(*qkv, programs, scale=0.25)
    wrong = out.clone()
    wrong[2999] = wrong[2998]
    found = [check_rows("", "", torch.bfloat16, got, sample) for got in ((out.bfloat16(), lse), (wrong, lse))]
    found.append(check_rows("", "", torch.bfloat16, (out, lse + 1e-3), sample))
    assert [check.status for check in found] == ["green", "red", "red"]


def test_a_layer_in_chunks_is_the_layer():
    shape = Decoder(layers=1, hidden=32, heads=4, kv_heads=2, head_dim=8, mlp=64, chunk=7)
    draw = torch.Generator().manual_seed(0)
    layer = Layer(shape, torch.float64, CPU, draw)
    x = torch.randn(20, 32, dtype=torch.float64, generator=draw)
    angle = torch.outer(torch.arange(20.0), torch.tensor([1.0, 0.1, 0.01, 0.001])).double()

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()

    def rotated(x):
        turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    def attend(q, k, v):
        k, v = (each.repeat_interleave(2, 1).transpose(0, 1) for each in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True).transpose(0, 1)

    q, k, v = (norm(x) @ layer.qkv.T).view(20, 8, 8).split((4, 2, 2), 1)
    want = x + attend(rotated(q), rotated(k), v).flatten(1) @ layer.out.T
    gate, up = (norm(want) @ layer.gate_up.T).chunk(2, -1)
    want = want + (gate * gate.sigmoid() * up) @ layer.down.T
    tables = [part(angle).repeat(1, 2) for part in (torch.cos, torch.sin)]
    layer(x, *tables, attend)
    assert (x - want).abs().max() < 1e-11  # fp64 sums of at most 64 products of values below 10


def test_extrapolation_follows_the_square():
    ladder = {size: 3e-4 * size + 5e-9 * size**2 for size in (2**16, 2**17, 2**18)}
    assert extrapolate(ladder, 2**20) == pytest.approx(3e-4 * 2**20 + 5e-9 * 2**40, rel=1e-6)
    assert extrapolate({2**16: 1.0}, 2**20) is None


def test_the_budget_skips_what_does_not_fit():
    budget = Budget(10, now=iter([0.0, 1.0, 8.0, 8.0]).__next__)
    assert budget.allows("first", 9)
    assert not budget.allows("second", 9)
    assert budget.skipped == [("second", "needs about 9 s, 2 s of 10 s are left")]


@pytest.mark.parametrize(
    ("each", "before", "warm", "runs"),
    [(0.0, None, 30, 30), (0.03, None, 4, 17), (0.03, 0.2, 0, 17), (0.3, None, 1, 3), (3.0, None, 1, 1), (3, 3, 0, 1)],
)
def test_short_runs_are_repeated_after_a_warm_up_and_long_ones_are_not(monkeypatch, each, before, warm, runs):
    calls = []
    monkeypatch.setattr("benchmarks.gpu_suite.timing.once", lambda run, device: calls.append(run) or each)
    assert measure(lambda: None, CPU, seconds=0.5, before=before) == Timing(each, each, each, runs)
    assert len(calls) == warm + runs


def test_kernels_of_pytorch_are_told_from_others():
    theirs = ["void at::native::index_elementwise_kernel<128>", "Memcpy DtoD", "void compute_cuda_kernel<long>"]
    ours = ["attend_kernel", "join_kernel", "kernel_cutlass_flash_fwd", "void flashinfer::BatchPrefill<x>"]
    assert kernel_seconds(lambda: None, CPU) is None
    assert [*map(_is_pytorchs, theirs)] == [True] * 3 and [*map(_is_pytorchs, ours)] == [False] * 4


def test_a_result_is_named_by_day_and_device(tmp_path):
    facts = replace(gather_facts(CPU, "abc"), device="NVIDIA H200", date="2027-01-02", capability="sm_90")
    report = Report(facts, "quick", Budget(1), tmp_path)
    report.add("sparse", {"point": "64K", "backend": "triton"}, Timing(0.002, 0.0019, 0.0021, 5), rate=float("inf"))
    report.fail("fa4", torch.OutOfMemoryError("2 GB"))
    page = report.write()
    assert report.write() == page == tmp_path / "2027-01-02-nvidia-h200.md"
    assert Report(facts, "full", Budget(1), tmp_path).write().name == "2027-01-02-nvidia-h200-2.md"
    assert page.read_text().startswith("# NVIDIA H200, 2027-01-02 (quick)\n")
    assert "| 64K | triton | 2 ms | 10.0 % of 5 | inf |" in page.read_text()
    found = json.loads(page.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert found["measurements"][0]["seconds"] == {"median": 0.002, "low": 0.0019, "high": 0.0021, "n": 5}
    assert found["skipped"] == [["fa4", "OutOfMemoryError: 2 GB"]] and found["facts"]["commit"] == "abc"


def test_the_fastest_backend_is_timed_at_all_densities_of_the_longest_prompt():
    suite = Suite(CPU, REHEARSAL, Budget(1), None, green=("fa4", "triton"))
    assert suite.fastest == "fa4"
    short, long = Point(1024), Point(2048)
    for name, point, seconds in (("fa4", short, 1), ("triton", long, 2), ("triton", long, 2), ("fa4", long, 1)):
        suite.note_speed(name, point, seconds)
    assert suite.fastest == "triton"
    suite.lost = ("triton",)
    assert suite.fastest == "fa4"


def test_baselines_are_tried_by_their_times_at_the_length_before():
    one, two = Timing(1, 1, 1, 1), Timing(2, 2, 2, 1)
    suite = Suite(CPU, REHEARSAL, Budget(1), None, baselines=("SDPA", "FA3", "FA4"))
    assert contenders(suite, Point(512)) == 3
    suite.dense = {Point(1024): {"SDPA": two, "FA3": one}, Point(2048): {"FA4": one, "SDPA": two}}
    assert suite.by_speed(Point(512)) == suite.by_speed(Point(4096)) == ["FA4", "SDPA", "FA3"]
    assert suite.by_speed(Point(1024)) == ["FA3", "SDPA", "FA4"]
    assert suite.best_dense(Point(1024)) == ("FA3", one) and suite.best_dense(Point(512)) is None
    assert [contenders(suite, Point(size)) for size in (1024, 8192)] == [2, 1]  # LONG_S
    suite.lost = ("FA4",)
    assert suite.by_speed(Point(4096)) == ["SDPA", "FA3"]


def test_a_dense_model_is_computed_from_attention_measured_at_its_length():
    suite = Suite(CPU, replace(REHEARSAL, decoder=Decoder(layers=10)), Budget(1), None)
    short, long = Point(2**17), Point(2**20)
    suite.ladder = {2**16: 3.0, 2**17: 7.0}
    assert predict(suite, long) == (extrapolate(suite.ladder, 2**20), "extrapolated from 65536, 131072 tokens")
    suite.dense = {short: {"FA3": Timing(0.5, 0.5, 0.5, 3)}, long: {"FA3": Timing(30.0, 30, 30, 1)}}
    seconds, how = predict(suite, long)
    assert seconds == 10 * 30 + (7 - 10 * 0.5) * 8 and how.startswith("computed: 10 times the attention measured here")
