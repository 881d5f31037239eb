"""ONNX tensors whose values are computed while the file is written, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from vlm_edge.export.checkpoint import TensorRef


class StreamedTensor(ir.LazyTensor):
    """A lazy tensor made of blocks along its first axis; only one block is in memory at a time."""

    __slots__ = ("_blocks",)

    def __init__(
        self, blocks: Callable[[], Iterable[np.ndarray]], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> None:
        def whole() -> ir.TensorProtocol:
            values = np.concatenate(list(blocks())).reshape(shape)
            return ir.Tensor(values, dtype=dtype)

        super().__init__(whole, dtype, ir.Shape(shape))
        self._blocks = blocks

    @property
    def blocks(self) -> Callable[[], Iterable[np.ndarray]]:
        """What gives the values, piece by piece."""
        return self._blocks

    def tofile(self, file: Any) -> None:
        for block in self._stored():
            file.write(np.ascontiguousarray(block).data)

    def tobytes(self) -> bytes:
        return b"".join(np.ascontiguousarray(block).tobytes() for block in self._stored())

    def _stored(self) -> Iterator[np.ndarray]:
        """The blocks as they lie in the file."""
        odd = False
        for block in self._blocks():
            if self.dtype == ir.DataType.INT4:
                assert not odd, (
                    "a byte holds two values: only the last block may have an odd number"
                )
                odd = bool(block.size % 2)
                block = pack_int4(block)
            yield block


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Two values a byte, the first in the low half (ONNX INT4)."""
    flat = np.asarray(values, dtype=np.int8).reshape(-1).view(np.uint8) & 0x0F
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << 4)


def float_tensor(ref: TensorRef) -> StreamedTensor:
    """The checkpoint's tensor as float32, in its own layout."""
    return StreamedTensor(ref.rows, ir.DataType.FLOAT, ref.shape)


def transposed(ref: TensorRef) -> StreamedTensor:
    """A linear weight [out, in] as MatMul's right side [in, out], float32."""
    return float_tensor(ref.T)


def column_peaks(weight: TensorRef) -> np.ndarray:
    """float32 [in]: the largest magnitude in each column of a linear weight [out, in], that is among
    the weights that read each input."""
    return np.max([np.abs(rows).max(axis=0) for rows in weight.rows()], axis=0)


def constant(values: np.ndarray) -> ir.Tensor:
    """A small tensor that is computed at once."""
    dtype = (
        ir.DataType.INT4 if values.dtype == ml_dtypes.int4 else ir.DataType.from_numpy(values.dtype)
    )
    return ir.Tensor(np.ascontiguousarray(values), dtype=dtype)
