"""Architectures by name: one file each, imported when asked for."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from vlm_edge.errors import BrokenArchitecture, UnknownArchitecture, UnsupportedConfig

REQUIRED = ("MODEL_TYPES", "RENAMES", "read")


def known() -> list[str]:
    """Names that `find` takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The architecture's module.

    Raises:
        UnknownArchitecture: there is no such file.
        BrokenArchitecture: the file does not import, or lacks a required value.
    """
    if name not in known():
        raise UnknownArchitecture(name, known())
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # whatever a broken file raises
        raise BrokenArchitecture(name, f"{type(error).__name__}: {error}") from error
    missing = [value for value in REQUIRED if not hasattr(module, value)]
    if missing:
        raise BrokenArchitecture(name, f"it lacks {', '.join(missing)}")
    return module


def find_for(model_type: object) -> tuple[str, ModuleType]:
    """The architecture that reads this `model_type` of config.json.

    Raises:
        UnknownArchitecture: none does.
        UnsupportedConfig: config.json does not say.
    """
    types: dict[str, str] = {}
    for name in known():
        module = find(name)
        types.update((kind, name) for kind in module.MODEL_TYPES)
        if model_type in module.MODEL_TYPES:
            return name, module
    if model_type is None:
        raise UnsupportedConfig(
            "model_type", None, f"it should be one of {', '.join(sorted(types))}"
        )
    raise UnknownArchitecture(str(model_type), types)
