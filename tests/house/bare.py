"""An environment with this package and its core dependencies alone, linked from the one that runs the tests."""

import sys
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.house.source import PACKAGE, ROOT


def project() -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that requirements need, and those that these need, as pip would resolve them here."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        found.setdefault(wanted.name, distribution(wanted.name))
        for extra in {"", *wanted.extras}:
            if (wanted.name, extra) not in seen:
                seen.add((wanted.name, extra))
                needs = map(Requirement, found[wanted.name].requires or [])
                waiting += [need for need in needs if not need.marker or need.marker.evaluate({"extra": extra})]
    return found


def make_environment(folder: Path) -> Path:
    """Create the environment in `folder` and return its python. No pip, nothing is copied or downloaded."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for installed in closure(project()["dependencies"]).values():
        _link(installed, site)
    (site / PACKAGE).symlink_to(ROOT / PACKAGE)
    return folder / "bin" / Path(sys.executable).name


def _link(installed: Distribution, site: Path) -> None:
    """Link what a distribution put into site-packages; where a folder is shared (`nvidia/`), what lies inside it."""
    for parts in {_own_part(installed, path.parts) for path in installed.files}:
        target = site.joinpath(*parts)
        if parts and not target.exists():
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(installed.locate_file("/".join(parts)))


def _own_part(installed: Distribution, parts: tuple[str, ...]) -> tuple[str, ...]:
    if parts[0] in ("..", "__pycache__"):  # scripts, and compiled copies of single-file modules
        return ()
    top = Path(installed.locate_file(parts[0]))
    is_shared = top.is_dir() and top.suffix != ".dist-info" and not (top / "__init__.py").exists()
    return parts[:2] if is_shared else parts[:1]
