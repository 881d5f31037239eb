"""Our own kernels for the CPU engine, where they were built and the CPU has what they need.

The library holds ONNX Runtime custom operators (`native/`, domain `vlm_edge`). It is compiled when the
package is installed, if there is a C++ compiler, and is never required.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

DOMAIN = "vlm_edge"  # of the operators
SWITCH = "VLM_EDGE_NATIVE"  # the environment variable that turns the kernels off: 0


@functools.cache
def library() -> Path | None:
    """The library of custom operators, for `SessionOptions.register_custom_ops_library`.

    None where it was not built, where the CPU lacks AVX-512 with VNNI and BF16, or where the
    environment has VLM_EDGE_NATIVE=0. It is looked for once in a process.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            if ctypes.CDLL(str(path)).vlm_edge_supported():
                return path
        except OSError:  # built for another system, or damaged: it is optional
            continue
    return None
