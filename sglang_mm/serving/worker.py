"""SGLang's scheduler process, entered through a door that makes sure the plugin is live in it."""

import sys

from sglang_mm.errors import SglangMMError


def run_scheduler_process(*args, **kwargs) -> None:
    """What SGLang starts for each rank. A worker without our plugin would serve wrong values, so it ends here."""
    from sglang.srt.managers.scheduler import run_scheduler_process as run_stock
    from sglang.srt.plugins import load_plugins

    from sglang_mm.serving.selfcheck import check_plugin

    load_plugins()
    try:
        check_plugin()
    except SglangMMError as error:
        sys.exit(f"sglang_mm: {error}")
    run_stock(*args, **kwargs)
