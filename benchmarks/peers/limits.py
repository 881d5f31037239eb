"""The least time that a model's work takes on a machine whose rates are known.

Decode reads every weight and the cache once a token, so bytes over the read rate bound it. Prefill and
vision encoders compute: operations over the rate of large matrix products. Attention is counted in
bf16 where weights are quantized, as no engine quantizes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_edge.benchmarks.peers.protocol import Bits

BYTES: dict[Bits, float] = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}  # without scales


@dataclass(frozen=True)
class Limits:
    """Rates of the machine, as `engines/transformers.py` measures them.

    Attributes:
        read: bytes from memory, a second.
        compute: multiplications and additions a second, by the type computed in.
    """

    read: float
    compute: dict[str, float]

    def decode(self, config: dict[str, Any], bits: Bits, context: int) -> float:
        """Tokens a second at most, of a language model whose cache holds `context` positions."""
        kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * _head_dim(config)
        weights = _layer_weights(config) + config["vocab_size"] * config["hidden_size"]
        cache = kv * context * (4 if bits == "fp32" else 2)
        return self.read / (weights * BYTES[bits] + cache)

    def prefill(self, config: dict[str, Any], bits: Bits, tokens: int) -> float:
        """Seconds at least; the head is computed for the last position only."""
        linear = 2 * tokens * _layer_weights(config)
        linear += 2 * config["vocab_size"] * config["hidden_size"]
        width = config["num_attention_heads"] * _head_dim(config)
        attention = 4 * config["num_hidden_layers"] * width * tokens * (tokens + 1) / 2
        return self._compute(linear, attention, bits)

    def vision(self, config: dict[str, Any], bits: Bits) -> float:
        """Seconds at least, for one picture."""
        width, hidden = config["hidden_size"], config["intermediate_size"]
        layers, patch = config["num_hidden_layers"], config["patch_size"]
        tokens = (config["image_size"] // patch) ** 2
        linear = 2 * tokens * (layers * (4 * width**2 + 2 * width * hidden) + 3 * patch**2 * width)
        attention = 4 * layers * width * tokens**2
        return self._compute(linear, attention, bits)

    def _compute(self, linear: float, attention: float, bits: Bits) -> float:
        quantized = bits in ("int8", "int4")
        rate = self.compute["int8" if quantized else bits]
        return linear / rate + attention / self.compute["bf16" if quantized else bits]


def best(tries: Sequence[Limits]) -> Limits | None:
    """The highest of each rate: a busy machine only ever measures too little. None of none."""
    if not tries:
        return None
    compute = {kind: max(one.compute[kind] for one in tries) for kind in tries[0].compute}
    return Limits(max(one.read for one in tries), compute)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def _layer_weights(config: dict[str, Any]) -> int:
    """Weights of all linear layers, the head left out."""
    width, head_dim = config["hidden_size"], _head_dim(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    return int(config["num_hidden_layers"] * (attention + 3 * width * config["intermediate_size"]))
