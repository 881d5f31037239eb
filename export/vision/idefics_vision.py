"""The vision encoder of IDEFICS: CLIP's under a config of its own. Features are what its last layer gives,
without the final norm; the class token is the first of them."""

from __future__ import annotations

from dataclasses import replace

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.config import Config
from vlm_edge.export.vision.clip import MODEL_TYPES as CLIP
from vlm_edge.export.vision.patches import read_sizes
from vlm_edge.export.vision.tower import TowerSettings

MODEL_TYPES = ("idefics_vision", "idefics")  # the second by transformers before 4.46


def read(config: Config) -> TowerSettings:
    """vision_config of IDEFICS, for tiles of the size it was trained for.

    Raises:
        UnsupportedConfig: a value or key that the encoder cannot honour.
    """
    config.choice("model_type", MODEL_TYPES[0], MODEL_TYPES)
    config.get("vision_model_name")  # where its weights came from
    config.get("tie_word_embeddings")  # transformers 4 wrote it into every config
    settings = read_sizes(
        config,
        width=config.size("embed_dim", 768),  # hidden_size is another name of it, and wins
        hidden=config.size("intermediate_size", 5120),
        layers=32,
        heads=16,
        patch=14,
        epsilon=1e-5,
        act="gelu",
    )
    if settings.image < settings.patch:
        why = f"it should be at least one patch, {settings.patch} pixels"
        raise UnsupportedConfig(config.name("image_size"), settings.image, why)
    config.finish()
    settings = replace(settings, height=settings.image, breadth=settings.image)
    return TowerSettings(CLIP[0], settings, (settings.layers,), drop_first=False)
