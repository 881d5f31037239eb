"""The connector of Idefics3 and SmolVLM: pixel shuffle (Shi et al. 2016, arXiv 1609.05158) and one linear
layer. Squares of neighbouring patches become one visual token of all their channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.linear import Linear
from vlm_edge.export.quantizers import Quantizer


@dataclass(frozen=True)
class ShuffleSettings:
    """Sizes of the connector.

    Attributes:
        grid: patches of a tile, down and across.
        factor: side, in patches, of the square that becomes one token.
    """

    inputs: int
    outputs: int
    grid: tuple[int, int]
    factor: int

    @property
    def tokens(self) -> int:
        """Visual tokens of one tile."""
        return self.grid[0] * self.grid[1] // self.factor**2


def read(config: Config, inputs: int, outputs: int, grid: tuple[int, int]) -> ShuffleSettings:
    """From `scale_factor`.

    Raises:
        UnsupportedConfig: it does not divide the patches along an edge of a tile.
    """
    factor = config.size("scale_factor", 2)
    if grid[0] % factor or grid[1] % factor:
        why = f"it should divide the {grid[0]} x {grid[1]} patches of a tile"
        raise UnsupportedConfig("scale_factor", factor, why)
    return ShuffleSettings(inputs, outputs, grid, factor)


class Connector(nn.Module):
    """features [tiles, patches, inputs] -> image_features [tiles, tokens, outputs]."""

    def __init__(self, weights: Weights, settings: ShuffleSettings, quantizer: Quantizer) -> None:
        super().__init__("connector")
        self._settings = settings
        inputs = settings.inputs * settings.factor**2
        proj = weights.sub("modality_projection").sub("proj")
        self.proj = Linear(proj, inputs, settings.outputs, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        (rows, columns), factor = self._settings.grid, self._settings.factor
        row = factor * self._settings.inputs  # channels of the patches side by side in one square
        x = op.Reshape(x, [0, rows // factor, factor, columns // factor, row])
        x = op.Transpose(x, perm=[0, 1, 3, 2, 4])  # [tiles, down, across, factor, row]
        x = op.Reshape(x, [0, self._settings.tokens, factor * row])
        return self.proj(op, x)
