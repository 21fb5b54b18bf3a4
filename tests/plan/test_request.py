"""show and draw of a kept request, as typed."""

from math import nan

import pytest
import torch

from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import Lines, Nothing, Panel, Selection, Unit
from sglang_mm.patterns.select import Trial, Verdict
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest, save
from sglang_mm.plan.__main__ import main
from sglang_mm.plan.geometry import parse_geometry
from sglang_mm.types import Modality

TOKENS = parse_geometry("text:20,video:8x4x6,text:40")
LINES = Lines(torch.tensor([3, 50]), torch.tensor([1]))
NEAR = AShape(4, 16)


def layer(number, *, low=0.95):
    """Heads 0 and 1 share columns for video rows; head 2 fell back to dense."""
    shared = (Panel(Modality.TEXT, None, Dense(), Nothing()), Panel(Modality.VIDEO, None, VerticalSlash(), LINES))
    units = (Unit((0, 1), shared), Unit((2,), (Panel(None, None, Dense(), Nothing()),)))
    tried = (Trial(((None, Grid()),), 0.5), Trial(((None, Blocks()),), nan))
    verdicts = (
        Verdict((0, 1), Modality.TEXT, ((None, Dense()),), 1.0),
        Verdict((0, 1), Modality.VIDEO, ((None, VerticalSlash()),), low),
        Verdict((2,), None, ((None, Dense()),), 1.0, tried, "dense: recall below 0.9"),
    )
    return KeptLayer(number, Selection(units, 3), verdicts, (0.25, 1.0))


def by_pairs(number):
    kept = ((Modality.TEXT, Dense()), (Modality.VIDEO, NEAR))
    panels = tuple(Panel(None, keys, pattern, Nothing()) for keys, pattern in kept)
    return KeptLayer(number, Selection((Unit((0, 1, 2), panels),), 3), (Verdict((0, 1, 2), None, kept, 0.92),), (0.5,))


@pytest.fixture
def request_file(tmp_path):
    kept = KeptRequest("r-1", TOKENS, (range(len(TOKENS)),), 3, "auto", ((layer(0), by_pairs(1)),))
    return save(tmp_path / "r-1.npz", kept)


@pytest.fixture
def chunked_file(tmp_path):
    chunks = (range(50, 100), range(100, len(TOKENS)))
    return save(
        tmp_path / "r-2.npz", KeptRequest("r-2", TOKENS, chunks, 3, "mine", ((layer(0),), (layer(0, low=0.9),)))
    )


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_a_letter_per_head_of_what_was_kept(capsys, request_file):
    code, out, err = run(capsys, "show", "--from-request", request_file)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "request r-1: 252 tokens (text 60, video 192) in 1 chunk, plan auto",
        "rows 0 to 251: 2 of 4 verdicts sparse, 1 with a reason, lowest recall 0.9200, density 56.2%",
        "",
        "layer 0  1  2   recall density",
        "    0 DV =  D   0.9500   62.5%",
        "    1 2  =  =   0.9200   50.0%",
        "",
        "      verdicts",
        "D            2 dense",
        "V            1 vertical_slash",
        "2            1 one per modality of the keys",
        "a letter per modality of the rows (text, image, video), or one where they are alike",
        "= shares the selection of the head before it",
        "",
        "     1 x dense: recall below 0.9",
    ]


def test_a_layer_in_full(capsys, request_file):
    _, out, _ = run(capsys, "show", "--from-request", request_file, "--layer", 0)
    assert out.splitlines()[2:] == [
        "layer 0, rows 0 to 251: 1 of 3 verdicts sparse, 1 with a reason, lowest recall 0.9500, density 62.5%",
        "  heads 0,1, text rows: dense, recall 1.0000; density of the head 25.0%",
        "  heads 0,1, video rows: vertical_slash, recall 0.9500; density of the head 25.0%",
        "  heads 2, all rows: dense, recall 1.0000; dense: recall below 0.9 (tried grid 0.5000; blocks nan); "
        "density of the head 100.0%",
    ]


def test_chunks(capsys, chunked_file):
    _, out, _ = run(capsys, "show", "--from-request", chunked_file)
    assert out.splitlines()[2:4] == [
        "chunk 0    rows 50 to 99: 1 of 3 verdicts sparse, 1 with a reason, lowest recall 0.9500, density 62.5%",
        "chunk 1    rows 100 to 251: 1 of 3 verdicts sparse, 1 with a reason, lowest recall 0.9000, density 62.5%",
    ]
    _, out, _ = run(capsys, "show", "--from-request", chunked_file, "--chunk", 1)
    assert "    0 DV =  D   0.9000   62.5%" in out.splitlines()
    _, out, _ = run(capsys, "show", "--from-request", chunked_file, "--layer", 0)
    assert out.count("layer 0, rows ") == 2
    code, _, err = run(capsys, "show", "--from-request", chunked_file, "--chunk", 2)
    assert code == 1 and err.startswith("sglang_mm: --chunk 2. Allowed: 0 to 1. ")


def test_pictures(capsys, request_file, chunked_file, tmp_path):
    out = tmp_path / "head.png"
    for arguments in (
        ("--from-request", request_file, "--layer", 1, "--head", 2),
        ("--from-request", request_file),
        ("--from-request", chunked_file, "--head", 0),
        ("--from-request", chunked_file, "--head", 0, "--rows", "60:200", "--keys", "0:80"),
    ):
        out.unlink(missing_ok=True)
        assert run(capsys, "draw", *arguments, "--out", out) == (0, f"{out}\n", "")
        assert out.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit(capsys, request_file, tmp_path):
    for arguments, message in (
        (("show", "--from-request", request_file, "--layer", 7), "--layer 7. Allowed: 0, 1. "),
        (("draw", "--from-request", request_file, "--layer", 7), "layer 7. Allowed: 0, 1. "),
        (("draw", "--from-request", request_file, "--head", 3), "head 3. Allowed: 0 to 2. "),
        (("show", "--from-request", tmp_path / "absent.npz"), f"{tmp_path}/absent.npz: No such file"),
        (("show", tmp_path / "plan.json", "--chunk", 0), "--chunk with a plan. Allowed: --from-request FILE. "),
        (("draw", tmp_path / "plan.json", "--rows", "0:3"), "--rows with a plan. "),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "") and err.startswith(f"sglang_mm: {message}") and "Remedy: " in err


@pytest.mark.parametrize(
    "arguments", [(), ("plan.json", "--from-request", "a.npz"), ("--from-request", "a", "--rows", "5")]
)
def test_command_lines_that_are_none(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["draw", *arguments])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err
