"""vlm-edge: a vision-language model from its checkpoint to the device it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_edge import errors

if TYPE_CHECKING:
    from vlm_edge.runtime.vlm import VLM

__version__ = "0.1.0"
__all__ = ["VLM", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    # VLM is imported when asked for: `vlm --help` and the export side need no engine.
    if name == "VLM":
        from vlm_edge.runtime.vlm import VLM

        return VLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
