"""SGLang without our plugin. Our platform lets it run where there is no GPU, and nothing else of ours is loaded."""

import os


def engine(model_path: str):
    from sglang_mm.config import Config
    from sglang_mm.serving import decoder, platform
    from sglang_mm.serving.settings import server_settings

    on_cpu = not platform.has_accelerator()
    os.environ["SGLANG_PLUGINS"] = "none"
    if on_cpu:
        Config().to_env()
        os.environ["SGLANG_PLATFORM"] = "sglang_mm_cpu"
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        platform.without_pinned_memory()
    from sglang.srt.entrypoints.engine import Engine

    decoder.choose()
    _, settings = server_settings(Config(), on_cpu=on_cpu)
    return Engine(model_path=model_path, **settings)
