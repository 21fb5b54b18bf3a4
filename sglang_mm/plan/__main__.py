"""python -m sglang_mm.plan check | show | draw PLAN, or show | draw --from-request FILE"""

import argparse
import sys

from sglang_mm.errors import ConfigError, SglangMMError
from sglang_mm.patterns.plan import Plan
from sglang_mm.patterns.plan_file import load, read_model
from sglang_mm.plan.geometry import parse_geometry
from sglang_mm.plan.show import details, table, title
from sglang_mm.plan.show_request import request_details, request_table

DESCRIPTION = "Check, print or draw a plan file; print or draw what a request really did."
PROMPT = "text:20,video:8x4x6,text:40"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang_mm.plan", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="exit code 0 if the plan is sound and fits the model, else 1")
    check.add_argument("--model-path", metavar="DIR", help="the checkpoint that the plan must fit")
    show = commands.add_parser("show", help="one letter per head, or one layer in full")
    show.add_argument("--layer", type=int, metavar="N", help="print this layer with all its numbers")
    draw = commands.add_parser("draw", help="draw which keys the rows of a prompt see")
    draw.add_argument("--layer", type=int, metavar="N", default=0)
    draw.add_argument("--head", type=int, metavar="N", help="this head alone (default: every head of the layer)")
    draw.add_argument("--prompt", metavar="GEOMETRY", default=PROMPT, help=f"default {PROMPT}: frames x rows x columns")
    draw.add_argument("--out", metavar="PNG", default="plan.png", help="default plan.png")
    draw.add_argument("--rows", type=_positions, metavar="A:B", help="with --from-request and --head: these rows")
    draw.add_argument("--keys", type=_positions, metavar="A:B", help="with --from-request and --head: these keys")
    show.add_argument("--chunk", type=int, metavar="N", help="with --from-request: one chunk of the prompt")
    check.add_argument("plan", metavar="PLAN", help="a plan file")
    for command in (show, draw):
        source = command.add_mutually_exclusive_group(required=True)
        source.add_argument("plan", metavar="PLAN", nargs="?", help="a plan file")
        source.add_argument("--from-request", metavar="FILE", help="what a server kept with --keep-selections")
    return parser


def run(args: argparse.Namespace) -> str:
    """What to print. Raises ConfigError for whatever does not fit."""
    if args.command != "check" and args.from_request:
        return _run_request(args)
    for name in ("rows", "keys", "chunk"):
        if getattr(args, name, None) is not None:
            raise ConfigError(f"--{name} with a plan", "--from-request FILE", f"leave --{name} out")
    plan = load(args.plan)
    if args.command == "check":
        return _check(plan, args.plan, args.model_path)
    if args.layer is not None:
        _within("--layer", args.layer, plan.model.layers)
    if args.command == "show":
        return table(plan) if args.layer is None else details(plan, args.layer)
    if args.head is not None:
        _within("--head", args.head, plan.model.heads)
    from sglang_mm.patterns.pictures import draw_plan

    return str(draw_plan(plan, args.layer, args.head, parse_geometry(args.prompt), args.out))


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    try:
        print(run(args))
    except SglangMMError as error:
        print(f"sglang_mm: {error}", file=sys.stderr)
        return 1
    return 0


def _run_request(args: argparse.Namespace) -> str:
    from sglang_mm.patterns import selection_file

    kept = selection_file.load(args.from_request)
    if args.command == "draw":
        from sglang_mm.patterns.pictures import draw_request

        return str(draw_request(kept, args.layer, args.head, args.out, rows=args.rows, keys=args.keys))
    if args.chunk is not None:
        _within("--chunk", args.chunk, len(kept.chunks))
    return request_table(kept, args.chunk) if args.layer is None else request_details(kept, args.layer, args.chunk)


def _positions(text: str) -> range:
    """`A:B`: positions A .. B - 1."""
    try:
        start, stop = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B, two positions of the prompt") from None
    return range(start, stop)


def _check(plan: Plan, path: str, model_path: str | None) -> str:
    if model_path is None:
        return f"{path} is sound. {title(plan)}"
    try:
        plan.require(read_model(model_path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.given}", error.allowed, error.remedy) from error
    return f"{path} is sound and fits {model_path}. {title(plan)}"


def _within(flag: str, given: int, count: int) -> None:
    if not 0 <= given < count:
        raise ConfigError(f"{flag} {given}", f"0 to {count - 1}", "count from 0")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
