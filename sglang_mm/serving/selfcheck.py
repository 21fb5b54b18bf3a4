"""Fail the launch, with one message, when SGLang is not what this package was written for or the plugin is not live.

SGLang only logs a plugin's errors and goes on without it; then it would serve wrong values under our flags.
"""

import inspect
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name

from sglang_mm.config import Config
from sglang_mm.errors import SelfCheckError
from sglang_mm.serving.settings import DECODE_BACKEND, PREFILL_BACKEND

SGLANG = "0.5.23"
PARAMETERS = {  # below sglang.srt, functions we call or override: the parameters we rely on
    "distributed.parallel_state:patch_tensor_parallel_group": "tp_group owns_attention",
    "layers.attention.base_attn_backend:AttentionBackend.forward_extend": "q k v layer forward_batch save_kv_cache",
    "layers.attention.base_attn_backend:AttentionBackend.init_forward_metadata": "forward_batch",
    "mem_cache.memory_pool:KVWriteLoc": "loc physical",
    "mem_cache.memory_pool:MHATokenToKVPool": "size page_size",
    "mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer": "layer loc_info cache_k cache_v",
    "mem_cache.kv_cache_configurator:KVCacheConfigurator._resolve_kv_pool_class": "self kind default",
    "model_executor.pool_configurator:DefaultPoolConfigurator._compute_cell_size": "self kvc",
    "mem_cache.allocator.paged:PagedTokenToKVPoolAllocator": "size page_size",
    "mem_cache.allocation:get_last_loc": "req_to_token req_pool_indices_tensor prefix_lens_tensor",
    "layers.sampler:Sampler._sync_token_ids_across_tp": "self batch_next_token_ids sampling_info",
    "layers.logits_processor:LogitsMetadata.from_forward_batch": "forward_batch",
    "layers.logits_processor:LogitsProcessor.forward": "input_ids hidden_states lm_head logits_metadata",
    "layers.logits_processor:LogitsProcessorOutput.finalize_input_logprobs": "self",
    "managers.mm_utils:prepare_mm_inputs": "input_ids forward_batch language_model",
    "managers.scheduler:Scheduler.__init__": "self server_args port_args",
    "managers.scheduler:Scheduler.get_init_info": "self",
    "managers.scheduler:Scheduler.run_event_loop": "self",
    "managers.load_snapshot:shm_path_for": "ipc_name",
    "managers.tokenizer_manager:SignalHandler.running_phase_sigquit_handler": "self",
    "managers.tokenizer_manager:TokenizerManager.set_server_stop_hook": "self",
    "managers.tokenizer_manager:TokenizerManager.dump_requests_before_crash": "self",
    "utils.common:kill_process_tree": "parent_pid include_parent",
    "utils.watchdog:SubprocessWatchdog": "processes process_names",
    "entrypoints.engine:_scheduler_died_error": "rank proc",
    "model_executor.forward_batch_info:ForwardBatch.init_new": "batch model_runner",
    "managers.scheduler:run_scheduler_process": "server_args port_args pipe_writer",
    "managers.tokenizer_manager:TokenizerManager.update_request_meta_info": (
        "meta_info state customized_info index finish_reason"
    ),
    "managers.tokenizer_manager:TokenizerManager._tokenize_one_request": "self obj",
    "managers.tokenizer_manager:TokenizerManager._validate_mm_limits": "self obj",
    "managers.tokenizer_manager:TokenizerManager._validate_one_request": "self obj input_ids",
    "managers.io_struct:GenerateReqInput.normalize_batch_and_arguments": "self",
    "utils.common:download_remote_media": "url timeout",
    "multimodal.processors.base_processor:BaseMultimodalProcessor._load_single_item": "data modality",
    "multimodal.processors.base_processor:BaseMultimodalProcessor._resolve_processor": "processor",
    "multimodal.processors.base_processor:BaseMultimodalProcessor.load_mm_data": "prompt multimodal_tokens video_data",
    "multimodal.processors.base_processor:BaseMultimodalProcessor.process_and_combine_mm_data": (
        "base_output mm_tokens processor"
    ),
    "multimodal.processors.base_processor:BaseMultimodalProcessor.process_and_combine_mm_data_async": (
        "base_output mm_tokens"
    ),
    "multimodal.processors.hash_executor:MultimodalHashExecutor.set_pad_values": "items",
    "multimodal.processors.qwen_vl:QwenVLImageProcessor.process_mm_data_async": "image_data input_text request_obj",
    "managers.schedule_batch:MultimodalDataItem.set_hash": "hash_value",
    "managers.tokenizer_manager:TokenizerManager._release_req_states_on_failure": "request_states",
    "multimodal.processors.qwen_vl:smart_nframes": "ele total_frames video_fps",
    "multimodal.processors.qwen_vl:smart_resize": "height width min_pixels max_pixels",
    "utils.common:load_video": "video_file",
    "utils.common:load_image": "image_file gpu_image_decode",
    "models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration.forward": "input_ids positions forward_batch",
    "multimodal.processors.qwen_vl:preprocess_video": "vr video_config",
    "multimodal.processors.qwen_vl:_get_processor_video_config": "video_config video_metadata",
    "layers.attention.vision:VisionSdpaAttention.forward": "q k v bsz cu_seqlens",
    "utils.video_decoder:VideoDecoderWrapper": "source",
}
RAY_PARAMETERS = {  # the same, looked at where ranks are Ray actors: it imports ray
    "ray.engine:RayEngine._launch_scheduler_processes": (
        "server_args port_args run_scheduler_process_func placement_group"
    ),
    "ray.engine:RayEngine._launch_subprocesses": "server_args placement_group run_detokenizer_process_func",
    "ray.engine:_create_scheduler_actor": "pg bundle_idx tp_rank",
}
FIELDS = {  # below sglang.srt, data we read or write
    "managers.io_struct:GenerateReqInput": "log_metrics extra_key sampling_params",
    "managers.schedule_batch:MultimodalDataItem": (
        "modality hash offsets format feature precomputed_embeddings model_specific_data pad_values"
    ),
    "managers.tokenizer_manager:ReqState": "obj finished dispatched",
    "multimodal.processors.base_processor:BaseMultiModalProcessorOutput": "images videos",
    "model_executor.forward_batch_info:ForwardBatch": (
        "extend_prefix_lens_cpu extend_seq_lens_cpu mm_inputs mrope_positions "
        "out_cache_loc capture_hidden_mode req_pool_indices seq_lens seq_lens_cpu extend_prefix_lens"
    ),
    "layers.logits_processor:LogitsMetadata": (
        "next_token_logits_buffer extend_return_logprob extend_return_top_logprob extend_token_ids_logprob "
        "extend_seq_lens extend_seq_lens_cpu extend_logprob_start_lens_cpu extend_logprob_pruned_lens_cpu "
        "extend_input_logprob_token_ids_gpu top_logprobs_nums token_ids_logprobs"
    ),
    "layers.logits_processor:LogitsProcessorOutput": (
        "customized_info input_token_logprobs input_top_logprobs_val input_top_logprobs_idx "
        "input_token_ids_logprobs_val input_token_ids_logprobs_idx"
    ),
    "managers.schedule_batch:ScheduleBatch": "reqs",
}


