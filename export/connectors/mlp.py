"""The two-layer MLP projector of LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.activations import Activation, activation
from vlm_edge.export.layers.linear import Linear
from vlm_edge.export.quantizers import Quantizer


@dataclass(frozen=True)
class ProjectorSettings:
    """Sizes and form of the projector."""

    inputs: int
    outputs: int
    bias: bool
    act: Activation


def read(config: Config, inputs: int, outputs: int) -> ProjectorSettings:
    """From `projector_hidden_act` and `multimodal_projector_bias`.

    Raises:
        UnsupportedConfig: an activation we do not have.
    """
    return ProjectorSettings(
        inputs=inputs,
        outputs=outputs,
        bias=config.flag("multimodal_projector_bias", True),
        act=activation(config, "projector_hidden_act", "gelu"),
    )


class Projector(nn.Module):
    """features [tiles, tokens, inputs] -> image_features [tiles, tokens, outputs]."""

    def __init__(self, weights: Weights, settings: ProjectorSettings, quantizer: Quantizer) -> None:
        super().__init__("connector")
        inputs, outputs, bias = settings.inputs, settings.outputs, settings.bias
        self._act = settings.act
        self.linear_1 = Linear(weights.sub("linear_1"), inputs, outputs, bias, quantizer)
        self.linear_2 = Linear(weights.sub("linear_2"), outputs, outputs, bias, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.linear_2(op, self._act(op, self.linear_1(op, x)))
