"""`python -m sglang_mm.launch --dry-run`: what it prints, what it refuses, what it takes."""

import json
import re
import subprocess
import sys

import pytest

from sglang_mm.config import Config
from sglang_mm.dryrun.fit import DoesNotFit
from sglang_mm.dryrun.gpus import GIB, GPUS, parse_gpu
from sglang_mm.dryrun.report import fit_lines
from sglang_mm.dryrun.run import Asked, prepare
from sglang_mm.errors import ConfigError
from sglang_mm.launch.__main__ import main
from sglang_mm.patterns.plan import Model, one_of_each
from sglang_mm.patterns.plan_file import save
from tests.dryrun.checkpoints import write_config

MILLION = 1 << 20
KINDS = 12


@pytest.fixture
def model(tmp_path) -> str:
    return write_config(tmp_path)


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["--dry-run", *words])
    return code, *capsys.readouterr()


def fits(model: str, tokens: int, gpu: str = "h100", **config) -> bool:
    asked = Asked(Config(**config), ["--model-path", model], tokens, gpu=gpu)
    try:
        prepare(asked).require_fit()
    except DoesNotFit:
        return False
    return True


def weighed(capsys, model: str, *words: str) -> dict:
    code, shown, _ = run(capsys, "--model-path", model, "--json", *words)
    assert code == 0
    return json.loads(shown)


def test_the_text_has_every_replica_item_and_kind(capsys, model):
    code, shown, said = run(capsys, "--model-path", model, "--tokens", "3000", "--cp", "3", "--gpu", "l40s")
    assert (code, said) == (0, "")
    assert "3,000 tokens: text:15,video:11x16x16,text:169" in shown and "46 of 66 tokens" in shown
    rows = re.findall(r"^ +(\d) +([\d,]+) +\d+ +\d\.\d{4}e\+\d\d +[\d,]+ +[\d,]+ +([\d,]+) +[\d.]+ GiB$", shown, re.M)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for column in (1, 2):
        assert sum(int(row[column].replace(",", "")) for row in rows) == 3000
    for name in ("weights", "K/V at rest", "gate and up of a call", "two states in fp32", "pixels, a byte each"):
        assert len(re.findall(rf"^ +{name} +[\d.]+ [GM]iB +[\d,.]+$", shown, re.M)) == 1, name
    assert len(re.findall(r"%( +[\d,.]+){3}  [\d,]+ [\d,]+ [\d,]+$", shown, re.M)) == KINDS
    assert re.search(r"fits +l40s, with \d+\.\d GiB to spare; pass --mem-fraction-static 0\.\d\d", shown)


def test_without_a_gpu_those_that_fit_are_named(model):
    config = Config(cp=3, kv="replicated")
    ready = prepare(Asked(config, ["--model-path", model], prompt="text:900000"))
    assert fit_lines(ready) == ["  fits       h200, b200; not a100, h100, l40s"]


def test_json_says_the_same(capsys, model):
    told = weighed(capsys, model, "--tokens", "3000", "--cp", "3", "--gpu", "h100")
    assert (told["tokens"], told["page"], told["pages"], told["fits"], told["error"]) == (3000, 66, 46, True, None)
    assert sum(rank["rows"] for rank in told["ranks"]) == sum(rank["kept"] for rank in told["ranks"]) == 3000
    assert len(told["programs"]) == KINDS and all(len(kind["ranks"]) == 3 for kind in told["programs"])
    for rank in told["ranks"]:
        memory = rank["memory"]
        alive = [item["bytes"] for item in memory["items"] if item["when"] in ("held", "prefill", memory["dearest"])]
        assert memory["peak"] == memory["held"] + memory["prefill"] == sum(alive)


def test_sharded_keys_take_a_share(capsys, model):
    def kept(*words: str) -> int:
        told = weighed(capsys, model, "--tokens", "8000", "--cp", "4", *words)
        return next(item["bytes"] for item in told["ranks"][1]["memory"]["items"] if item["name"] == "K/V at rest")

    assert kept("--kv", "replicated") == 8001 * 57_344  # a page is a token, and one of SGLang's own
    assert kept() == (8000 + 64) // 4 * 57_344
    assert kept("--tp", "2") == (8000 + 64) // 4 * 57_344 // 2


def test_sglangs_flags_that_change_sizes_are_read(capsys, model):
    told = weighed(capsys, model, "--tokens", "900", "--cp", "4", "--page-size", "256", "--max-running-requests", "9",
                   "--context-length", "5000", "--dtype", "float32", "--port", "1")  # fmt: skip
    items = {item["name"]: item["bytes"] for item in told["ranks"][0]["memory"]["items"]}
    assert (told["page"], told["pages"]) == (256, 4) and items["K/V at rest"] == 5 * 64 * 2 * 57_344
    assert items["slot table"] == 10 * 5000 * 4


