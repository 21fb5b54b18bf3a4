"""Installed is not active: SGLang stays as it is until our launcher runs, and a launch without our plugin fails."""

import json
import os
import subprocess
import sys

import pytest

from sglang_mm.config import ENV
from sglang_mm.serving.selfcheck import SGLANG

PROBE = """
import json, os, sys
from sglang_mm.config import Config
from sglang_mm.serving import platform, plugin
chosen = platform.activate()
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
pin_memory = torch.Tensor.pin_memory

def ours():
    hooks = [hook.__module__ for registered in HookRegistry._hooks.values() for _, hook, _ in registered]
    return {
        "backend": "mm_ring" in ATTENTION_BACKENDS,
        "model": "sglang_mm.serving.models.qwen2_5_vl" in sys.modules,
        "hooks": any(module.startswith("sglang_mm.") for module in hooks),
    }

load_plugins()
installed = ours() | {"platform": chosen, "pin_memory_replaced": torch.Tensor.pin_memory is not pin_memory}
Config().to_env()
os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = plugin.MODELS
plugin.activate()
from sglang.srt.models import registry
print(json.dumps({"installed": installed, "launched": ours()}))
"""

WRONG_VERSION = """
import sys
from sglang_mm.launch.__main__ import main
from sglang_mm.serving import selfcheck
selfcheck.version = lambda name: "0.5.22"
sys.exit(main(["--model-path", "M", "--cp", "2"]))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process that no launcher configured."""
    kept = {name: value for name, value in os.environ.items() if name != ENV and not name.startswith("SGLANG_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=kept | environment)


def test_merely_installed_changes_nothing_in_sglang():
    done = run("-c", PROBE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    nothing = {"backend": False, "model": False, "hooks": False}
    assert found["installed"] == nothing | {"platform": None, "pin_memory_replaced": False}
    assert found["launched"] == {"backend": True, "model": True, "hooks": True}


@pytest.mark.parametrize(
    ("arguments", "environment", "message", "remedy"),
    [
        (
            ["-m", "sglang_mm.launch", "--model-path", "M", "--cp", "2"],
            {"SGLANG_PLUGINS": "none"},
            "the sglang_mm plugin is not live in this process, it lacks: hook on ",
            "Remedy: start with python -m sglang_mm.launch or sglang_mm.Engine; leave SGLANG_PLUGINS unset",
        ),
        (["-c", WRONG_VERSION], {}, f"SGLang 0.5.22 is installed. Allowed: {SGLANG}.", f"pip install sglang=={SGLANG}"),
    ],
    ids=["plugin not loaded", "other SGLang"],
)
def test_launch_fails_with_one_clear_message(arguments, environment, message, remedy):
    done = run(*arguments, **environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"sglang_mm: {message}") and remedy in last
    assert "Traceback" not in done.stderr and done.stderr.count("sglang_mm: ") == 1
