"""The one place that registers us with SGLang; entry point of group `sglang.srt.plugins`, loaded in every process.

Nothing happens in a process that our launcher did not configure.
"""

import os

from sglang_mm.config import Config

MODELS = "sglang_mm.serving.models"
HOOKS = {
    "sglang.srt.managers.scheduler.Scheduler.get_init_info": "sglang_mm.serving.selfcheck.describe_worker",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info": (
        "sglang_mm.serving.requests.remember"
    ),
}


def activate() -> None:
    config = Config.from_env()
    if config is None:
        return
    from pkgutil import resolve_name

    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    from sglang_mm.serving import decoder, platform

    if os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") != MODELS:
        ModelRegistry.register(MODELS, overwrite=True)
    register_attention_backend("mm_ring")(_ring_backend)
    add_attention_backend_choices(["mm_ring"])
    for target, hook in HOOKS.items():
        HookRegistry.register(target, resolve_name(hook), HookType.AFTER)
    if not platform.has_accelerator():
        platform.install()
    decoder.choose()


def _ring_backend(runner):
    from sglang_mm.serving.backend import RingAttentionBackend

    return RingAttentionBackend(runner)