def test_what_does_not_fit_is_refused_with_numbers(capsys, model):
    asked = ["--model-path", model, "--tokens", str(MILLION), "--cp", "8", "--kv", "replicated", "--gpu", "h100"]
    code, shown, said = run(capsys, *asked)
    assert code == 2 and "tile programs" not in shown and "K/V at rest" in shown
    assert said.count("\n") == 1 and said.startswith("sglang_mm: 1,048,576 tokens with --tp 1 --cp 8 --kv replicated")
    assert "K/V at rest 56.0 GiB" in said and "of the 79.6 GiB of one h100" in said
    most = int(re.search(r"up to ([\d,]+) tokens at this width", said)[1].replace(",", ""))
    assert "Remedy: pass --kv sharded or --tp 2 or up to" in said
    assert fits(model, most, cp=8, kv="replicated") and not fits(model, most + 5000, cp=8, kv="replicated")
    code, shown, _ = run(capsys, *asked, "--json")
    told = json.loads(shown)
    assert code == 2 and told["fits"] is False and told["programs"] == [] and "Remedy" in told["error"]


def test_a_remedy_works(capsys, model):
    code, _, said = run(capsys, "--model-path", model, "--tokens", str(MILLION), "--gpu", "l40s", "--cp", "2")
    width = int(re.search(r"--cp (\d+)", said.partition("Remedy")[2])[1])
    assert code == 2 and fits(model, MILLION, "l40s", cp=width) and not fits(model, MILLION, "l40s", cp=width - 1)


def test_a_plan_is_compiled_instead_of_the_catalogue(capsys, tmp_path, model):
    of_model = Model("Qwen2_5_VLForConditionalGeneration", layers=28, heads=28, kv_heads=4, head_dim=128)
    plan = save(one_of_each(of_model), tmp_path / "plan.json")
    told = weighed(capsys, model, "--tokens", "2000", "--cp", "2", "--plan", str(plan))
    assert sum(kind["heads"] for kind in told["programs"]) == 28 * 28 and len(told["programs"]) == 8
    other = save(one_of_each(Model("Qwen2_5_VLForConditionalGeneration", 2, 8, 2, 32)), tmp_path / "other.json")
    code, _, said = run(capsys, "--model-path", model, "--tokens", "2000", "--plan", str(other))
    assert code == 1 and "model.layers" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "100"], "without --model-path"),
        (["--model-path", "/nowhere", "--tokens", "100"], "No such file"),
        (["--model-path", "{}"], "without a prompt"),
        (["--model-path", "{}", "--tokens", "100", "--gpu", "gtx"], "h100 | h200"),
        (["--model-path", "{}", "--tokens", "100", "--tp", "3"], "divides all of them"),
        (["--model-path", "{}", "--tokens", "1000", "--context-length", "1000"], "--context-length 2024"),
        (["--model-path", "{}", "--tokens", "1000", "--cp", "3", "--page-size", "64"], "pass 66"),
    ],
)
def test_what_cannot_be_asked(capsys, model, words, said):
    code, _, error = run(capsys, *(word.format(model) for word in words))
    assert code == 1 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--tokens", "5"], ["--gpu", "h100"], ["--json"], ["--prompt", "text:5"]])
def test_its_flags_need_it(capsys, words):
    assert main(["--model-path", "M", *words]) == 1
    assert "add --dry-run" in capsys.readouterr().err


def test_gpus():
    assert {name: round(gpu.bytes / GIB) for name, gpu in GPUS.items()} == {
        "a100": 80, "h100": 80, "h200": 140, "b200": 179, "l40s": 45,
    }  # fmt: skip
    assert parse_gpu("24GB").bytes == parse_gpu("24").bytes == 24 * 10**9 and parse_gpu("H200").name == "h200"
    for text in ("2", "-5", "80TB", ""):
        with pytest.raises(ConfigError):
            parse_gpu(text)


ITSELF = """
import resource, sys
from sglang_mm.launch.__main__ import main
main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print("sglang" in sys.modules, used.ru_maxrss, used.ru_utime + used.ru_stime)
"""


def test_a_million_tokens_in_a_minute_and_four_gigabytes(model):
    """Of one core's time, since other tests may run beside it."""
    words = ["--dry-run", "--model-path", model, "--tokens", str(MILLION), "--cp", "8", "--gpu", "h100", "--json"]
    shown = subprocess.run([sys.executable, "-c", ITSELF, *words], capture_output=True, text=True, check=True).stdout
    text, _, used = shown.rstrip().rpartition("\n")
    has_sglang, kilobytes, seconds = used.split()
    assert has_sglang == "False" and int(kilobytes) < 4 * 10**6 and float(seconds) < 60
    told = json.loads(text)
    assert told["fits"] and sum(rank["rows"] for rank in told["ranks"]) == MILLION
    assert len(told["programs"]) == KINDS and max(kind["balance"] for kind in told["programs"]) < 1.1
