"""Vision encoder and Q-Former of tiny random BLIP-2 and InstructBLIP checkpoints, and their graphs.

Weights are drawn as in tiny.py; the language model is as small as it can be, since nobody asks it here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from small_graph import run
from tiny import draw

from vlm_edge.export import graphs
from vlm_edge.export.checkpoint import Checkpoint, Weights
from vlm_edge.export.connectors import qformer
from vlm_edge.export.model import Part
from vlm_edge.export.parts import INSTRUCTION, image_parts
from vlm_edge.export.quantizers import Float, Observer
from vlm_edge.export.vision import eva
from vlm_edge.runtime.manifest import ImageSettings

Family = Literal["Blip2", "InstructBlip"]
VISION: dict[str, Any] = dict(
    hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
    image_size=30, patch_size=10, layer_norm_eps=1e-3,
)  # fmt: skip
QFORMER: dict[str, Any] = dict(
    hidden_size=30, intermediate_size=42, num_hidden_layers=3, num_attention_heads=5,
    cross_attention_frequency=2, layer_norm_eps=1e-3, vocab_size=57, max_position_embeddings=19,
)  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", hidden_size=44, intermediate_size=20, num_hidden_layers=1,
                  num_attention_heads=2, vocab_size=60),
    "opt": dict(model_type="opt", hidden_size=44, word_embed_proj_dim=28, ffn_dim=20,
                num_hidden_layers=1, num_attention_heads=2, vocab_size=60,
                max_position_embeddings=9),
    "t5": dict(model_type="t5", d_model=44, d_ff=20, num_layers=1, num_heads=2, d_kv=22,
               vocab_size=60),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A checkpoint in transformers and as parts of a bundle."""

    model: Any  # Blip2ForConditionalGeneration or InstructBlipForConditionalGeneration, float32
    checkpoint: Checkpoint
    parts: dict[str, Part]
    connector: qformer.QFormerSettings

    def torch(self, values: np.ndarray) -> Any:
        """A tensor of the same values."""
        import torch

        return torch.from_numpy(values)

    def layers(self, part: str) -> list[str]:
        """Paths of a part's linear layers."""
        observer = Observer(lambda op, x: {})
        self.parts[part].build(observer)
        return list(observer.weights)

    def image_features(self, pixels: np.ndarray, ids: np.ndarray | None = None) -> Any:
        """What transformers' get_image_features gives: `last_hidden_state` of the encoder,
        `qformer_outputs`, `pooler_output` the projected queries."""
        import torch

        text = {} if ids is None else {"qformer_input_ids": self.torch(ids)}
        with torch.inference_mode():
            return self.model.get_image_features(self.torch(pixels), **text)


def make(
    folder: Path,
    family: Family = "Blip2",
    vision: dict[str, Any] | None = None,
    qformer_args: dict[str, Any] | None = None,
    queries: int = 7,
    text: str = "llama",
    dtype: str = "float32",
) -> Made:
    """A checkpoint by transformers' save_pretrained, read back by us."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vision_config={**VISION, **(vision or {})},
        qformer_config={**QFORMER, **(qformer_args or {})},
        text_config=TEXTS[text],
        num_query_tokens=queries,
        image_token_index=59,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(zlib.crc32(repr((family, vision)).encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    return Made(model, *read_parts(folder))


def read_parts(
    folder: Path,
) -> tuple[Checkpoint, dict[str, Part], qformer.QFormerSettings]:
    """The checkpoint, its vision and connector parts, and the connector's settings."""
    checkpoint = Checkpoint(folder)
    config, weights = checkpoint.config, Weights(checkpoint)
    vision = eva.read(config.sub("vision_config"))
    text = config.sub("text_config")
    width = text.get("hidden_size", text.get("d_model"))
    connector = qformer.read(config, vision.width, width, text.get("word_embed_proj_dim"))
    parts = image_parts(
        ImageSettings(None, None, None, None, None, None, vision.height, vision.breadth),
        (1 + vision.patches, vision.width),
        (connector.queries, connector.outputs),
        lambda quantizer: eva.Encoder(weights.sub("vision_model"), vision, quantizer),
        lambda quantizer: qformer.Connector(weights, connector, quantizer),
        (INSTRUCTION,) if connector.instructed else (),
    )
    return checkpoint, parts, connector


def write(part: Part, path: Path, quantizer: Any = None, outputs: tuple[str, ...] = ()) -> Path:
    """The part's graph, checked by onnx; `outputs` are values it gives beside its own."""
    model = part.build(quantizer or Float())
    named = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(named[name] for name in outputs)
    graphs.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def pixels_of(part: Part, tiles: int, seed: int = 0) -> np.ndarray:
    """float32 [tiles, 3, height, width] of order 1."""
    shape = (tiles, *part.interface.inputs[0].shape[1:])
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def ids_of(settings: qformer.QFormerSettings, tiles: int, length: int) -> np.ndarray:
    """int64 [tiles, length], the vocabulary's first and last word among them."""
    ids = np.random.default_rng(length).integers(0, settings.vocabulary, (tiles, length))
    ids[0, 0], ids[-1, -1] = settings.vocabulary - 1, 0
    return ids


def close(found: np.ndarray, expected: Any, tolerance: float = 1e-4) -> None:
    """Equal within `tolerance` of the largest value."""
    expected = expected if isinstance(expected, np.ndarray) else expected.numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def layer_outputs(modules: Iterable[Any], forward: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What `forward` gives in transformers, and what each of `modules` gave on the way."""
    import torch

    outputs: list[Any] = []
    hooks = [m.register_forward_hook(lambda _, __, y: outputs.append(y)) for m in modules]
    with torch.inference_mode():
        result = forward()
    for hook in hooks:
        hook.remove()
    return result, outputs


__all__ = [
    "QFORMER", "VISION", "Family", "Made", "close", "ids_of", "layer_outputs", "make", "pixels_of",
    "read_parts", "run", "write",
]  # fmt: skip
