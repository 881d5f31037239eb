"""INT8 or INT4 weights in blocks that share a scale, float activations: for language models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import CHUNK_BYTES, TensorRef
from vlm_edge.export.quantizers.rounding import (
    best_scales,
    block_size,
    channel_scales,
    refuse_not_finite,
    rounded,
    scaled,
)
from vlm_edge.export.quantizers.smoothing import Smoothing
from vlm_edge.export.tensors import StreamedTensor


class WeightOnly:
    """Blocks of the input axis share a scale; activations stay float.

    Args:
        bits: 8, or 4.
        block: longest block; shorter powers of two are used where the width asks for it.
        keep8: layer paths that stay at 8 bits (the output head decides the token by itself).
        rounded: layers rounded beforehand (GPTQ); the others are rounded to nearest.
        block8: longest block of the layers in `keep8`; None is `block`.
        smoothing: float32 [in] by layer path: inputs are divided by it, weights multiplied; those in
            `rounded` are already. Layers that share an input share it. Engines round activations too
            (ONNX Runtime to int8, a scale a block), so it pays where weights alone would not need it.
        exact: layers that stay in float32.
        columns: 8-bit weights have a scale for each output instead of blocks; what TensorRT multiplies
            without unpacking it first.

    Attributes:
        errors: relative error of each weight rounded to nearest, once it has been written.
    """

    def __init__(
        self,
        bits: int,
        block: int,
        keep8: frozenset[str] = frozenset(),
        rounded: Mapping[str, Rounded] | None = None,
        block8: int | None = None,
        smoothing: Mapping[str, np.ndarray] | None = None,
        exact: Collection[str] = (),
        columns: bool = False,
    ) -> None:
        self._bits, self._block, self._keep8, self._exact = bits, block, keep8, frozenset(exact)
        self._columns = columns
        self._block8 = block8 or block
        self._rounded, self._smoothing = rounded or {}, Smoothing(smoothing or {})
        self.errors: Errors = {}

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        if path in self._exact:
            return self._smoothing.float_product(path, weight)
        bits = 8 if path in self._keep8 else self._bits
        product = partial(_BlockProduct, self._smoothing, path)
        if bits == self._bits and path in self._rounded:
            known = self._rounded[path]
            shape, blocks = known.values.shape, len(known.scales)
            values, scales = (lambda: [known.values]), (lambda: [known.scales])
            return product(shape, bits, shape[0] // blocks, values, scales)
        factors = self._smoothing.factors.get(path)
        shape = weight.shape[1], weight.shape[0]
        if bits == 8 and self._columns:
            whole = _Columns(path, weight, factors, self.errors)
            return product(shape, bits, shape[0], whole.values, whole.scales)
        block = block_size(shape[0], self._block8 if bits == 8 else self._block)
        source = _Blocks(path, weight, bits, block, factors, self.errors)
        return product(shape, bits, block, source.values, source.scales)


@dataclass(frozen=True)
class Rounded:
    """A weight rounded beforehand: values int8 [in, out] and scales float32 [in / block, out], both
    memory-mapped."""

    values: np.ndarray
    scales: np.ndarray


class _BlockProduct(nn.Module):
    """MatMul with a weight of `bits` bits whose values and scales are streamed from two sources."""

    def __init__(
        self,
        smoothing: Smoothing,
        path: str,
        shape: tuple[int, int],
        bits: int,
        block: int,
        values: Callable[[], Iterable[np.ndarray]],
        scales: Callable[[], Iterable[np.ndarray]],
    ) -> None:
        super().__init__("")
        inputs, outputs = shape
        self._smoothing, self._path, self._block = smoothing, path, block
        dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
        self.weight = nn.Parameter(shape, dtype=dtype, data=StreamedTensor(values, dtype, shape))
        scale_shape = (inputs // block, outputs)
        self.weight_scale = nn.Parameter(
            scale_shape, data=StreamedTensor(scales, ir.DataType.FLOAT, scale_shape)
        )

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self._smoothing.divide(op, self._path, x)
        weight = op.DequantizeLinear(self.weight, self.weight_scale, axis=0, block_size=self._block)
        return op.MatMul(x, weight)


Errors = dict[str, float]  # relative weight error (root mean square) by layer path


@dataclass
class _Columns:
    """One weight with a scale for each output, which take a pass of their own over it."""

    path: str
    weight: TensorRef
    smoothing: np.ndarray | None
    errors: Errors

    def values(self) -> Iterator[np.ndarray]:
        error = norm = 0.0
        step = max(1, CHUNK_BYTES // (16 * self.weight.shape[0]))  # several copies of it are held
        for rows in scaled(self.weight, self.smoothing, step):  # [step, out]
            values = rounded(rows, self._scales, 8)
            error += float(np.square(values * self._scales - rows).sum(dtype=np.float64))
            norm += float(np.square(rows).sum(dtype=np.float64))
            yield values.astype(np.int8)
        self.errors[self.path] = (error / norm) ** 0.5 if norm else 0.0

    def scales(self) -> Iterator[np.ndarray]:
        yield self._scales[None]

    @cached_property
    def _scales(self) -> np.ndarray:
        """float32 [out]."""
        factors = self.smoothing
        if factors is None:
            factors = np.ones(self.weight.shape[1], np.float32)
        return channel_scales(self.weight, factors)


@dataclass
class _Blocks:
    """One weight, quantized once: the pass over the values leaves the scales for the next tensor."""

    path: str
    weight: TensorRef
    bits: int
    block: int
    smoothing: np.ndarray | None
    errors: Errors
    _scales: list[np.ndarray] = field(default_factory=list)

    def values(self) -> Iterator[np.ndarray]:
        self._scales = []
        outputs, _ = self.weight.shape
        # The scale search holds several copies of a chunk: keep chunks small.
        step = self.block * max(1, CHUNK_BYTES // (16 * outputs * self.block))
        error = norm = 0.0
        for rows in scaled(self.weight, self.smoothing, step):  # [step, out]
            grouped = rows.reshape(-1, self.block, outputs)
            scales = best_scales(grouped, self.bits)  # [step / block, 1, out]
            values = rounded(grouped, scales, self.bits)
            error += float(np.square(values * scales - grouped).sum(dtype=np.float64))
            norm += float(np.square(grouped).sum(dtype=np.float64))
            self._scales.append(scales[:, 0])
            yield values.astype(np.int8).reshape(rows.shape)
        refuse_not_finite(self.weight, norm)
        self.errors[self.path] = (error / norm) ** 0.5 if norm else 0.0

    def scales(self) -> Iterator[np.ndarray]:
        if not self._scales:
            for _ in self.values():
                pass
        scales, self._scales = self._scales, []
        yield from scales
