"""Installing this package into an SGLang 0.5.23 environment changes none of its packages."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.bare import project
from tests.house.source import PACKAGE, ROOT

SGLANG = "sglang==0.5.23"


def user_requirements() -> list[str]:
    """What a user's install asks for: the core dependencies and the extra `serve`."""
    return project()["dependencies"] + project()["optional-dependencies"]["serve"]


def unsatisfied(requirements: list[str]) -> list[str]:
    """Requirements that the installed packages do not meet, so that pip would have to change one."""
    wanted = map(Requirement, requirements)
    return [f"{need}: {version(need.name)}" for need in wanted if version(need.name) not in need.specifier]


def against_sglangs_pins(requirements: list[str]) -> list[str]:
    """Requirements that exclude the very version that SGLang pins."""
    theirs = [need for need in map(Requirement, requires("sglang")) if not need.marker or need.marker.evaluate()]
    pins = {canonicalize_name(need.name): pin for need in theirs for pin in need.specifier if pin.operator == "=="}
    wanted = [(need, pins.get(canonicalize_name(need.name))) for need in map(Requirement, requirements)]
    return [f"{need}: SGLang needs {pin}" for need, pin in wanted if pin and pin.version not in need.specifier]


def test_our_requirements_are_met_by_what_sglang_brings():
    assert SGLANG in user_requirements()
    assert unsatisfied(user_requirements()) == []
    assert against_sglangs_pins(user_requirements()) == []


def test_a_requirement_that_would_change_something_is_found():
    torch = version("torch")
    assert unsatisfied([f"torch!={torch}", f"torch=={torch}", "sglang"]) == [f"torch!={torch}: {torch}"]
    assert len(against_sglangs_pins([f"torch<{torch}", "torch", "numpy", "pytest"])) == 1


@pytest.mark.parametrize(("unmet", "installs"), [("", [PACKAGE]), ('"torch<2", ', None)], ids=["ours", "control"])
def test_pip_would_install_this_package_alone(tmp_path, unmet, installs):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    settings = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(settings.replace("dependencies = [", f"dependencies = [{unmet}", 1))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", f"{tmp_path}[serve]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if installs is None:
        assert done.returncode != 0 and "torch<2" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]] == installs
