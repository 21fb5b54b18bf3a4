"""Our flags, split from SGLang's. Imports nothing heavy: `--help` answers at once."""

import argparse
from dataclasses import dataclass, fields

from sglang_mm.config import BACKENDS, KV, SCHEDULES, VISIONS, Config
from sglang_mm.errors import ConfigError

DESCRIPTION = """\
Serve long multimodal prompts on SGLang, prefill sharded over C ranks by ring attention.

The flags below are ours. Every other flag is SGLang's and passes through unchanged (--model-path, --host, --port,
--dtype, --revision, --download-dir, --trust-remote-code, ...): see them all with --help-all.
"""


@dataclass(frozen=True)
class DryRunFlags:
    """What --dry-run is to look at; see the help of each flag."""

    tokens: int | None
    prompt: str | None
    gpu: str | None
    plan: str | None
    json: bool


@dataclass(frozen=True)
class Launch:
    """config: ours. sglang: the flags that are SGLang's, as the user gave them. dry_run: None to serve."""

    config: Config
    sglang: list[str]
    dry_run: DryRunFlags | None = None


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
    _add_prefill(add, default)
    _add_sparse(parser.add_argument_group("sparse attention").add_argument, default)
    add(
        "--deadline",
        type=float,
        default=default.deadline_s,
        metavar="SECONDS",
        dest="deadline_s",
        help="longest wait of one rank for another before it raises (default %(default)s)",
    )
    _add_nodes(parser.add_argument_group("nodes").add_argument, default)
    _add_local_media(add)
    _add_dry_run(parser.add_argument_group("dry run").add_argument)
    add(
        "--media-dir",
        default=default.media_dir,
        metavar="DIR",
        help="where pixels of requests lie while they are served, 4.7 KB a token (default: the system's temporary "
        "directory)",
    )
    add("--help-all", action="store_true", help="show this and SGLang's flags (takes some seconds)")
    return parser


def _add_prefill(add, default: Config) -> None:
    add(
        "--schedule",
        choices=SCHEDULES,
        default=default.schedule,
        metavar="auto|ring|gather",
        help="how K/V travel between the C replicas during prefill: ring | gather | auto (default %(default)s)",
    )
    add(
        "--kv",
        choices=KV,
        default=default.kv,
        help="sharded: each of the C replicas keeps 1/C of all K/V, so that C times as many tokens fit; replicated: "
        "each keeps all, and decodes without the others (default %(default)s)",
    )
    add(
        "--cp-min-tokens",
        type=int,
        default=default.cp_min_tokens,
        metavar="N",
        help="batches whose longest request has fewer new tokens, and touches no larger image or video, are not "
        "sharded, unless one of them is sparse (default %(default)s)",
    )
    add(
        "--vision",
        choices=VISIONS,
        default=default.vision,
        help="frames: attention inside each frame and true video timing, as the model was trained; "
        "stock: SGLang's values, quadratic in the video's length (default %(default)s)",
    )


def _add_sparse(add, default: Config) -> None:
    add(
        "--sparse",
        default=default.sparse,
        metavar="off|auto|PLAN.json",
        help="which keys the heads of a long prompt attend to. off: all. auto: by the plan in the checkpoint's folder, "
        "sglang_mm_plan.json, if --model-path is one that has it; else found online for each prompt. PLAN.json: by "
        "this plan. No head leaves keys out without a measured recall (default %(default)s)",
    )
    add(
        "--kernel-backend",
        choices=BACKENDS,
        default=default.kernel_backend,
        metavar="|".join(BACKENDS),
        help="what runs sparse attention (default %(default)s: the best that can on this device)",
    )
    add(
        "--sparse-min-tokens",
        type=int,
        default=default.sparse_min_tokens,
        metavar="N",
        help="requests with fewer new tokens, over all their chunks, are computed densely (default %(default)s)",
    )
    add(
        "--keep-selections",
        default=default.keep_selections,
        metavar="DIR",
        help="keep what each sparse request attended to, a file per request, for python -m sglang_mm.plan draw "
        "--from-request",
    )


def _add_nodes(add, default: Config) -> None:
    add(
        "--nodes",
        type=int,
        default=default.nodes,
        metavar="N",
        help="spread the ranks over N nodes of a Ray cluster, --cp / N replicas on each (default %(default)s)",
    )
    add(
        "--ray-address",
        default=default.ray_address,
        metavar="auto|local|HOST:PORT",
        help="the cluster. auto: the one that RAY_ADDRESS names or that runs on this machine; local: nodes simulated "
        "here, on CPU (default: none for one node; for more, auto if there is one, else local)",
    )
    add(
        "--nodes-deadline",
        type=float,
        default=default.nodes_deadline_s,
        metavar="SECONDS",
        dest="nodes_deadline_s",
        help="longest wait for room on the cluster (default %(default)s)",
    )


def _add_local_media(add) -> None:
    add(
        "--allow-local-media",
        action="append",
        default=[],
        metavar="DIR",
        help="requests may name files below DIR (give it again for more; default: any file while --host is loopback, "
        "none otherwise)",
    )


def _add_dry_run(add) -> None:
    add(
        "--dry-run",
        action="store_true",
        help="serve nothing: lay out one prompt, compile its tile programs and add up each rank's memory, from the "
        "config.json in --model-path alone; exit code 2 if it does not fit the GPU",
    )
    add("--tokens", type=int, metavar="N", help="length of the prompt: one video with some text")
    add("--prompt", metavar="GEOMETRY", help="the prompt in parts, as text:20,video:100x16x16,text:40 (frames x rows x "
        "columns of tokens)")  # fmt: skip
    add("--gpu", metavar="h100|h200|a100|b200|l40s|GB", help="the GPU that each rank has")
    add("--plan", metavar="FILE", help="compile the heads of this plan instead of every pattern")
    add("--json", action="store_true", help="print the dry run as JSON")


def parse(argv: list[str]) -> Launch:
    """Split a command line into ours and SGLang's. Raises ConfigError for what cannot work; exits on --help."""
    ours, theirs = build_parser().parse_known_args(argv)
    values = vars(ours)
    if values.pop("help_all"):
        theirs.append("--help")
    dry_run = _dry_run(values.pop("dry_run"), {field.name: values.pop(field.name) for field in fields(DryRunFlags)})
    config = Config(**values)
    return Launch(config, theirs, dry_run)


def _dry_run(asked: bool, values: dict) -> DryRunFlags | None:
    if asked:
        return DryRunFlags(**values)
    for name, value in values.items():
        if value not in (None, False):
            raise ConfigError(f"--{name} {value}", f"--{name} with --dry-run", "add --dry-run, or leave it out")
    return None
