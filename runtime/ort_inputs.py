"""The small inputs of a decoder's step: written on the host, read by the graph at fixed addresses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import onnxruntime

ALIGNMENT = 256  # bytes, as CUDA's own allocations have it

Place = tuple[str, int]  # of memory: ONNX Runtime's name for the device, and which of several


class StepInputs:
    """Numpy arrays in one block of memory, and what a graph reads of them.

    On the CPU the graph reads the block itself. On a device it reads a copy there, which one transfer
    brings up to date however many inputs there are.

    Args:
        shapes: shape and dtype by input.
        place: where the copy is.
        remote: inputs that the session reads there (`device_inputs`); the others it reads from the
            host. To bind an input in the other place would copy it once, and its later values never.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
        place: Place,
        remote: Set[str],
    ) -> None:
        self._place, self._offsets, size = place, dict[str, int](), 0
        for name, (shape, dtype) in shapes.items():
            self._offsets[name] = size
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._block = np.empty(size, np.uint8)
        self.arrays = {
            name: np.ndarray(shape, dtype, self._block, self._offsets[name])
            for name, (shape, dtype) in shapes.items()
        }
        self._remote = remote & shapes.keys()
        self._copy: Any = None
        if self._remote:
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            self._copy = value([size], np.uint8, *place)

    def bind(self, binding: Any, names: Set[str]) -> None:
        """Bind those of these inputs that a graph has; `self` must live as long as the binding is used."""
        for name, array in self.arrays.items():
            if name not in names:
                continue
            if name in self._remote:
                address = self._copy.data_ptr() + self._offsets[name]
                kind = array.dtype.type
                binding.bind_input(name, *self._place, kind, list(array.shape), address)
            else:  # wraps the array, no copy
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(name, value)

    def upload(self) -> None:
        """Let the graph see what the arrays hold now."""
        if self._copy is not None:
            self._copy.update_inplace(self._block)


def device_inputs(session: Any) -> set[str]:
    """Inputs that a session reads from its device's memory, not from the host's."""
    places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return {spec.name for spec, info in places if info.name != "Cpu"}


def dtypes(session: Any) -> dict[str, type[np.generic]]:
    """Numpy's type of each input of a session."""
    named: dict[str, type[np.generic]] = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
        "tensor(int8)": np.int8,
    }
    return {spec.name: named[spec.type] for spec in session.get_inputs()}
