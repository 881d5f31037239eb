"""T5's attention bias: a learned number for each head and each range of distances between two positions.

Near distances have a bucket each, farther ones share buckets that grow with their logarithm (Raffel et al.
2020, arXiv 1910.10683, section 2.1). Which bucket a distance has is settled at export; the graph looks the
bias up by distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.tensors import constant


@dataclass(frozen=True)
class RelativePositions:
    """The buckets of one model.

    Attributes:
        buckets: how many there are; where attention looks both ways, half for each direction.
        max_distance: distances from this one on share the last bucket.
    """

    buckets: int
    max_distance: int

    def of(self, distances: np.ndarray, both_ways: bool) -> np.ndarray:
        """int64 buckets of `distances`, key minus query, int64 of any shape.

        float32 where the reference has float32: at the borders of buckets the last bit decides.
        """
        buckets = self.buckets // 2 if both_ways else self.buckets
        first = np.where(distances > 0, buckets, 0) if both_ways else 0
        far = np.abs(distances) if both_ways else np.maximum(-distances, 0)
        exact = buckets // 2  # distances below it have a bucket each
        ratio = np.maximum(far, exact).astype(np.float32) / np.float32(exact)
        share = np.log(ratio.astype(np.float64)).astype(np.float32)
        share = (
            share / np.float32(math.log(self.max_distance / exact)) * np.float32(buckets - exact)
        )
        shared = np.minimum(exact + share.astype(np.int64), buckets - 1)
        return first + np.where(far < exact, far, shared)

    def bias(
        self,
        op: Any,
        weights: Weights,
        heads: int,
        queries: ir.Value,
        keys: ir.Value,
        both_ways: bool,
    ) -> ir.Value:
        """The bias of every pair, to be added to the scores: float32 [..., heads, queries, keys].

        Args:
            weights: hold `weight` [buckets, heads] (relative_attention_bias).
            queries, keys: int64 positions [..., queries] and [keys]; the leading axis is a batch.
        """
        learned = weights.tensor("weight", self.buckets, heads).numpy()
        reach = np.arange(-self.max_distance, self.max_distance + 1)
        table = np.ascontiguousarray(learned[self.of(reach, both_ways)].T)  # [heads, distances]
        distance = op.Sub(keys, op.Unsqueeze(queries, [-1]))  # [batch, queries, keys]
        near = op.Clip(distance, -self.max_distance, self.max_distance)
        values = op.initializer(constant(table), "relative_attention_bias")
        found = op.Gather(values, op.Add(near, self.max_distance), axis=1)
        return op.Transpose(found, perm=[1, 0, 2, 3])  # [batch, heads, queries, keys]


def read_relative_positions(config: Config) -> RelativePositions:
    """From text_config.

    Raises:
        UnsupportedConfig: fewer buckets than two for each direction, or a distance that leaves none to
            be shared.
    """
    buckets = config.size("relative_attention_num_buckets", 32)
    distance = config.size("relative_attention_max_distance", 128)
    if buckets < 4:
        raise UnsupportedConfig(
            config.name("relative_attention_num_buckets"), buckets, "it should be 4 or more"
        )
    if distance <= buckets // 2:
        raise UnsupportedConfig(
            config.name("relative_attention_max_distance"), distance,
            f"it should be more than half of the {buckets} buckets",
        )  # fmt: skip
    return RelativePositions(buckets, distance)
