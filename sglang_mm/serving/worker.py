"""The doors through which SGLang starts its parts: each makes sure that ours is live behind it."""

import signal
import sys

from sglang_mm.errors import SglangMMError
from sglang_mm.serving.selfcheck import check_plugin, check_processor


def run_scheduler_process(*args, **kwargs) -> None:
    """The process of one rank. Without our plugin it would serve wrong values, so it ends here instead."""
    from sglang.srt.managers.scheduler import run_scheduler_process as run_stock
    from sglang.srt.plugins import load_plugins

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C in a terminal: who started the ranks ends them
    load_plugins()
    try:
        check_plugin()
    except SglangMMError as error:
        sys.exit(f"sglang_mm: {error}")
    run_stock(*args, **kwargs)


def run_detokenizer_process(*args, **kwargs) -> None:
    """SGLang's detokenizer, which Ctrl-C in a terminal reaches as well."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process as run_stock

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_stock(*args, **kwargs)


def init_tokenizer_manager(server_args, port_args, *args, **kwargs):
    """SGLang's tokenizer manager, in the process that starts the others. Raises SelfCheckError."""
    from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_stock

    from sglang_mm.serving.supervised import Signals, files_of
    from sglang_mm.serving.supervisor import current

    manager, templates = init_stock(server_args, port_args, *args, **kwargs)
    manager.signal_handler_class = Signals
    if watch := current():
        watch.files += files_of(port_args)
    check_processor(manager.mm_processor)
    return manager, templates
