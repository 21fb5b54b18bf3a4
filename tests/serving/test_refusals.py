"""What cannot work is refused before any process starts, however the user spelled it."""

from types import SimpleNamespace

import pytest

from sglang_mm import Engine
from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.serving.preflight import check_devices, check_sizes
from sglang_mm.serving.settings import NEVER, OURS, refuse, set_by_user
from tests.serving.bad_launches import seven_billion

ASKED = [
    ["--attn-cp-size", "2"], ["--attention-context-parallel-size", "2"], ["--enable-prefill-cp"],
    ["--tokenizer-worker-num", "2"], ["--prefill-attention-backend", "triton"], ["--dcp-size", "2"],
    ["--decode-context-parallel-size", "2"], ["--pp-size", "2"], ["--pipeline-parallel-size", "2"],
    ["--speculative-algorithm", "EAGLE"], ["--speculative-algo", "EAGLE"], ["--enable-lora"],
    ["--lora-paths", "a=b"], ["--disaggregation-mode", "prefill"], ["--enable-dp-attention"], ["--dp-size", "2"],
    ["--nnodes", "2"], ["--enable-mixed-chunk"], ["--is-embedding"], ["--kv-cache-dtype", "fp8_e4m3"],
    ["--smg-grpc-mode"], ["--grpc-mode"], ["--encoder-only"], ["--language-only"],
]  # fmt: skip


def parsed(words: list[str]):
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(["--model-path", "M", *words])


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_refused_with_context_parallelism(words):
    with pytest.raises(ConfigError, match=r"with --cp 2\. Allowed: .*\. Remedy: "):
        refuse(Config(cp=2), parsed(words))


def test_every_rule_is_tried():
    assert len(ASKED) >= len(NEVER | OURS)


def test_one_replica_allows_what_sglang_allows():
    refuse(Config(cp=1), parsed(["--pp-size", "2"]))
    with pytest.raises(ConfigError, match="--attn-cp-size 2"):
        refuse(Config(cp=1), parsed(["--attn-cp-size", "2"]))


def test_sglangs_rust_server_is_refused(monkeypatch):
    """It serves without the tokenizer manager, whose checks of requests and media are ours."""
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(ConfigError, match=r"SGLANG_RUST_SERVER is set.*Remedy: unset it"):
        Engine(model_path="M")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_widths_that_cut_every_layer_pass(tp):
    check_sizes(tp, seven_billion())


def test_fewer_devices_than_ranks(monkeypatch):
    """On a machine of four GPUs, whether or not this one has any."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    check_devices(Config(tp=2, cp=2), SimpleNamespace(base_gpu_id=0, gpu_id_step=1))
    for start, step, place in ((1, 1, "from --base-gpu-id 1"), (0, 2, "in steps of 2")):
        with pytest.raises(ConfigError, match=f"needs 4 GPUs {place}.*tp x cp <= 4"):
            check_devices(Config(tp=2, cp=2), SimpleNamespace(base_gpu_id=start, gpu_id_step=step))


def test_what_switches_nothing_on_passes():
    refuse(Config(cp=2), parsed(["--pp-size", "1", "--disaggregation-mode", "null"]))


def test_config_files_are_read(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("pp-size: 2\nwatchdog-timeout: 42\n")
    asked = parsed(["--config", str(file)])
    with pytest.raises(ConfigError, match="--pp-size 2"):
        refuse(Config(cp=2), asked)
    assert set_by_user(asked, parsed([])) == {"watchdog_timeout"}


@pytest.mark.parametrize("arguments", [{"pp_size": 2}, {"server_args": object()}, {"vision": "none"}])
def test_engine_refuses_alike(arguments):
    with pytest.raises(ConfigError, match="Remedy"):
        Engine(model_path="M", cp=2, **arguments)
