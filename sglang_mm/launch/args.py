"""Our flags, split from SGLang's. Imports nothing heavy: `--help` answers at once."""

import argparse
from dataclasses import dataclass

from sglang_mm.config import SCHEDULES, VISIONS, Config

DESCRIPTION = """\
Serve long multimodal prompts on SGLang, prefill sharded over C ranks by ring attention.

The flags below are ours. Every other flag is SGLang's and passes through unchanged (--model-path, --host, --port,
--dtype, --revision, --download-dir, --trust-remote-code, ...): see them all with --help-all.
"""


@dataclass(frozen=True)
class Launch:
    """config: ours. sglang: the flags that are SGLang's, as the user gave them."""

    config: Config
    sglang: list[str]


def build_parser() -> argparse.ArgumentParser:
    default = Config()
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mm.launch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python -m sglang_mm.launch --model-path MODEL [--tp T] [--cp C] [any SGLang flag]",
    )
    add = parser.add_argument
    add(
        "--tp",
        "--tp-size",
        "--tensor-parallel-size",
        type=int,
        default=default.tp,
        metavar="T",
        dest="tp",
        help="tensor-parallel width: weights are split over T ranks (default %(default)s)",
    )
    add(
        "--cp",
        type=int,
        default=default.cp,
        metavar="C",
        help="context-parallel width: prompts are split over C replicas of T ranks (default %(default)s)",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default=default.schedule,
        metavar="auto|ring|gather",
        help="how K/V travel between the C replicas during prefill: ring | gather | auto (default %(default)s)",
    )
    add(
        "--cp-min-tokens",
        type=int,
        default=default.cp_min_tokens,
        metavar="N",
        help="batches whose longest request has fewer new tokens, and touches no larger image or video, are not "
        "sharded (default %(default)s)",
    )
    add(
        "--vision",
        choices=VISIONS,
        default=default.vision,
        help="frames: attention inside each frame and true video timing, as the model was trained; "
        "stock: SGLang's values, quadratic in the video's length (default %(default)s)",
    )
    add(
        "--deadline",
        type=float,
        default=default.deadline_s,
        metavar="SECONDS",
        dest="deadline_s",
        help="longest wait of one rank for another before it raises (default %(default)s)",
    )
    _add_local_media(add)
    add("--help-all", action="store_true", help="show this and SGLang's flags (takes some seconds)")
    return parser


def _add_local_media(add) -> None:
    add(
        "--allow-local-media",
        action="append",
        default=[],
        metavar="DIR",
        help="requests may name files below DIR (give it again for more; default: any file while --host is loopback, "
        "none otherwise)",
    )


def parse(argv: list[str]) -> Launch:
    """Split a command line into ours and SGLang's. Raises ConfigError for what cannot work; exits on --help."""
    ours, theirs = build_parser().parse_known_args(argv)
    values = vars(ours)
    if values.pop("help_all"):
        theirs.append("--help")
    config = Config(**values)
    return Launch(config, theirs)