def check_sglang() -> None:
    """Version and shape of the installed SGLang. Raises SelfCheckError naming every difference."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise SelfCheckError(f"SGLang is not installed. Remedy: pip install sglang=={SGLANG}") from None
    if installed != SGLANG:
        raise SelfCheckError(
            f"SGLang {installed} is installed. Allowed: {SGLANG}. Remedy: pip install sglang=={SGLANG}"
        )
    _refuse_changes(PARAMETERS, FIELDS)


def check_ray() -> None:
    """The same for SGLang's Ray engine. Raises SelfCheckError."""
    _refuse_changes(RAY_PARAMETERS, {})


def _refuse_changes(parameters: dict[str, str], fields: dict[str, str]) -> None:
    if wrong := list(_differences(parameters, fields)):
        raise SelfCheckError(
            f"SGLang {SGLANG} has been changed: {'; '.join(wrong)}. Remedy: reinstall sglang=={SGLANG}"
        )


def _differences(parameters: dict[str, str], fields: dict[str, str]):
    for path, names in {**parameters, **fields}.items():
        try:
            found = resolve_name(f"sglang.srt.{path}")
        except (ImportError, AttributeError) as error:
            yield f"{path} is missing ({error})"
            continue
        if path in parameters:
            has = set(inspect.signature(found).parameters)
        else:
            has = set(inspect.get_annotations(found))
        if lacking := [name for name in names.split() if name not in has]:
            yield f"{path} lacks {', '.join(lacking)}"


def check_plugin() -> Config:
    """The plugin of this process is live: backend, models, hooks. Returns the launcher's configuration."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_mm.serving import platform, plugin

    config = Config.from_env()
    wanted = [*plugin.HOOKS, *plugin.AROUND_HOOKS, *(() if platform.has_accelerator() else plugin.CPU_HOOKS)]
    missing = [f"hook on {target}" for target in wanted if f"sglang.srt.{target}" not in HookRegistry._patched]
    missing += [
        f"attention backend {name}" for name in (PREFILL_BACKEND, DECODE_BACKEND) if name not in ATTENTION_BACKENDS
    ]
    model = ModelRegistry.models.get("Qwen2_5_VLForConditionalGeneration")
    if model is None or not model.__module__.startswith("sglang_mm."):
        missing.append("model Qwen2_5_VLForConditionalGeneration")
    if config is None:
        missing.append("configuration of the launcher")
    if not platform.has_accelerator() and current_platform.device_name != "cpu":
        missing.append("CPU reference platform (import sglang_mm before sglang)")
    if missing:
        raise SelfCheckError(
            f"the sglang_mm plugin is not live in this process, it lacks: {', '.join(missing)}. Remedy: start with "
            "python -m sglang_mm.launch or sglang_mm.Engine; leave SGLANG_PLUGINS unset or let it contain sglang_mm; "
            "look above for an error that SGLang logged while loading plugins"
        )
    return config


def check_processor(processor) -> None:
    """SGLang's tokenizer manager holds our processor, where we have one for its model."""
    is_stock = type(processor).__module__ == "sglang.srt.multimodal.processors.qwen_vl"
    if is_stock and processor.model_type == "qwen2_5_vl" and check_plugin().vision == "frames":
        raise SelfCheckError(
            f"the multimodal processor is SGLang's {type(processor).__name__}, which drops the video's timing. "
            "Remedy: look above for an error that SGLang logged while importing sglang_mm.serving.processors"
        )


