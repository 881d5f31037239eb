"""How a linear layer's weight is stored: the one place where a part's precision changes its graph.

A layer asks its quantizer for the product `x @ weight.T`. Everything is written as standard ONNX,
quantization as symmetric QuantizeLinear/DequantizeLinear with zero-point 0, which each engine fuses
(TensorRT wants exactly this; `lowering/` adapts it where another engine wants it otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import CalibrationError, CheckpointError
from vlm_edge.export.checkpoint import CHUNK_BYTES, TensorRef
from vlm_edge.export.tensors import StreamedTensor, constant, transposed

TINY = np.float32(1e-12)  # smallest scale: a column of zeros stays zero instead of dividing by it


class Quantizer(Protocol):
    """Gives a linear layer its product with a stored weight."""

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        """A module `(op, x [..., in]) -> [..., out]` for `weight [out, in]` of layer `path`."""


class FloatProduct(nn.Module):
    """MatMul with the float32 weight."""

    def __init__(self, weight: TensorRef) -> None:
        super().__init__("")
        self.weight = nn.Parameter((weight.shape[1], weight.shape[0]), data=transposed(weight))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.MatMul(x, self.weight)


class Float:
    """Full precision."""

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        return FloatProduct(weight)


class Observer:
    """Full precision, noting every linear layer's input so that calibration can read it.

    Args:
        reduce: `(op, value) -> {kind: value}`, what to keep of an input.
        only: paths whose inputs are kept; None keeps all.

    Attributes:
        weights: the weight [out, in] of every layer, by path.
        observed: what was kept of each distinct linear input, by the path of the first layer that
            reads it.
        readers: for every layer's path, the path its input is observed under.
    """

    def __init__(
        self,
        reduce: Callable[[Any, ir.Value], dict[str, ir.Value]],
        only: Collection[str] | None = None,
    ) -> None:
        self.observed: dict[str, dict[str, ir.Value]] = {}
        self.readers: dict[str, str] = {}
        self.weights: dict[str, TensorRef] = {}
        self._reduce, self._only = reduce, only
        self._seen: list[tuple[ir.Value, str]] = []

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        self.weights[path] = weight
        return _Observed(self, path, weight)

    def note(self, op: Any, path: str, x: ir.Value) -> None:
        first = next((known for seen, known in self._seen if seen is x), None)
        if first is None:
            first = path
            self._seen.append((x, path))
            if self._only is None or path in self._only:
                self.observed[path] = self._reduce(op, x)
        self.readers[path] = first

    def add_outputs(self, model: ir.Model) -> None:
        """Make all that was kept an output of the graph, float32, named by kind and path."""
        for path, kept in self.observed.items():
            for kind, value in kept.items():
                value.name = kind + path
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)


class _Observed(FloatProduct):
    def __init__(self, observer: Observer, path: str, weight: TensorRef) -> None:
        super().__init__(weight)
        self._observer, self._path = observer, path

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        self._observer.note(op, self._path, x)
        return super().forward(op, x)


class StaticInt8:
    """W8A8: per-channel int8 weights, one calibrated scale for each layer's input.

    Args:
        ranges: largest magnitude to represent at the input of each layer, by layer path; after the
            division by `smoothing` where there is one.
        smoothing: float32 [in] by layer path: inputs are divided by it, weights multiplied
            (`calibration.ranges.migration`). Layers that share an input share it.
        exact: paths of the layers that stay in float32.
    """

    def __init__(
        self,
        ranges: Mapping[str, float],
        smoothing: Mapping[str, np.ndarray] | None = None,
        exact: Collection[str] = (),
    ) -> None:
        self._ranges, self._smoothing, self._exact = ranges, smoothing or {}, frozenset(exact)
        # What was made of an input, in the (sub)graph where it was made.
        self._smooth: list[tuple[ir.Value, Any, ir.Value]] = []
        self._quantized: list[tuple[ir.Value, Any, ir.Value]] = []

    def keeping(self, exact: Collection[str], readers: Mapping[str, str]) -> StaticInt8:
        """The same with the layers `exact` in float32.

        An input is smoothed for the sake of its quantized readers: where there is none, nothing is.
        Where there are some, the float layers beside them read the smoothed input too, so that the
        division still goes into the normalisation, which has one output.

        Args:
            readers: for every layer, the layer its input is known by (`Observer.readers`).
        """
        smoothed = {first for path, first in readers.items() if path not in exact}
        smoothing = {p: s for p, s in self._smoothing.items() if readers[p] in smoothed}
        return StaticInt8(self._ranges, smoothing, exact)

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        smoothing = self._smoothing.get(path)
        if path not in self._exact:
            return _StaticInt8Product(self, path, weight, smoothing)
        if smoothing is None:
            return FloatProduct(weight)
        return _SmoothedProduct(self, path, weight, smoothing)

    def smooth(self, op: Any, path: str, x: ir.Value) -> ir.Value:
        """x divided by the smoothing of `path`, once for all layers that read it."""
        if path not in self._smoothing:
            return x
        known = _find(self._smooth, x, op)
        if known is None:
            # `fold.into_norms` moves this into the normalisation before it, where there is one.
            factors = op.initializer(constant(1 / self._smoothing[path]), f"{path}.smooth")
            known = op.Mul(x, factors)
            self._smooth.append((x, op.builder.graph, known))
        return known

    def activation(self, op: Any, path: str, x: ir.Value) -> ir.Value:
        """x after its Q/DQ pair; layers that share an input (query, key, value) share the pair."""
        known = _find(self._quantized, x, op)
        if known is None:
            if path not in self._ranges:
                raise CalibrationError(f"no range was calibrated for the input of {path}")
            scale = op.Constant(value_float=float(max(self._ranges[path] / 127, TINY)))
            zero = op.Constant(value=ir.Tensor(np.zeros((), np.int8)))
            smooth = self.smooth(op, path, x)
            known = op.DequantizeLinear(op.QuantizeLinear(smooth, scale, zero), scale, zero)
            self._quantized.append((x, op.builder.graph, known))
        return known


def _find(made: Iterable[tuple[ir.Value, Any, ir.Value]], x: ir.Value, op: Any) -> ir.Value | None:
    graph = op.builder.graph  # a branch of an `If` does not see what another one made
    return next((value for seen, where, value in made if seen is x and where is graph), None)


class _StaticInt8Product(nn.Module):
    def __init__(
        self, quantizer: StaticInt8, path: str, weight: TensorRef, smoothing: np.ndarray | None
    ) -> None:
        super().__init__("")
        outputs, inputs = weight.shape
        self._quantizer, self._path = quantizer, path
        factors = np.ones(inputs, np.float32) if smoothing is None else smoothing
        scale = channel_scales(weight, factors)
        self.weight = nn.Parameter(
            (inputs, outputs),
            data=StreamedTensor(
                lambda: _int8_columns(weight, scale, factors), ir.DataType.INT8, (inputs, outputs)
            ),
        )
        self.weight_scale = nn.Parameter((outputs,), data=constant(scale))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self._quantizer.activation(op, self._path, x)
        return op.MatMul(x, op.DequantizeLinear(self.weight, self.weight_scale, axis=1))


class _SmoothedProduct(nn.Module):
    """MatMul in float32 of an input that was smoothed for the quantized layers beside this one."""

    def __init__(
        self,
        quantizer: StaticInt8 | WeightOnly,
        path: str,
        weight: TensorRef,
        smoothing: np.ndarray,
    ) -> None:
        super().__init__("")
        self._quantizer, self._path = quantizer, path
        shape = weight.shape[1], weight.shape[0]
        columns = StreamedTensor(lambda: _scaled(weight, smoothing), ir.DataType.FLOAT, shape)
        self.weight = nn.Parameter(shape, data=columns)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.MatMul(self._quantizer.smooth(op, self._path, x), self.weight)


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
    ) -> None:
        self._bits, self._block, self._keep8, self._exact = bits, block, keep8, frozenset(exact)
        self._block8 = block8 or block
        self._rounded, self._smoothing = rounded or {}, smoothing or {}
        self._smooth: list[tuple[ir.Value, Any, ir.Value]] = []
        self.errors: Errors = {}

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        if path in self._exact:
            smoothing = self._smoothing.get(path)
            if smoothing is None:
                return FloatProduct(weight)
            return _SmoothedProduct(self, path, weight, smoothing)
        bits = 8 if path in self._keep8 else self._bits
        if bits == self._bits and path in self._rounded:
            rounded = self._rounded[path]
            shape, blocks = rounded.values.shape, len(rounded.scales)
            return self._smoothed(path, _BlockProduct(
                shape, bits, shape[0] // blocks, lambda: [rounded.values], lambda: [rounded.scales]
            ))  # fmt: skip
        block = block_size(weight.shape[1], self._block8 if bits == 8 else self._block)
        source = _Blocks(path, weight, bits, block, self._smoothing.get(path), self.errors)
        shape = weight.shape[1], weight.shape[0]
        return self._smoothed(path, _BlockProduct(shape, bits, block, source.values, source.scales))

    def smooth(self, op: Any, path: str, x: ir.Value) -> ir.Value:
        """x divided by the smoothing of `path`, once for all layers that read it."""
        known = _find(self._smooth, x, op)
        if known is None:
            # `fold` moves this into the normalisation or the product before it.
            factors = op.initializer(constant(1 / self._smoothing[path]), f"{path}.smooth")
            known = op.Mul(x, factors)
            self._smooth.append((x, op.builder.graph, known))
        return known

    def _smoothed(self, path: str, product: _BlockProduct) -> nn.Module:
        return _Divided(self, path, product) if path in self._smoothing else product


class _Divided(nn.Module):
    """The product of an input that was divided by its smoothing."""

    def __init__(self, quantizer: WeightOnly, path: str, product: _BlockProduct) -> None:
        super().__init__("")
        self._quantizer, self._path = quantizer, path
        self.product = product

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.product(op, self._quantizer.smooth(op, self._path, x))


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
        shape: tuple[int, int],
        bits: int,
        block: int,
        values: Callable[[], Iterable[np.ndarray]],
        scales: Callable[[], Iterable[np.ndarray]],
    ) -> None:
        super().__init__("")
        inputs, outputs = shape
        self._block = block
        dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
        self.weight = nn.Parameter(shape, dtype=dtype, data=StreamedTensor(values, dtype, shape))
        scale_shape = (inputs // block, outputs)
        self.weight_scale = nn.Parameter(
            scale_shape, data=StreamedTensor(scales, ir.DataType.FLOAT, scale_shape)
        )

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        weight = op.DequantizeLinear(self.weight, self.weight_scale, axis=0, block_size=self._block)
        return op.MatMul(x, weight)


Errors = dict[str, float]  # relative weight error (root mean square) by layer path


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
        for rows in _scaled(self.weight, self.smoothing, step):  # [step, out]
            grouped = rows.reshape(-1, self.block, outputs)
            scales = best_scales(grouped, self.bits)  # [step / block, 1, out]
            values = _rounded(grouped, scales, self.bits)
            error += float(np.square(values * scales - grouped).sum(dtype=np.float64))
            norm += float(np.square(grouped).sum(dtype=np.float64))
            self._scales.append(scales[:, 0])
            yield values.astype(np.int8).reshape(rows.shape)
        _refuse_not_finite(self.weight, norm)
        self.errors[self.path] = (error / norm) ** 0.5 if norm else 0.0

    def scales(self) -> Iterator[np.ndarray]:
        if not self._scales:
            for _ in self.values():
                pass
        scales, self._scales = self._scales, []
        yield from scales


def block_size(inputs: int, longest: int) -> int:
    """The longest power of two <= `longest` that divides the width; the whole width where none >= 16
    does (one scale a column)."""
    size = longest
    while size >= 16:
        if inputs % size == 0:
            return size
        size //= 2
    return inputs


def _refuse_not_finite(weight: TensorRef, size: float) -> None:
    """Raises CheckpointError if `size`, a sum over the weight's magnitudes, is not a number."""
    if not math.isfinite(size):
        raise CheckpointError(f"tensor {weight.name} holds values that are not finite numbers")


