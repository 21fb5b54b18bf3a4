"""python -m sglang_mm.launch --model-path MODEL --tp T --cp C [any SGLang flag]"""

import sys

from sglang_mm.errors import SglangMMError
from sglang_mm.launch import summary
from sglang_mm.launch.args import Launch, build_parser, parse


def main(argv: list[str]) -> int:
    if not argv:
        build_parser().print_help()
        return 2
    try:
        launch = parse(argv)
        if launch.dry_run:
            return dry_run(launch)
        from sglang_mm.serving.server import serve

        serve(
            launch.config,
            launch.sglang,
            on_start=lambda *started: print(summary.topology(*started), flush=True),
            on_ready=lambda *served: print(summary.ready(*served), flush=True),
        )
    except SglangMMError as error:
        print(f"sglang_mm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def dry_run(launch: Launch) -> int:
    """Exit code: 0, or 2 for a prompt that does not fit. Imports no sglang."""
    from sglang_mm.dryrun.run import Asked
    from sglang_mm.dryrun.show import show

    words = launch.dry_run
    asked = Asked(launch.config, launch.sglang, words.tokens, words.prompt, words.gpu, words.plan)
    return show(asked, as_json=words.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
