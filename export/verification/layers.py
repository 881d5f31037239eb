"""The output of every layer of a bundle's engine: its graph, run again with the layers as outputs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_edge.errors import EngineFailure
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.inputs import PromptInputs

# as export/vision, export/connectors and export/language name the values
LAYER = re.compile(r"^((?:vision|connector|llm_encoder|llm)\.layers\.\d+)\.output$")


def engine_layers(
    bundle: Bundle, engine: str, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Layer name -> float32 [tiles, tokens, width], for every layer that a stateless engine names.

    Args:
        feeds: the engine's inputs by name.
    """
    return _run(bundle, engine, feeds)[0]


def llm_layers(bundle: Bundle, inputs: PromptInputs) -> dict[str, np.ndarray]:
    """Layer name -> float32 [1, n, width] of a prompt prefilled at once; of an encoder-decoder the
    encoder's layers, then the decoder's for the token that the answer begins with."""
    settings, embeds = bundle.manifest.decoder, inputs.embeds
    if settings.start_token_id is None:
        feeds = prefill_feeds(settings, embeds)
        if inputs.media is not None:
            feeds |= inputs.media.feeds()
        return _run(bundle, "llm", feeds)[0]
    layers, cross = _run(bundle, "llm_encoder", {"inputs_embeds": embeds})
    start = bundle.embeddings().row(settings.start_token_id)[None, None]
    return layers | _run(bundle, "llm", prefill_feeds(settings, start) | cross)[0]


def _run(
    bundle: Bundle, engine: str, feeds: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The engine's layers by layer name, and its outputs by theirs."""
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
        outputs = [spec.name for spec in session.get_outputs()]
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
    except Exception as error:  # the library has an exception for each status
        raise EngineFailure(engine, str(error).splitlines()[0]) from error
    layers = {layer: found.pop(name) for name, layer in names.items()}
    return layers, found


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
