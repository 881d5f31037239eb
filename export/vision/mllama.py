"""The vision encoder of Llama 3.2 Vision (Dubey et al. 2024, arXiv 2407.21783, section 7.1): a ViT over all
tiles of a picture at once, which knows their arrangement, and gated layers behind it.

The reference computes the tiles that an arrangement leaves empty, and some empty positions behind every
tile's tokens (`PAD_TO`); its mask keeps empty positions from each other alone, so what they become is part
of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import TensorRef, Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.activations import activation
from vlm_edge.export.layers.linear import LayerNorm, Linear, parameter
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import StreamedTensor, constant
from vlm_edge.export.vision.clip import MLP
from vlm_edge.export.vision.patches import VisionSettings
from vlm_edge.runtime.tiling.mllama import arrangements

PAD_TO = 8  # tokens of a tile are a multiple of it
OUTER_EPSILON = 1e-5  # of the norms around the layers, whatever norm_eps says
SHUT = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class MllamaVision:
    """vision_config of Llama 3.2 Vision.

    Attributes:
        vit: the layers' sizes, and a tile's.
        global_layers: gated layers behind them.
        kept: of the first layers, whose outputs are part of the features.
        tiles: of a picture at most.
    """

    vit: VisionSettings
    global_layers: int
    kept: tuple[int, ...]
    tiles: int

    @property
    def tokens(self) -> int:
        """Features of a tile, the class token's first."""
        return self.vit.native_patches + 1

    @property
    def padded(self) -> int:
        """Positions of a tile in the layers."""
        return -(-self.tokens // PAD_TO) * PAD_TO

    @property
    def width(self) -> int:
        """Of the features: of the last layer's output, and of those that are kept."""
        return self.vit.width * (1 + len(self.kept))


def read(config: Config) -> MllamaVision:
    """vision_config of Llama 3.2 Vision.

    Raises:
        UnsupportedConfig: a value or key that the encoder cannot honour.
    """
    config.choice("model_type", "mllama_vision_model", ("mllama_vision_model",))
    config.only("num_channels", 3, 3, "images have three channels here")
    config.get("tie_word_embeddings")  # transformers 4 wrote it into every config
    vit = VisionSettings(
        width=config.size("hidden_size", 1280),
        hidden=config.size("intermediate_size", 5120),
        layers=config.size("num_hidden_layers", 32),
        heads=config.size("attention_heads", 16),
        patch=config.size("patch_size", 14),
        image=config.size("image_size", 448),
        epsilon=config.number("norm_eps", 1e-5),
        act=activation(config, "hidden_act", "gelu"),
    )
    if vit.width % vit.heads:
        why = f"it should divide {vit.width}"
        raise UnsupportedConfig(config.name("attention_heads"), vit.heads, why)
    settings = MllamaVision(
        vit=vit,
        global_layers=config.size("num_global_layers", 8),
        kept=_kept(config, vit.layers),
        tiles=config.size("max_num_tiles", 4),
    )
    default = [list(grid) for grid in arrangements(4)]
    given = config.get("supported_aspect_ratios", default)
    if given != [list(grid) for grid in arrangements(settings.tiles)]:
        why = f"it should be all arrangements of up to {settings.tiles} tiles, as the processor counts them"
        raise UnsupportedConfig(config.name("supported_aspect_ratios"), given, why)
    width = config.size("vision_output_dim", 7680)
    if width != settings.width:
        why = f"{vit.width} wide outputs of {len(settings.kept) + 1} layers are {settings.width}"
        raise UnsupportedConfig(config.name("vision_output_dim"), width, why)
    config.finish()
    return settings


def _kept(config: Config, layers: int) -> tuple[int, ...]:
    key = "intermediate_layers_indices"
    given = config.get(key, [3, 7, 15, 23, 30])
    good = isinstance(given, list) and given
    if not good or not all(type(i) is int and -layers <= i < layers for i in given):
        why = f"it should name some of the {layers} layers"
        raise UnsupportedConfig(config.name(key), given, why)
    return tuple(index % layers for index in given)


class Encoder(nn.Module):
    """pixel_values [tiles, 3, height, width], aspect_ratio_id int64 [1] -> features [most tiles, tokens,
    width], those of empty tiles behind the picture's own."""

    def __init__(self, weights: Weights, settings: MllamaVision, quantizer: Quantizer) -> None:
        super().__init__("vision")
        self._settings, vit = settings, settings.vit
        self.patch_embedding = parameter(
            weights.sub("patch_embedding"), "weight", vit.width, 3, vit.patch, vit.patch
        )
        self.positions = _positions(weights, settings)
        self.layernorm_pre = LayerNorm(weights.sub("layernorm_pre"), vit.width, OUTER_EPSILON)
        self.layers = _layers(weights.sub("transformer"), vit, vit.layers, False, quantizer)
        self.layernorm_post = LayerNorm(weights.sub("layernorm_post"), vit.width, OUTER_EPSILON)
        self.tile_positions = _tile_positions(weights, settings)
        self.global_layers = _layers(
            weights.sub("global_transformer"), vit, settings.global_layers, True, quantizer
        )

    def forward(self, op: Any, pixels: ir.Value, arrangement: ir.Value) -> ir.Value:
        settings, vit = self._settings, self._settings.vit
        tiles, padded, width = settings.tiles, settings.padded, vit.width
        given = op.Shape(pixels, start=0, end=1)  # [1]: tiles that are not empty
        mask = self._mask(op, given)
        row = op.Sub(arrangement, 1)
        size = [vit.patch, vit.patch]
        x = op.Conv(pixels, self.patch_embedding, kernel_shape=size, strides=size)
        x = op.Transpose(op.Reshape(x, [0, width, -1]), perm=[0, 2, 1])  # [given, patches, width]
        empty = op.Sub(op.Constant(value_ints=[tiles]), given)
        nothing = op.Constant(value_ints=[0])
        first = op.Constant(value_ints=[0, 1, 0])  # room for the class token
        x = op.Pad(x, op.Concat(first, empty, nothing, nothing, axis=0))
        x = op.Add(
            x, op.Squeeze(op.Gather(self.positions, row, axis=0), [0])
        )  # [tiles, tokens, width]
        x = op.Pad(self.layernorm_pre(op, x), [0, 0, 0, 0, padded - settings.tokens, 0])
        x = op.Reshape(x, [1, tiles * padded, width])
        states = self._run(op, self.layers, x, mask, 0)
        x = op.Reshape(self.layernorm_post(op, states[-1]), [tiles, padded, width])
        x = op.Add(x, op.Squeeze(op.Gather(self.tile_positions, row, axis=0), [0]))
        x = op.Reshape(x, [1, tiles * padded, width])
        x = self._run(op, self.global_layers, x, mask, vit.layers)[-1]
        # The reference lays the kept layers side by side channel by channel.
        kept = [op.Unsqueeze(states[index], [-1]) for index in settings.kept]
        side = op.Concat(*kept, axis=-1) if len(kept) > 1 else kept[0]
        parts = [
            op.Reshape(value, [tiles, padded, -1]) for value in (x, side)
        ]  # [tiles, padded, width], [tiles, padded, width * kept]
        return op.Slice(op.Concat(*parts, axis=-1), [0], [settings.tokens], [1])

    def _run(
        self, op: Any, layers: nn.ModuleList, x: ir.Value, mask: ir.Value, first: int
    ) -> list[ir.Value]:
        """The outputs of all layers, [1, tiles * padded, width] each."""
        states = list[ir.Value]()
        for index, layer in enumerate(layers):
            x = layer(op, x, mask)
            x.name = f"vision.layers.{first + index}.output"
            states.append(x)
        return states

    def _mask(self, op: Any, given: ir.Value) -> ir.Value:
        """float32 [1, 1, n, n] of all positions: empty ones do not see each other."""
        settings = self._settings
        tile = constant(np.arange(settings.tiles)[:, None])
        behind = constant(np.arange(settings.padded)[None] >= settings.tokens)
        empty = op.Or(
            op.GreaterOrEqual(op.initializer(tile, "tile_numbers"), given),
            op.initializer(behind, "behind_tokens"),
        )  # [tiles, padded]
        flags = op.Reshape(op.Cast(empty, to=ir.DataType.FLOAT), [1, 1, -1, 1])
        return op.Mul(op.MatMul(flags, op.Transpose(flags, perm=[0, 1, 3, 2])), SHUT)


def _layers(
    weights: Weights, vit: VisionSettings, count: int, gated: bool, quantizer: Quantizer
) -> nn.ModuleList:
    layers = weights.sub("layers")
    return nn.ModuleList([_Layer(layers.sub(i), vit, gated, quantizer) for i in range(count)])


class _Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a gate in the global layers."""

    def __init__(
        self, weights: Weights, vit: VisionSettings, gated: bool, quantizer: Quantizer
    ) -> None:
        super().__init__()
        attention, width = weights.sub("self_attn"), vit.width
        self._heads = vit.heads
        self.input_layernorm = LayerNorm(weights.sub("input_layernorm"), width, vit.epsilon)
        self.q_proj = Linear(attention.sub("q_proj"), width, width, False, quantizer)
        self.k_proj = Linear(attention.sub("k_proj"), width, width, False, quantizer)
        self.v_proj = Linear(attention.sub("v_proj"), width, width, False, quantizer)
        self.o_proj = Linear(attention.sub("o_proj"), width, width, False, quantizer)
        self.post_attention_layernorm = LayerNorm(
            weights.sub("post_attention_layernorm"), width, vit.epsilon
        )
        self.mlp = MLP(weights.sub("mlp"), vit, quantizer)
        self.gate_attn = _gate(weights.tensor("gate_attn", 1)) if gated else None
        self.gate_ffn = _gate(weights.tensor("gate_ffn", 1)) if gated else None

    def forward(self, op: Any, x: ir.Value, mask: ir.Value) -> ir.Value:
        y = self.input_layernorm(op, x)
        q, k, v = self.q_proj(op, y), self.k_proj(op, y), self.v_proj(op, y)
        y = op.Attention(q, k, v, mask, q_num_heads=self._heads, kv_num_heads=self._heads)
        y = self.o_proj(op, y)
        x = op.Add(x, y if self.gate_attn is None else op.Mul(y, self.gate_attn))
        y = self.mlp(op, self.post_attention_layernorm(op, x))
        return op.Add(x, y if self.gate_ffn is None else op.Mul(y, self.gate_ffn))


def _gate(tensor: TensorRef) -> nn.Parameter:
    """tanh of the checkpoint's value, float32 [1]"""
    values = np.tanh(tensor.numpy())
    return nn.Parameter(values.shape, data=constant(values))


def _positions(weights: Weights, settings: MllamaVision) -> nn.Parameter:
    """All that is added to the patches, by arrangement: float32 [arrangements, tiles, tokens, width].

    Of the patches the embedding of their tile, of the class tokens their own; of both the embeddings of the
    place in a tile, and of the place in an arrangement. A row, which may have 30 MB, is made when it is
    written."""
    tiles, tokens, width = settings.tiles, settings.tokens, settings.vit.width
    count = len(arrangements(tiles))
    embedding = weights.sub("gated_positional_embedding")
    before = weights.sub("pre_tile_positional_embedding")
    gate = np.tanh(embedding.tensor("gate", 1).numpy())
    own = embedding.tensor("embedding", tokens, width)
    table = embedding.tensor("tile_embedding.weight", count + 1, tiles * tokens * width)
    tile_gate = np.tanh(before.tensor("gate", 1).numpy())
    tile_table = before.tensor("embedding.weight", count + 1, tiles * width)
    first = weights.tensor("class_embedding", width)

    def rows() -> Iterator[np.ndarray]:
        places = (1 - gate) * own.numpy()
        for index in range(1, count + 1):  # 0 stands for no picture
            row = gate * np.array(table.view[index], np.float32).reshape(tiles, tokens, width)
            row += places
            row[:, 0] += first.numpy()
            tile = np.array(tile_table.view[index], np.float32).reshape(tiles, 1, width)
            row[:, 1:] += tile_gate * tile
            yield row[None]

    shape = (count, tiles, tokens, width)
    return nn.Parameter(shape, data=StreamedTensor(rows, ir.DataType.FLOAT, shape))


def _tile_positions(weights: Weights, settings: MllamaVision) -> nn.Parameter:
    """What the global layers add to the tiles, by arrangement: float32 [arrangements, tiles, 1, width]."""
    tiles, width = settings.tiles, settings.vit.width
    behind, count = weights.sub("post_tile_positional_embedding"), len(arrangements(tiles))
    table = behind.tensor("embedding.weight", count + 1, tiles * width).numpy()[1:]
    values = np.tanh(behind.tensor("gate", 1).numpy()) * table.reshape(-1, tiles, 1, width)
    return nn.Parameter(values.shape, data=constant(values))
