"""The arrows between rooms, the libraries each room wraps, and the size of files and functions."""

import pytest

from tests.house.source import ROOT, beyond_core, long_functions, package_sources, violations

FILE_LINES, FUNCTION_LINES = 350, 60
BARE = [f"sglang_mm{room}" for room in ("", ".kernels", ".parallel", ".modality", ".events", ".launch")]


def python_files() -> list:
    return [path for folder in ("sglang_mm", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def test_arrows_between_rooms_hold():
    found = package_sources()
    assert {"sglang_mm.__init__", "sglang_mm.types.__init__", "sglang_mm.serving.backend"} <= found.keys()
    assert [line for module, source in sorted(found.items()) for line in violations(module, source)] == []


@pytest.mark.parametrize("room", BARE)
def test_core_dependencies_suffice(room):
    found = package_sources()
    modules = [room, *(module for module in found if module.startswith(f"{room}.") and room != "sglang_mm")]
    assert [line for module in modules for line in beyond_core(module, found)] == []


def test_files_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {path: lines for path, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions_are_short():
    found = {str(path.relative_to(ROOT)): long_functions(path.read_text(), FUNCTION_LINES) for path in python_files()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sglang_mm.types.__init__", "from sglang_mm.kernels import merge"),
        ("sglang_mm.errors", "import torch"),
        ("sglang_mm.kernels.new", "from sglang_mm.parallel import ring"),
        ("sglang_mm.parallel.new", "import sglang_mm.modality"),
        ("sglang_mm.parallel.new", "from sglang_mm import modality"),
        ("sglang_mm.parallel.new", "from ..modality import runs_of"),
        ("sglang_mm.kernels.__init__", "from ..launch import args"),
        ("sglang_mm.modality.new", "def f():\n    from sglang.srt import utils"),
        ("sglang_mm.modality.new", "from sglang_mm.kernels import merge"),
        ("sglang_mm.launch.new", "import sglang.srt"),
        ("sglang_mm.launch.new", "import importlib\nimportlib.import_module('sglang.srt.utils')"),
        ("sglang_mm.demo.new", "def f():\n    import sglang"),
        ("sglang_mm.serving.new", "import ray"),
        ("sglang_mm.serving.new", "class A:\n    import triton.language"),
        ("sglang_mm.serving.new", "from sglang_mm.launch import args"),
        ("sglang_mm.tiny.new", "from sglang_mm.serving import engine"),
        ("sglang_mm.unheard_of.new", "import torch"),
    ],
)
def test_a_planted_import_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sglang_mm.kernels.new", "import triton\nfrom . import merge\nfrom sglang_mm.errors import ConfigError"),
        ("sglang_mm.parallel.new", "from sglang_mm import kernels\nimport sglang_mm.types"),
        ("sglang_mm.serving.new", "import sglang.srt\nfrom sglang_mm.modality import runs_of\nimport os.path"),
        ("sglang_mm.demo.new", "from sglang_mm import Engine"),
    ],
)
def test_allowed_imports_pass(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize(("indent", "noticed"), [("", ["sglang_mm.b:1 av"]), ("def f():\n    ", [])])
def test_a_library_behind_two_imports_is_found(indent, noticed):
    chain = {"sglang_mm.__init__": "", "sglang_mm.a.__init__": "from sglang_mm import b", "sglang_mm.b": "import av"}
    chain["sglang_mm.a.__init__"] = indent + chain["sglang_mm.a.__init__"]
    assert beyond_core("sglang_mm.a", chain) == noticed


def test_a_long_function_is_found():
    source = "class A:\n    def f(self):\n" + "        x = 1\n" * 3 + "    def g(self): pass\n    def f(self): pass\n"
    assert long_functions(source, 4) == [] and long_functions(source, 3) == ["f (4)"]
