"""Our command line: frozen flags, what passes through, what is refused."""

import subprocess
import sys
import time

import pytest

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.launch.args import build_parser, parse
from sglang_mm.serving.preflight import bind_cores
from sglang_mm.serving.settings import to_argv

FLAGS = {
    "--help", "--tp", "--tp-size", "--tensor-parallel-size", "--cp", "--schedule", "--cp-min-tokens", "--vision",
    "--deadline", "--allow-local-media", "--help-all", "--dry-run", "--tokens", "--prompt", "--gpu", "--plan", "--json",
    "--kv", "--media-dir", "--sparse", "--kernel-backend", "--sparse-min-tokens", "--keep-selections", "--nodes",
    "--ray-address", "--nodes-deadline",
}  # fmt: skip


def test_flags_are_frozen():
    """People's scripts depend on these: adding is free, removing or renaming one is a breaking change."""
    assert {flag for flag in build_parser()._option_string_actions if flag.startswith("--")} == FLAGS


def test_help_is_fast_and_ours_first():
    start = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "sglang_mm.launch", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 2
    assert shown.returncode == 0 and shown.stdout.index("--cp C") < shown.stdout.index("--help-all  ")


def test_everything_else_is_sglangs():
    words = ["--model-path", "M", "--cp", "2", "--revision", "abc", "--trust-remote-code", "--port=1", "--tp", "2"]
    launch = parse(words)
    assert launch.config == Config(tp=2, cp=2)
    assert launch.sglang == ["--model-path", "M", "--revision", "abc", "--trust-remote-code", "--port=1"]


def test_world_is_t_times_c():
    argv = to_argv(Config(tp=2, cp=4), ["--model-path", "M"], (), on_cpu=False)
    assert argv[argv.index("--tp-size") + 1] == "8" and argv[argv.index("--attn-cp-size") + 1] == "4"
    assert argv[argv.index("--prefill-attention-backend") + 1] == "mm_ring"
    assert "--enable-prefill-cp" not in argv


def test_one_replica_is_plain_sglang():
    argv = to_argv(Config(tp=2), ["--model-path", "M"], {"media_url_max_file_size_mb"}, on_cpu=False)
    assert argv == ["--model-path", "M", "--tp-size", "2"]


def test_the_users_choice_wins_over_our_defaults():
    words = ["--chunked-prefill-size", "4096", "--dtype=bfloat16"]
    argv = to_argv(Config(cp=2), words, {"watchdog_timeout"}, on_cpu=True)
    assert argv.count("--chunked-prefill-size") == 1 and argv[argv.index("--chunked-prefill-size") + 1] == "4096"
    assert "--dtype" not in argv and "--watchdog-timeout" not in argv and "--max-running-requests" in argv


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--cp", "0"], "--cp 0"), (["--tp", "-1"], "--tp -1"), (["--cp-min-tokens", "0"], "--cp-min-tokens 0"),
     (["--deadline", "0"], "--deadline 0")],
)  # fmt: skip
def test_impossible_values_name_flag_and_remedy(words, message):
    with pytest.raises(ConfigError, match=f"{message}.*Allowed: .*Remedy: "):
        parse(words)


def test_config_reaches_workers_through_the_environment(monkeypatch):
    monkeypatch.delenv("SGLANG_MM_CONFIG", raising=False)
    assert Config.from_env() is None
    monkeypatch.setenv("SGLANG_MM_CONFIG", "")
    chosen = Config(tp=2, cp=3, vision="stock", allow_local_media=("/tmp", "/"))
    chosen.to_env()
    assert Config.from_env() == chosen


def test_directories_of_media_are_given_one_by_one(tmp_path):
    words = ["--allow-local-media", str(tmp_path), "--allow-local-media=/"]
    assert parse(words).config.allow_local_media == (str(tmp_path), "/")
    with pytest.raises(ConfigError, match=r"--allow-local-media .*gone\. Allowed: a directory\. Remedy: "):
        parse(["--allow-local-media", str(tmp_path / "gone")])
    assert Config(allow_local_media=str(tmp_path)).allow_local_media == (str(tmp_path),)


@pytest.mark.parametrize(
    ("ranks", "cores", "expected"),
    [
        (1, 2, "0,1"),
        (2, 2, "0|1"),
        (3, 2, "0|1|0"),
        (2, 8, "0,1,2,3|4,5,6,7"),
        (3, 8, "0,1|2,3|4,5"),
    ],
)
def test_cores_of_ranks(ranks, cores, expected):
    assert bind_cores(ranks, list(range(cores))) == expected
