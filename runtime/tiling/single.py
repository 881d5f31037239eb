"""One tile for every picture: LLaVA-1.5, and every model without tiling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits, TilePlan
from vlm_edge.runtime.tiling.settings import SingleTile


@dataclass(frozen=True)
class SingleTiler:
    """`plan.Tiler` of a model that sees each picture as one tile."""

    settings: SingleTile

    def plan(self, width: int, height: int, limits: TileLimits = UNLIMITED) -> TilePlan:
        plan = TilePlan(width, height, (None,), (0, 0), (("picture", self.settings.tokens),))
        return limits.first([plan])

    def places(self, plan: TilePlan, image_token: str) -> str:
        return image_token * plan.tokens

    def assemble(self, plan: TilePlan, features: np.ndarray) -> np.ndarray:
        return features.reshape(-1, features.shape[-1])

    def grids(self) -> tuple[str, ...]:
        return ("1",)
