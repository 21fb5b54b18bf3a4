"""`python -m sglang_mm.tiny checkpoint DIR` and `python -m sglang_mm.tiny video FILE`."""

import argparse

from sglang_mm.tiny import write_checkpoint, write_video


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sglang_mm.tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint", help="write a tiny Qwen2.5-VL checkpoint with its processor")
    checkpoint.add_argument("path", metavar="DIR")
    checkpoint.add_argument("--random", action="store_true", help="random attention instead of planted head patterns")
    checkpoint.add_argument("--seed", type=int, default=0)
    video = commands.add_parser("video", help="write an mp4 of moving coloured shapes")
    video.add_argument("path", metavar="FILE")
    video.add_argument("--seconds", type=float, default=20)
    video.add_argument("--fps", type=int, default=4)
    video.add_argument("--size", type=int, default=224, help="width and height in pixels, an even number")
    video.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "checkpoint":
        print(write_checkpoint(args.path, planted=not args.random, seed=args.seed))
    else:
        size = args.size
        print(write_video(args.path, seconds=args.seconds, fps=args.fps, width=size, height=size, seed=args.seed))


if __name__ == "__main__":
    main()
