"""LLaVA in transformers."""

from __future__ import annotations

from vlm_edge.export.verification.reference import Reference as Base


class Reference(Base):
    """`LlavaForConditionalGeneration`: one tile a picture."""

    model_class = "LlavaForConditionalGeneration"
