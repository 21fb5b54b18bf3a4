"""The doors through which SGLang starts its parts: each makes sure that ours is live behind it."""

import sys

from sglang_mm.errors import SglangMMError
from sglang_mm.serving.selfcheck import check_plugin, check_processor


def run_scheduler_process(*args, **kwargs) -> None:
    """The process of one rank. Without our plugin it would serve wrong values, so it ends here instead."""
    from sglang.srt.managers.scheduler import run_scheduler_process as run_stock
    from sglang.srt.plugins import load_plugins

    load_plugins()
    try:
        check_plugin()
    except SglangMMError as error:
        sys.exit(f"sglang_mm: {error}")
    run_stock(*args, **kwargs)


def init_tokenizer_manager(*args, **kwargs):
    """SGLang's tokenizer manager, in the process that starts the others. Raises SelfCheckError."""
    from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_stock

    manager, templates = init_stock(*args, **kwargs)
    check_processor(manager.mm_processor)
    return manager, templates