def describe_worker(info: dict, scheduler) -> dict:
    """After-hook on Scheduler.get_init_info: assert that this worker runs what was asked for, and tell its sizes.

    Where prefills are ours, lowers the longest prompt to what the memory of a prefill allows.
    Adds `sglang_mm` to what the launcher hears of each rank: layers, context_length, prefill_backend, decode_backend,
    ray_node;
    with --cp above 1 q_heads and first_q_head, read from the attention layers; and, for caches with K and V of every
    layer, kv_heads, head_dim, kv_bytes_per_token (before they are shared), kv_bytes (this rank's) and kv_page.
    """
    from sglang_mm.serving.ray_worker import ray_node
    from sglang_mm.serving.room import limit_of

    config = check_plugin()
    runner = scheduler.tp_worker.model_runner
    if config.computes_prefill:
        _check_prefill(config, runner)
        info["max_req_input_len"] = limit_of(runner, config, info["max_req_input_len"])
    info["sglang_mm"] = {
        "layers": runner.model_config.num_hidden_layers,
        "ray_node": ray_node(),
        "context_length": runner.model_config.context_len,
        "prefill_backend": runner.prefill_attention_backend_str,
        "decode_backend": runner.decode_attention_backend_str,
        **(_tile_backend(config, runner) if config.is_sparse else {}),
        **_heads(runner.model),
        **_cache_sizes(runner.token_to_kv_pool, runner.model_config.num_hidden_layers),
    }
    return info


def _tile_backend(config: Config, runner) -> dict:
    from sglang_mm.serving.schedule import shape_of
    from sglang_mm.serving.sparse_method import tile_backend

    shape = shape_of(runner.model.model)
    heads = shape.q_heads, shape.kv_heads, shape.head_dim
    return {"tile_backend": tile_backend(config, runner.device, shape.dtype, *heads)}


def _check_prefill(config: Config, runner) -> None:
    """Our model, our backend, our width, and a cache that keeps K/V as they are computed."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_mm.serving.context_parallel import ContextParallelMixin
    from sglang_mm.serving.kv_pool import ShardedKVPool

    wrong = []
    if not isinstance(runner.model, ContextParallelMixin):
        wrong.append(f"the model is {type(runner.model)}, which is not context parallel")
    if runner.prefill_attention_backend_str != PREFILL_BACKEND:
        wrong.append(f"the prefill backend is {runner.prefill_attention_backend_str}")
    if get_parallel().attn_cp_size != config.cp:
        wrong.append(f"the context-parallel width is {get_parallel().attn_cp_size}")
    if config.keepers > 1:
        if runner.decode_attention_backend_str != DECODE_BACKEND:
            wrong.append(f"the decode backend is {runner.decode_attention_backend_str}")
        if not isinstance(runner.token_to_kv_pool, ShardedKVPool):
            wrong.append(f"the K/V pool is {type(runner.token_to_kv_pool)}, which is not sharded")
        elif runner.token_to_kv_pool.residence != getattr(runner.model, "mm_residence", None):
            wrong.append(f"K/V rest by {runner.token_to_kv_pool.residence}, the model reads by another")
        elif runner.token_to_kv_pool_allocator.page_size != runner.token_to_kv_pool.residence.page:
            wrong.append(f"slots come in pages of {runner.token_to_kv_pool_allocator.page_size} tokens")
    if runner.token_to_kv_pool.dtype != runner.dtype:
        wrong.append(f"K/V are kept as {runner.token_to_kv_pool.dtype}, the model computes in {runner.dtype}")
    if wrong:
        asked = f"--cp {config.cp} --sparse {config.sparse}"
        raise SelfCheckError(f"this rank cannot serve {asked}: {'; '.join(wrong)}")


def _heads(model) -> dict:
    """Query heads of the first attention layer, numbered over all T ranks."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.runtime_context import get_parallel

    heads = next((layer.tp_q_head_num for layer in model.modules() if isinstance(layer, RadixAttention)), 0)
    return {"q_heads": heads, "first_q_head": heads * get_parallel().attn_tp_rank}


def _cache_sizes(pool, layers: int) -> dict:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.runtime_context import get_schedule

    if not isinstance(pool, MHATokenToKVPool):
        return {}  # other models' caches, which only --cp 1 serves
    key, value = pool.get_key_buffer(0)[0], pool.get_value_buffer(0)[0]
    return {
        "kv_heads": key.shape[0],
        "head_dim": key.shape[1],
        "kv_bytes_per_token": layers * (key.numel() + value.numel()) * key.element_size(),
        "kv_bytes": int(sum(pool.get_kv_size_bytes())),
        "kv_page": get_schedule().page_size,
    }
