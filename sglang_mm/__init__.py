"""sglang_mm: long multimodal prompts on SGLang, prefill sharded by ring attention.

`import sglang_mm` needs torch alone; `sglang_mm.Engine` imports SGLang when it is first asked for.
"""

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str):
    if name == "Engine":
        from sglang_mm.serving.engine import Engine

        return Engine
    raise AttributeError(f"module 'sglang_mm' has no attribute {name!r}")
