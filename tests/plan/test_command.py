"""The command: exit codes, messages, and what is printed."""

import subprocess
import sys

import pytest

from sglang_mm.patterns.boundary import Boundary2D, NoBoundary
from sglang_mm.patterns.catalog import Dense, Grid
from sglang_mm.patterns.plan import GroupPlan, LayerPlan, Model, Plan, one_of_each, uniform
from sglang_mm.patterns.plan_file import save
from sglang_mm.plan.__main__ import main
from sglang_mm.plan.show import table

CONFIG = (
    '{"architectures": ["A"], "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": %d, '
    '"hidden_size": 256}'
)
MODEL = Model("A", layers=2, heads=8, kv_heads=2, head_dim=32, name="tiny")
PLAN = one_of_each(MODEL)


@pytest.fixture
def plan(tmp_path):
    return save(PLAN, tmp_path / "plan.json")


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_check_as_a_user_runs_it(plan):
    command = [sys.executable, "-m", "sglang_mm.plan", "check", str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{plan} is sound. tiny: 2 layers x 8 heads, 2 K/V heads, theta 0.9")
    plan.write_bytes(plan.read_bytes()[:-40])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(f"sglang_mm: {plan}: ")


def test_check_compares_with_the_checkpoint(capsys, plan):
    (plan.parent / "config.json").write_text(CONFIG % 2)
    code, out, err = run(capsys, "check", plan, "--model-path", plan.parent)
    assert (code, err) == (0, "") and out.startswith(f"{plan} is sound and fits {plan.parent}. ")
    (plan.parent / "config.json").write_text(CONFIG % 4)
    code, out, err = run(capsys, "check", plan, "--model-path", plan.parent)
    assert (code, out) == (1, "")
    assert err.startswith(f"sglang_mm: {plan}: model.kv_heads: 2 in the plan, 4 in the model. ")


def test_show_is_a_letter_per_head(capsys, plan):
    code, out, _ = run(capsys, "show", plan)
    title, *rest = out.splitlines()
    assert code == 0 and title.startswith("tiny: 2 layers x 8 heads, 2 K/V heads, theta 0.9, digest ")
    assert rest == [
        "",
        "layer  group 0  group 1",
        "    0  G G A 2  T q B D",
        "    1  G G A 2  T q B D",
        "",
        "      heads",
        "G         4  25%  grid",
        "A         2  12%  a_shape",
        "2         2  12%  one per pair of modalities",
        "T         2  12%  tri_shape",
        "q         2  12%  one pattern per modality of the rows",
        "B         2  12%  blocks",
        "D         2  12%  dense",
    ]


def test_show_marks_heads_that_share_a_selection():
    grid, dense = NoBoundary(Grid()), NoBoundary(Dense())
    layers = [LayerPlan((GroupPlan(group=grid), GroupPlan(heads=(dense, grid, dense, dense)))) for _ in range(2)]
    lines = table(Plan(MODEL, tuple(layers))).splitlines()
    assert lines[3] == "    0  G = = =  D G D D"
    assert lines[-3:] == [
        "G        10  62%  grid",
        "D         6  38%  dense",
        "=                 shares the selection of the head before it",
    ]


def test_show_keeps_its_columns_where_groups_are_narrow():
    lines = table(uniform(Model("A", 1, 12, 12, 8), NoBoundary(Dense()))).splitlines()
    assert lines[2] == "layer  " + "  ".join(f"{k:<2}" for k in range(12)).rstrip()
    assert lines[3] == "    0  " + "   ".join("D" * 12)


def test_show_one_layer_in_full(capsys, plan):
    _, out, _ = run(capsys, "show", plan, "--layer", 1)
    assert out.splitlines()[2:6] == [
        "layer 1",
        "  head 0       none  grid (axis frame, vertical True, horizontal False, slash 0, phases 1, sink 4, window 64, "
        "tail True)",
        "  head 1       none  grid (axis row, vertical True, horizontal False, slash 0, phases 1, sink 4, window 64, "
        "tail True)",
        "  head 2       k     a_shape (sink 4, window 256)",
    ]
    assert "  head 3       2d    text-text: dense\n" in out and "other pairs" not in out
    assert out.splitlines()[-2:] == ["  head 6       none  blocks (threshold 0.95)", "  head 7       none  dense"]


def test_show_names_shared_heads_and_pairs_left_out(capsys, tmp_path):
    file = save(uniform(MODEL, Boundary2D({"text-video": Dense()})), tmp_path / "plan.json")
    _, out, _ = run(capsys, "show", file, "--layer", 0)
    assert out.splitlines()[3:] == [
        "  heads 0-3    2d    text-video: dense",
        "                     other pairs: dense",
        "  heads 4-7    2d    text-video: dense",
        "                     other pairs: dense",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "--layer", 2), "sglang_mm: --layer 2. Allowed: 0 to 1. "),
        (("show", "--layer", -1), "sglang_mm: --layer -1. "),
        (("draw", "--layer", 2), "sglang_mm: --layer 2. "),
        (("draw", "--head", 8), "sglang_mm: --head 8. Allowed: 0 to 7. "),
    ],
)
def test_layers_and_heads_that_are_not_there(capsys, plan, arguments, message):
    code, out, err = run(capsys, *arguments, plan)
    assert (code, out) == (1, "") and err.startswith(message)


def test_a_file_that_is_not_there(capsys, tmp_path):
    code, out, err = run(capsys, "check", tmp_path / "absent.json")
    assert (code, out) == (1, "") and "absent.json: No such file" in err


def test_draw_writes_a_picture(capsys, plan):
    out = plan.parent / "head.png"
    code, printed, err = run(capsys, "draw", plan, "--head", 5, "--prompt", "text:9,video:4x2x3,text:5", "--out", out)
    assert (code, printed, err) == (0, f"{out}\n", "") and out.read_bytes().startswith(b"\x89PNG")
    for wrong in (("--head", 8), ("--layer", 2), ("--prompt", "video:4x2"), ("--out", plan.parent)):
        code, printed, err = run(capsys, "draw", plan, *wrong)
        assert (code, printed) == (1, "") and err.startswith("sglang_mm: ") and "Remedy: " in err
