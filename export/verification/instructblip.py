"""InstructBLIP in transformers."""

from __future__ import annotations

from vlm_edge.export.verification.blip2 import Reference as Base
from vlm_edge.export.verification.reference import Inputs, Stages


class Reference(Base):
    """`InstructBlipForConditionalGeneration`."""

    model_class = "InstructBlipForConditionalGeneration"

    def stages(self, inputs: Inputs) -> Stages:
        """What the Q-Former's last layer makes of the instruction is read by nobody, and bundles do not
        compute it."""
        stages, config = super().stages(inputs), self.model.config
        last = f"connector.layers.{config.qformer_config.num_hidden_layers - 1}"
        if last in stages.layers:
            stages.layers[last] = stages.layers[last][:, : config.num_query_tokens]
        return stages
