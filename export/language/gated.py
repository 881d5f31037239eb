"""Decoders of any family with gated blocks between their layers that attend to pictures (Flamingo: Alayrac
et al. 2022, arXiv 2204.14198).

What depends on a picture alone, the keys and values of every block, comes from an engine of its own
(media_kv), so that a step reads no weight of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.language.interface import DecoderFamily, Mask
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import DecoderSettings, MediaSettings


@dataclass(frozen=True)
class Seen:
    """What a block attends to.

    Attributes:
        key, value: of all pictures, float32 [batch, kv_heads, media, head_dim].
        mask: float32 [batch, 1, s, media], added to the scores.
        attention_gate, feed_forward_gate: float32 [batch, s, 1], factors of what the block adds.
    """

    key: ir.Value
    value: ir.Value
    mask: ir.Value
    attention_gate: ir.Value
    feed_forward_gate: ir.Value


# (weights of the whole decoder, the block's number, quantizer) -> the module
# forward(op, x [batch, s, state_width], Seen) -> the next x
MakeBlock = Callable[[Weights, int, Quantizer], nn.Module]


@dataclass(frozen=True)
class Gated:
    """A decoder with blocks that attend to pictures (`interface.DecoderFamily`).

    Attributes:
        base: the decoder without them.
        before: of each of its layers the number of the block before it, None where there is none.
        numbers: of each of its layers the number in the checkpoint and in the reference's stack, where blocks
            are layers too; None: they are counted by themselves.
    """

    base: DecoderFamily
    before: tuple[int | None, ...]
    media: MediaSettings
    block: MakeBlock
    numbers: tuple[int, ...] | None = None

    @property
    def tied(self) -> bool:
        return self.base.tied

    @property
    def state_width(self) -> int:
        return self.base.state_width

    def settings(self) -> DecoderSettings:
        return replace(self.base.settings(), media=self.media)

    def masks(self) -> Sequence[Mask]:
        return self.base.masks()

    def context(self, op: Any, weights: Weights, inputs: Mapping[str, ir.Value]) -> Context:
        return Context(self.base.context(op, weights, inputs), inputs)

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        number = self.before[index]
        block = None if number is None else self.block(weights, number, quantizer)
        own = index if self.numbers is None else self.numbers[index]
        return Layer(block, number, self.base.layer(weights, own, quantizer))

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        return self.base.head(weights, head, quantizer)


@dataclass(frozen=True)
class Context:
    """What the layers share: the base's context, and the graph's inputs."""

    base: Any
    inputs: Mapping[str, ir.Value]

    def seen(self, op: Any, number: int) -> Seen:
        gates = op.Split(self.inputs["media_gate"], axis=-1, num_outputs=2, _outputs=2)
        names = f"media.key.{number}", f"media.value.{number}", "media_mask"
        return Seen(*(self.inputs[name] for name in names), *gates)


class Layer(nn.Module):
    """A layer of the base and the block before it, if any (`interface.DecoderFamily.layer`)."""

    def __init__(self, block: nn.Module | None, number: int | None, layer: nn.Module) -> None:
        super().__init__()
        self._number = number
        self.block, self.layer = block, layer

    def forward(
        self, op: Any, x: ir.Value, context: Context, *rest: Any
    ) -> tuple[ir.Value, list[ir.Value]]:
        if self.block is not None and self._number is not None:
            x = self.block(op, x, context.seen(op, self._number))
        found: tuple[ir.Value, list[ir.Value]] = self.layer(op, x, context.base, *rest)
        return found
