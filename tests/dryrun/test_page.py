"""docs/memory.md: what the code says, and some of it by hand."""

import re

from benchmarks import memory
from benchmarks.memory import MODEL, PAGE, page
from sglang_mm.dryrun.checkpoint import read_config, sizes_of
from tests.dryrun.checkpoints import write_config


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == page(), "python -m benchmarks.memory writes it"


def test_its_model_is_the_one_of_the_checkpoint(tmp_path):
    assert sizes_of(read_config(write_config(tmp_path))) == MODEL


def test_by_hand():
    """A million tokens: 28 layers x 2 x 4 heads x 128 x 2 bytes of K/V, and a share of 131,072 rows."""
    lines = {row[0]: row[2:] for row in re.findall(r"^\| (.+?) \| (.*?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$",
                                                   PAGE.read_text(), re.M)}  # fmt: skip
    rows, gib = 131072, 2**30
    assert lines["weights"][1] == lines["weights"][3] == f"{2 * 8_292_658_432 / gib:.2f}"
    assert lines["K/V at rest"][1] == f"{57344 * rows / gib:.2f}" and lines["K/V at rest"][3] == "56.00"
    assert lines["two states in fp32"][1] == f"{2 * 4 * 28 * 129 * rows / gib:.2f}"
    assert lines["gate and up of a call"][1] == f"{16384 * 2 * 18944 * 2 / gib:.2f}"
    assert lines["pixels, a byte each"][0] == f"{4704 / 8:.1f}"
    held, prefill, peak = (
        float(lines[name][1]) for name in ("**held**", "**prefill, with stage attention**", "**peak**")
    )
    assert abs(held + prefill - peak) < 0.02


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "PAGE", tmp_path / "memory.md")
    memory.main()
    assert (tmp_path / "memory.md").read_text() == PAGE.read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'memory.md'} written\n"
