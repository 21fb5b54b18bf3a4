"""The package's source as data: what each file imports, and which rooms and libraries it may import."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "sglang_mm"
NOUNS = frozenset({"types", "errors", "config"})
CORE = {"torch", "triton", "numpy", "msgspec", "zmq"}  # what `pip install sglang_mm` without extras brings


@dataclass(frozen=True)
class Room:
    """What the files of a room may import: other rooms of ours, and libraries besides Python's own."""

    ours: frozenset[str] | set[str] = NOUNS
    libraries: frozenset[str] | set[str] = frozenset()


ROOMS = {
    "errors": Room(),
    "config": Room(),
    "types": Room(libraries={"torch"}),
    "kernels": Room(libraries={"torch", "triton", "flashinfer", "flash_attn"}),
    "modality": Room(libraries={"torch", "numpy", "msgspec"}),
    "patterns": Room(NOUNS | {"kernels"}, {"torch", "numpy", "msgspec", "matplotlib"}),
    "parallel": Room(NOUNS | {"kernels"}, {"torch", "numpy"}),
    "events": Room(libraries={"msgspec", "zmq"}),
    "pixels": Room(libraries={"torch", "msgspec", "zmq"}),
    "serving": Room(
        NOUNS | {"kernels", "modality", "parallel", "patterns", "events", "pixels", "cluster"},
        {"torch", "msgspec", "sglang", "fastapi", "torchcodec", "decord", "prometheus_client", "cv2", "psutil"},
    ),
    "cluster": Room(libraries={"ray", "grpc"}),
    "dryrun": Room(NOUNS | {"patterns", "plan", "parallel"}, {"torch", "msgspec"}),
    "launch": Room(NOUNS | {"serving", "events", "dryrun"}, {"ray", "rich"}),
    "plan": Room(NOUNS | {"patterns", "modality"}, {"torch", "msgspec"}),
    "tiny": Room(libraries={"torch", "numpy", "av", "tokenizers", "transformers"}),
    "batch": Room(NOUNS | {"launch"}, {"aiohttp", "rich"}),
    "demo": Room(NOUNS | {"", "launch", "tiny", "pixels"}, {"torch", "transformers", "openai", "requests"}),
    "": Room(NOUNS | {"serving"}),  # sglang_mm/__init__.py: Engine, imported when first asked for
}


@dataclass(frozen=True)
class Import:
    """module: `a.b`, or `a.b.name` for `from a.b import name`. at_top: it runs when the file is imported."""

    module: str
    line: int
    at_top: bool


def package_sources() -> dict[str, str]:
    """Module name -> source, for every file of the package."""
    return {module_name(path.relative_to(ROOT)): path.read_text() for path in (ROOT / PACKAGE).rglob("*.py")}


def module_name(path: Path) -> str:
    """`a/b/c.py` -> `a.b.c`; a package is named by its `__init__` so that relative imports can be told apart."""
    return ".".join(path.with_suffix("").parts)


def imports_of(module: str, source: str) -> Iterator[Import]:
    """Every import statement, and every call that imports a module named by a literal."""
    tree = ast.parse(source)
    inside = {id(node) for function in _functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        for name in _imported(module, node):
            yield Import(name, node.lineno, id(node) not in inside)


def violations(module: str, source: str) -> list[str]:
    """Imports that the room of `module` may not have, one line each."""
    room = room_of(module)
    if room not in ROOMS:
        return [f"{module}: room {room!r} is unknown. Say in ROOMS what it may import"]
    found = []
    for imported in imports_of(module, source):
        top = imported.module.partition(".")[0]
        if top == PACKAGE:
            target, allowed = room_of(imported.module), ROOMS[room].ours | {room}
        else:
            target, allowed = top, ROOMS[room].libraries | sys.stdlib_module_names
        if target not in allowed:
            may = sorted(ROOMS[room].ours | ROOMS[room].libraries)
            found.append(f"{module}:{imported.line} imports {imported.module}. {room or PACKAGE} may import {may}")
    return found


def room_of(module: str) -> str:
    """The folder or file right below the package; empty for the package itself and for its names (`Engine`)."""
    name, *rest = [*module.split(".")[1:], ""][:2]
    path = ROOT / PACKAGE / name
    is_room = any(rest) or path.is_dir() or path.with_suffix(".py").is_file()
    return name if is_room and name != "__init__" else ""


def reached_by(module: str, sources: dict[str, str]) -> set[str]:
    """Files that `import module` runs: its packages, itself, and what their top levels import."""
    reached, waiting = set(), [module]
    while waiting:
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            for name in (prefix, f"{prefix}.__init__"):
                if name in sources and name not in reached:
                    reached.add(name)
                    waiting += [imported.module for imported in imports_of(name, sources[name]) if imported.at_top]
    return reached


def beyond_core(module: str, sources: dict[str, str]) -> list[str]:
    """Libraries that `import module` needs beyond the core dependencies, as `file:line library`."""
    allowed = CORE | sys.stdlib_module_names | {PACKAGE}
    return [
        f"{name}:{imported.line} {imported.module}"
        for name in sorted(reached_by(module, sources))
        for imported in imports_of(name, sources[name])
        if imported.at_top and imported.module.partition(".")[0] not in allowed
    ]


def long_functions(source: str, limit: int) -> list[str]:
    """`name (lines)` of every function of more than `limit` lines, decorators aside."""
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in _functions(ast.parse(source))]
    return [f"{name} ({lines})" for name, lines in lengths if lines > limit]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _imported(module: str, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = module.split(".")[: -node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__", "resolve_name"):
            return [str(node.args[0].value)]
    return []
