"""python -m sglang_mm.launch --model-path MODEL --tp T --cp C [any SGLang flag]"""

import sys

from sglang_mm.errors import SglangMMError
from sglang_mm.launch import summary
from sglang_mm.launch.args import build_parser, parse


def main(argv: list[str]) -> int:
    if not argv:
        build_parser().print_help()
        return 2
    try:
        launch = parse(argv)
        from sglang_mm.serving.server import serve

        config = launch.config
        serve(
            config,
            launch.sglang,
            on_start=lambda model, device, exposure: print(
                summary.topology(config, model, device, exposure), flush=True
            ),
            on_ready=lambda info, url: print(summary.ready(config, info, url), flush=True),
        )
    except SglangMMError as error:
        print(f"sglang_mm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
