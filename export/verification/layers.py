"""The output of every layer of a bundle's engine: its graph, run again with the layers as outputs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_edge.errors import EngineFailure
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.manifest import DecoderSettings

# as export/vision and export/language name the values
LAYER = re.compile(r"^((?:vision|llm)\.layers\.\d+)\.output$")
MASKED = np.finfo(np.float32).min


def vision_layers(bundle: Bundle, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Layer name -> float32 [tiles, tokens, width], for every layer the bundle computes.

    Args:
        pixels: float32 [tiles, 3, height, width].
    """
    return _run(bundle, "vision", {"pixel_values": pixels})


def llm_layers(bundle: Bundle, embeds: np.ndarray) -> dict[str, np.ndarray]:
    """Layer name -> float32 [1, n, width] of a prompt prefilled at once.

    Args:
        embeds: float32 [1, n, width].
    """
    return _run(bundle, "llm", prefill_feeds(bundle.manifest.decoder, embeds))


def prefill_feeds(decoder: DecoderSettings, embeds: np.ndarray) -> dict[str, np.ndarray]:
    """All inputs that an llm graph may have, for a whole prompt and an empty cache of its length."""
    count = embeds.shape[1]
    queries, keys = np.arange(count)[:, None], np.arange(count)
    seen = keys <= queries
    recent = seen & (keys > queries - (decoder.sliding_window or count))
    cache = np.zeros((1, decoder.kv_heads, count, decoder.head_dim), np.float32)
    return {
        "inputs_embeds": embeds,
        "positions": np.arange(count)[None],
        "write_indices": np.zeros(1, np.int64),
        "logit_positions": np.array([count - 1]),
        "attention_mask": np.where(seen, np.float32(0), MASKED)[None, None],
        "sliding_attention_mask": np.where(recent, np.float32(0), MASKED)[None, None],
        **{f"past.{kv}.{i}": cache for i in range(decoder.layers) for kv in ("key", "value")},
    }


def _run(bundle: Bundle, engine: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    # The CPU's own graph is what answers; a lowering that fuses layers away leaves the portable one.
    model, names = _with_layers(bundle.graph(engine, "cpu"))
    if not names:
        model, names = _with_layers(bundle.file(bundle.manifest.engines[engine].graph))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The model is handed over as bytes, so that nothing is written into the bundle.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.path)
    )
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        wanted = {spec.name for spec in session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        outputs = session.run(list(names), feeds)
    except Exception as error:
        raise EngineFailure(engine, str(error).splitlines()[0]) from error
    return dict(zip(names.values(), outputs, strict=True))


def _with_layers(path: Path) -> tuple[bytes, dict[str, str]]:
    """The serialized graph with its layers' outputs added, and output name -> layer name, in order."""
    model = ir.load(path)
    names: dict[str, str] = {}
    for node in model.graph:
        for value in node.outputs:
            found = LAYER.match(value.name or "")
            if found and value.name is not None:
                names[value.name] = found[1]
                if value not in model.graph.outputs:
                    model.graph.outputs.append(value)
    return ir.to_proto(model).SerializeToString(), names
