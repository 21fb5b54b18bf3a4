"""The one place that registers us with SGLang; entry point of group `sglang.srt.plugins`, loaded in every process.

Nothing happens in a process that our launcher did not configure.
"""

import os

from sglang_mm.config import Config
from sglang_mm.serving.settings import DECODE_BACKEND, PREFILL_BACKEND

MODELS = "sglang_mm.serving.models"
HOOKS = {  # below sglang.srt: what runs after it, in every process
    "managers.scheduler.Scheduler.get_init_info": "selfcheck.describe_worker",
    "managers.tokenizer_manager.TokenizerManager.update_request_meta_info": "requests.remember",
    "model_executor.forward_batch_info.ForwardBatch.init_new": "notes.note_batch",
    "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size": "kv_pool.bytes_of_token",
    "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.__init__": "kv_pool.pages_of_any_size",
}
AROUND_HOOKS = {  # below sglang.srt: what runs around it, in every process
    "managers.tokenizer_manager.TokenizerManager._tokenize_one_request": "frontend.tokenize",
    "utils.common.load_video": "frontend.load_video",
    "multimodal.processors.qwen_vl.preprocess_video": "frontend.preprocess_video",
    "utils.common.download_remote_media": "media_check.download",
    "utils.video_decoder.VideoDecoderWrapper.__init__": "media_check.open_video",
    "managers.io_struct.GenerateReqInput.normalize_batch_and_arguments": "intake.admit_fields",
    "managers.tokenizer_manager.TokenizerManager._validate_mm_limits": "intake.admit_media",
    "managers.tokenizer_manager.TokenizerManager._validate_one_request": "intake.admit_prompt",
    "mem_cache.kv_cache_configurator.KVCacheConfigurator._resolve_kv_pool_class": "kv_pool.pool_class",
    "layers.sampler.Sampler._sync_token_ids_across_tp": "agreement.settle",
    "managers.scheduler.Scheduler.__init__": "faults.while_loading",
    "managers.scheduler.Scheduler.run_event_loop": "faults.while_serving",
    "utils.common.kill_process_tree": "supervised.instead_of_dying",
    "utils.watchdog.SubprocessWatchdog.start": "supervised.instead_of_watching",
    "utils.watchdog.SubprocessWatchdog.stop": "supervised.at_the_end",
}
CPU_HOOKS = {  # below sglang.srt: what runs around it, where there is no accelerator
    "model_executor.model_runner.adjust_config_with_unaligned_cpu_tp": "platform.align_to_model_replica",
    "layers.attention.vision.VisionSdpaAttention.forward": "platform.segmented_vision_attention",
    "mem_cache.allocation.get_last_loc": "platform.last_slots",
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
    register_attention_backend(PREFILL_BACKEND)(_ring_backend)
    register_attention_backend(DECODE_BACKEND)(_paged_backend)
    add_attention_backend_choices([PREFILL_BACKEND, DECODE_BACKEND])
    for target, hook in HOOKS.items():
        HookRegistry.register(f"sglang.srt.{target}", resolve_name(f"sglang_mm.serving.{hook}"), HookType.AFTER)
    for target, hook in AROUND_HOOKS.items():
        HookRegistry.register(f"sglang.srt.{target}", resolve_name(f"sglang_mm.serving.{hook}"), HookType.AROUND)
    if not platform.has_accelerator():
        platform.without_pinned_memory()
        for target, hook in CPU_HOOKS.items():
            HookRegistry.register(f"sglang.srt.{target}", resolve_name(f"sglang_mm.serving.{hook}"), HookType.AROUND)
    decoder.choose()


def _ring_backend(runner):
    from sglang_mm.serving.backend import RingAttentionBackend

    return RingAttentionBackend(runner)


def _paged_backend(runner):
    from sglang_mm.serving.paged_backend import PagedAttentionBackend

    return PagedAttentionBackend(runner)
