"""Documents and docstrings speak of files, modules and commands that exist, and no file goes unmentioned."""

import re
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, ROOT

ARCHITECTURE = ROOT / "docs" / "architecture.md"
FOLDERS = (PACKAGE, "tests", "benchmarks")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PYTHON = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
HERE = Path(__file__).parent  # these files also name what must not exist


def documented_files(text: str) -> list[str]:
    """Files of the package that have a line, in order, as paths below it."""
    section = text.partition("## One line per file")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w/]+\.py)` \| \S.* \|$", section, re.MULTILINE)


def missing_mentions(text: str, base: Path) -> list[str]:
    """What a text names and the tree lacks: files in backticks, modules to run, make's targets.

    A file may be named from the root, from the package, from the text's own folder, or by its bare name.
    """
    names = {path.name for path in [*PYTHON, *DOCUMENTS]}
    paths = re.findall(r"`([\w./-]+\.(?:py|md))`", text)
    missing = [path for path in paths if path not in names and not _exists(path, base)]
    modules = re.findall(r"python -m ((?:sglang_mm|benchmarks|tests)\b[\w.]*\w)", text)
    missing += [module for module in modules if not _runs(module)]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"`make ([a-z-]+)|^ {4}make ([a-z-]+)\s*(?:#.*)?$", text, re.MULTILINE)
    return missing + [f"make {''.join(words)}" for words in commands if "".join(words) not in targets]


def missing_links(text: str, base: Path) -> list[str]:
    """Targets of a document's links that are not in the tree; addresses aside."""
    return [link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text) if not (base / link).exists()]


def _exists(path: str, base: Path) -> bool:
    return any((folder / path).is_file() for folder in (ROOT, ROOT / PACKAGE, base))


def _runs(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_every_file_has_one_line():
    files = sorted(str(path.relative_to(ROOT / PACKAGE)) for path in (ROOT / PACKAGE).rglob("*.py"))
    assert sorted(documented_files(ARCHITECTURE.read_text())) == files


def test_lines_are_counted_as_they_stand():
    lines = "| `a.py` | one |\n| `b/c.py` | two |\n| `d.py` | |\n| `a.py` | again |\n"
    text = f"| `x.py` | y |\n## One line per file\n{lines}\n## Next\n| `z.py` | y |"
    assert documented_files(text) == ["a.py", "b/c.py", "a.py"]


def test_a_request_takes_ten_lines():
    section = ARCHITECTURE.read_text().partition("## A request, in ten lines\n\n")[2].partition("\n\n")[0]
    assert [line.split(". ")[0] for line in section.splitlines()] == [str(i) for i in range(1, 11)]


def test_what_is_mentioned_exists():
    mentions = {path: missing_mentions(path.read_text(), path.parent) for path in [*DOCUMENTS, *PYTHON]}
    assert {str(path): missing for path, missing in mentions.items() if missing and path.parent != HERE} == {}
    links = {str(path): missing_links(path.read_text(), path.parent) for path in DOCUMENTS}
    assert {path: missing for path, missing in links.items() if missing} == {}


@pytest.mark.parametrize(
    "text", ["`serving/nowhere.py`", "python -m sglang_mm.nowhere --x", "    make no  # x", "`make no A=b`"]
)
def test_a_mention_of_nothing_is_found(text):
    assert len(missing_mentions(text, ROOT)) == 1


def test_a_mention_of_something_is_not():
    assert missing_mentions("`kernels/merge.py` `merge.py` `make test`, python -m sglang_mm.launch.", ROOT) == []
    assert missing_links("[a](docs/architecture.md#rooms) [b](https://x.org) [c](LICENSE) [d](no.md)", ROOT) == [
        "no.md"
    ]
