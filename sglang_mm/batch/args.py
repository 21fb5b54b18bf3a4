"""The command line of a batch: our flags, the launcher's, and which of those decide what is answered."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sglang_mm.errors import ConfigError

KEY_ENV = "SGLANG_MM_API_KEY"
SENDING = ("auto", "path", "inline")
LOOPBACK = ("127.", "localhost", "[::1]")
DESCRIPTION = """\
Ask every question of IN and write the answers to OUT, in the order of IN.

Without --url a server is started for the batch, and stopped at its end: every flag that is not below goes to
python -m sglang_mm.launch (--model-path, --tp, --cp, --sparse, --nodes, ... and all of SGLang's).

Answers are kept in OUT.part as they come. After a crash or an interruption run the same command again: what is
answered is not asked again, and OUT is the same file as if nothing had happened.
"""
EXIT_CODES = """\
exit codes: 0 all answered; 3 some items have errors, see their lines; 1 broken off, run the same command again;
2 nothing was asked, since flags or files cannot work; 130 SIGINT, 143 SIGTERM.
"""
# flags of the server that change what it answers; of an alias, the first name counts
ANSWERING = {
    "--model-path": ("--model-path", "--model"),
    **{
        name: (name,)
        for name in (
            "--config", "--revision", "--tokenizer-path", "--chat-template", "--dtype", "--quantization",
            "--kv-cache-dtype", "--context-length", "--json-model-override-args", "--mm-process-config",
            "--preferred-sampling-params", "--sparse", "--sparse-min-tokens", "--vision",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What the user asked for. launch: flags of the own server; empty with a url. Times in seconds."""

    source: Path
    out: Path
    url: str | None
    api_key: str | None
    launch: list[str]
    concurrency: int
    retries: int
    restarts: int
    item_timeout: float
    start_timeout: float
    send_files: str
    retry_errors: bool
    overwrite: bool
    plain: bool

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        key = self.api_key or os.environ.get(KEY_ENV)
        return {"Authorization": f"Bearer {key}"} if key else {}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mm.batch",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python -m sglang_mm.batch IN OUT (--url URL | --model-path MODEL [any flag of the launcher])",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="IN",
        help='JSON lines: {"video": FILE, "question": TEXT}, or OpenAI\'s batch format',
    )
    add("out", type=Path, metavar="OUT", help="where answers go; OUT.part and OUT.server.log lie beside it")
    add("--url", help="ask this running server instead of starting one")
    add("--api-key", metavar="KEY", help=f"the server's; an own one gets it too (default: ${KEY_ENV})")
    add("--concurrency", type=int, default=4, metavar="N", help="items under way at a time (default %(default)s)")
    add("--retries", type=int, default=2, metavar="N", help="of an item that failed, but not of one that the server "
        "refused (default %(default)s)")  # fmt: skip
    add("--restarts", type=int, default=2, metavar="N", help="of the own server, if it ends (default %(default)s)")
    add("--item-timeout", type=float, default=3600.0, metavar="S", help="for one answer (default %(default)s)")
    add("--start-timeout", type=float, default=1800.0, metavar="S", help="until the own server is ready (default "
        "%(default)s)")  # fmt: skip
    add("--send-files", choices=SENDING, default="auto", help="path: the server reads media files itself; inline: they "
        "travel in the request; auto: path if the server is on this machine (default %(default)s)")  # fmt: skip
    add("--retry-errors", action="store_true", help="ask items again that ended with an error in an earlier run")
    add("--overwrite", action="store_true", help="OUT may lose answers that are not of the lines in IN, or of another "
        "model")  # fmt: skip
    add("--plain", action="store_true", help="lines instead of a progress bar; the default without a terminal")
    return parser


def parse(argv: list[str]) -> Asked:
    """Raises ConfigError for what cannot work; exits on --help and on words that are missing."""
    parser = build_parser()
    if (
        argv[:2]
        and not {"-h", "--help"} & set(argv)
        and (len(argv) < 2 or any(word.startswith("-") for word in argv[:2]))
    ):
        raise ConfigError(" ".join(argv[:2]), "IN and OUT, then flags", "name the two files first")
    ours, launch = parser.parse_known_args(argv)
    asked = Asked(**vars(ours), launch=launch)
    for name, least in (("concurrency", 1), ("retries", 0), ("restarts", 0)):
        if getattr(asked, name) < least:
            raise ConfigError(f"--{name} {getattr(asked, name)}", f"a whole number >= {least}", f"raise --{name}")
    for name in ("item_timeout", "start_timeout"):
        if not 0 < getattr(asked, name) < float("inf"):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {getattr(asked, name)}", "seconds > 0", f"leave {flag} out")
    if asked.url is not None:
        return _with_url(asked)
    _check_launch(launch)
    return asked


def _with_url(asked: Asked) -> Asked:
    if asked.launch:
        allowed = "with --url the flags in --help, since that server runs already"
        raise ConfigError(f"--url with {' '.join(asked.launch)}", allowed, "leave them out, or --url")
    if not re.match(r"https?://[^/\s]", asked.url):
        raise ConfigError(f"--url {asked.url}", "http(s)://HOST:PORT", "pass the address that the server printed")
    url = asked.url.rstrip("/").removesuffix("/v1")
    return Asked(**vars(asked) | {"url": url})


def _check_launch(flags: list[str]) -> None:
    from sglang_mm.launch.args import parse as parse_launch

    chosen = answering(flags)
    if not chosen.keys() & {"--model-path", "--config"}:
        raise ConfigError("no model", "--model-path MODEL, or --url URL", "say what is to answer")
    for other in ("--dry-run", "--help-all"):
        if other in flags:
            raise ConfigError(other, "flags of a server", f"run python -m sglang_mm.launch {other} by itself")
    parse_launch(flags)


def answering(flags: list[str]) -> dict[str, str]:
    """The flags in ANSWERING that were given, by their first names."""
    return {name: value for name, words in ANSWERING.items() for word in words if (value := value_of(flags, word))}


def value_of(flags: list[str], name: str) -> str | None:
    """What follows a flag, as `--name value` or `--name=value`; the last one counts."""
    found = None
    for word, following in zip(flags, [*flags[1:], ""]):
        if word == name:
            found = following
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def is_near(url: str) -> bool:
    """Whether a server at this address reads the same files as we do."""
    return url.partition("://")[2].startswith(LOOPBACK)