def channel_scales(weight: TensorRef, factors: np.ndarray) -> np.ndarray:
    """float32 [out]: the scale that maps each output channel's largest weight to 127, once inputs'
    weights are multiplied by `factors` [in]."""
    peaks = np.concatenate([np.abs(rows * factors).max(axis=1) for rows in weight.rows()])
    _refuse_not_finite(weight, float(peaks.sum()))
    return np.maximum(peaks / np.float32(127), TINY).astype(np.float32)


def _scaled(
    weight: TensorRef, factors: np.ndarray | None, step: int | None = None
) -> Iterator[np.ndarray]:
    """float32 blocks [step, out] of the weight [out, in], inputs' weights multiplied by `factors`."""
    start = 0
    for rows in weight.T.rows(step):
        if factors is not None:
            rows *= factors[start : start + len(rows), None]
        start += len(rows)
        yield rows


def _int8_columns(
    weight: TensorRef, scale: np.ndarray, factors: np.ndarray
) -> Iterator[np.ndarray]:
    for rows in _scaled(weight, factors):
        np.divide(rows, scale, out=rows)
        yield np.clip(np.rint(rows, out=rows), -127, 127).astype(np.int8)


def _rounded(grouped: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """float32 whole numbers in the range of `bits` bits."""
    values = np.divide(grouped, scales)
    np.rint(values, out=values)
    return np.clip(values, *((-127, 127) if bits == 8 else (-8, 7)), out=values)


def best_scales(grouped: np.ndarray, bits: int) -> np.ndarray:
    """Scale of each block of `grouped` [blocks, block, out] as [blocks, 1, out].

    At 4 bits it is the one of least squared error among a few, since clipping the largest weight a
    little pays when there are only 16 levels.
    """
    peak = np.abs(grouped).max(axis=1, keepdims=True)
    if bits == 8:
        return np.maximum(peak / np.float32(127), TINY)
    best = np.maximum(peak / np.float32(7), TINY)
    least = np.full(peak.shape, np.inf, np.float32)
    for shrink in np.linspace(1.0, 0.76, 5, dtype=np.float32):
        scale = np.maximum(peak * shrink / np.float32(7), TINY)
        off = _rounded(grouped, scale, bits)
        off *= scale
        off -= grouped
        error = np.square(off, out=off).sum(axis=1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best
