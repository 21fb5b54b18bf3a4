"""Where msgspec is not installed, a frozen dataclass does for the catalog of patterns what msgspec.Struct does.

The suite asks a GPU machine for torch and triton alone. Of all that it imports, the catalog is the one file that needs
msgspec, and it describes records with it; nothing is read from files here. The stand-in is gone once the catalog is
imported, so that no other library takes it for msgspec.
"""

import dataclasses
import importlib
import sys
from types import ModuleType


class Struct:
    """Frozen, comparable, with __post_init__; tags matter in plan files alone."""

    def __init_subclass__(cls, *, frozen: bool, tag=None, tag_field=None, forbid_unknown_fields: bool = False):
        super().__init_subclass__()
        dataclasses.dataclass(frozen=frozen)(cls)


def import_catalog() -> None:
    """Import sglang_mm.patterns.catalog, with the stand-in if need be."""
    try:
        import msgspec  # noqa: F401
    except ImportError:
        before = sys.modules.get("msgspec", _NOTHING)
        sys.modules["msgspec"] = ModuleType("msgspec")
        sys.modules["msgspec"].Struct = Struct
        try:
            importlib.import_module("sglang_mm.patterns.catalog")
        finally:
            del sys.modules["msgspec"]
            if before is not _NOTHING:
                sys.modules["msgspec"] = before


_NOTHING = object()
