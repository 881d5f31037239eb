"""T5 as two engines: transformers' logits and greedy tokens, whatever the lengths and the options."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import Cache
from tiny_t5 import CASES, SIZES, TinyT5, build, parts, prompt, table

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export import graphs
from vlm_edge.export.config import Config
from vlm_edge.export.language import t5
from vlm_edge.export.layers.relative_positions import RelativePositions
from vlm_edge.export.quantizers import Float
from vlm_edge.runtime import ort_decoder
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.encoder_decoder import EncoderDecoder
from vlm_edge.runtime.ort_decoder import open_decoder

TOLERANCE = 1e-4  # logits are of order 3
MARGIN = 2e-3  # of a reference that rounding cannot flip
LENGTHS = (1, 7, 150)  # the last is beyond every max_distance


@dataclass(frozen=True)
class Subject:
    """A tiny T5 here and in transformers."""

    config: t5.T5Config
    decoder: EncoderDecoder
    reference: Any
    table: np.ndarray

    def greedy(self, embeds: np.ndarray, steps: int) -> tuple[list[int], np.ndarray]:
        """Tokens, and the logits each was taken from, [steps, vocab]."""
        logits = [self.decoder.prefill(embeds).copy()]
        for _ in range(steps - 1):
            row = self.table[int(logits[-1].argmax())]
            logits.append(self.decoder.decode(row).copy())
        return [int(each.argmax()) for each in logits], np.stack(logits)

    def expected(self, embeds: np.ndarray, tokens: list[int]) -> np.ndarray:
        """Logits [n, vocab] of the reference, for an answer that is given."""
        import torch

        ids = torch.tensor([[self.config.start_token_id, *tokens[:-1]]])
        with torch.no_grad():
            found = self.reference(inputs_embeds=torch.from_numpy(embeds), decoder_input_ids=ids)
        return found.logits[0].numpy()


@dataclass(frozen=True)
class Graphs:
    """As much of a bundle as the decoder reads."""

    folder: Path
    manifest: Any
    table: np.ndarray

    def graph(self, name: str, *_: str) -> Path:
        return self.folder / f"{name}.onnx"

    def embeddings(self) -> Any:
        return SimpleNamespace(row=lambda token: self.table[token])


def make(case: TinyT5, folder: Path, cache_dtype: Any = "float32") -> Subject:
    import torch
    from transformers import T5ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if not folder.exists():
        build(case, folder)
    return opened(folder, T5ForConditionalGeneration.from_pretrained(folder).eval(), cache_dtype)


def opened(folder: Path, reference: Any, cache_dtype: Any = "float32") -> Subject:
    config, engines = parts(folder, cache_dtype)
    for name, part in engines.items():
        graphs.save(part.build(Float()), folder / f"{name}.onnx")
    manifest = SimpleNamespace(decoder=config.settings())
    bundle = Graphs(folder, manifest, table(folder, config))
    decoder = open_decoder(cast(Bundle, bundle), threads=1)
    assert isinstance(decoder, EncoderDecoder)
    return Subject(config, decoder, reference, bundle.table)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    root = tmp_path_factory.mktemp("t5")
    return Cache(lambda case: make(CASES[case], root / case))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    case: str, length: int, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 steps, through several growths of the cache and beyond the short distances."""
    monkeypatch.setattr(ort_decoder, "STEP", 16)
    it = subject(case)
    embeds = prompt(it.config, length, seed=length)
    it.decoder.clear()
    tokens, logits = it.greedy(embeds, 40)
    expected = it.expected(embeds, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    best = np.sort(expected, axis=1)
    assert (best[:, -1] - best[:, -2]).min() > MARGIN, "a near-tie: choose another salt"
    assert tokens == expected.argmax(axis=1).tolist()
    assert len(set(tokens)) >= 4, "an answer that repeats itself would hide errors"
    assert np.abs(expected).max() > 1


def test_the_reference_generates_the_same(subject: Callable[[str], Subject]) -> None:
    import torch

    for case in CASES:
        it = subject(case)
        embeds = prompt(it.config, 9)
        tokens, _ = it.greedy(embeds, 12)
        found = it.reference.generate(
            inputs_embeds=torch.from_numpy(embeds),
            do_sample=False,
            max_new_tokens=12,
            # its cache has as many layers as the encoder
            use_cache=it.config.decoder_layers <= it.config.encoder_layers,
        )[0].tolist()
        if 1 in tokens:
            tokens = tokens[: tokens.index(1) + 1]
        assert found == [it.config.start_token_id, *tokens]


@pytest.mark.parametrize("case", ["flan", "plain"])
def test_another_prompt_leaves_nothing_of_the_first(
    case: str, subject: Callable[[str], Subject]
) -> None:
    it = subject(case)
    first = it.greedy(prompt(it.config, 8), 5)
    it.greedy(prompt(it.config, 80, seed=1), 9)
    again = it.greedy(prompt(it.config, 8), 5)
    assert again[0] == first[0]
    np.testing.assert_allclose(again[1], first[1], rtol=0, atol=1e-6)


def test_a_decoder_in_chunks_is_the_whole(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is given, of 33 tokens, in chunks: positions are those of the whole."""
    it = subject("flan-gelu")
    decoder = it.decoder.decoder
    answer = prompt(it.config, 33, seed=5)
    found = []
    for chunk in (256, 7, 1):
        monkeypatch.setattr(ort_decoder, "CHUNK", chunk)
        it.decoder.prefill(prompt(it.config, 6))
        found.append(decoder.prefill(answer).copy())
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=0, atol=2e-5)


def test_an_int8_cache_moves_logits_a_little(tmp_path: Path) -> None:
    exact = make(CASES["flan"], tmp_path / "checkpoint")
    tokens, logits = exact.greedy(prompt(exact.config, 20), 30)
    rounded = opened(tmp_path / "checkpoint", None, "int8")
    assert {value.numpy().dtype.name for value in rounded.decoder.decoder._caches.values()} == {
        "int8",
        "float32",
    }
    found = [rounded.decoder.prefill(prompt(exact.config, 20)).copy()]
    found += [rounded.decoder.decode(exact.table[token]).copy() for token in tokens[:-1]]
    relative = np.linalg.norm(np.stack(found) - logits) / np.linalg.norm(logits)
    assert 1e-5 < relative < 0.03


# -- buckets ----------------------------------------------------------------------------------

PAIRS = [(b, d) for b in (4, 5, 8, 9, 12, 16, 31, 32, 33, 48, 64) for d in
         (3, 5, 7, 11, 17, 20, 25, 32, 33, 64, 100, 128, 129, 200, 256, 512, 1000)
         if d > b // 2]  # fmt: skip


@pytest.mark.parametrize("both_ways", [True, False])
def test_every_distance_has_the_bucket_of_the_reference(both_ways: bool) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    assert len(PAIRS) > 100
    for buckets, most in PAIRS:
        distances = np.arange(-2 * most - 3, 2 * most + 4)
        expected = T5Attention._relative_position_bucket(
            torch.from_numpy(distances), both_ways, buckets, most
        ).numpy()
        found = RelativePositions(buckets, most).of(distances, both_ways)
        np.testing.assert_array_equal(found, expected, err_msg=f"{buckets} buckets to {most}")
        near = np.clip(distances, -most, most)  # what the graph looks up
        clipped = RelativePositions(buckets, most).of(near, both_ways)
        np.testing.assert_array_equal(clipped, expected)


# -- config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """Weights of which it is only asked whether there is a head."""

    head: bool

    def has(self, name: str) -> bool:
        return name == "lm_head.weight" and self.head


def read(values: dict[str, Any], head: bool = True) -> t5.T5Config:
    config = Config({"model_type": "t5", **SIZES, **values}, "text_config")
    return t5.read(config, cast(Any, Holding(head)))


OPTIONS: list[dict[str, Any]] = [
    {}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True},
    {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    {"tie_word_embeddings": False, "scale_decoder_outputs": True},
    {"feed_forward_proj": "gated-gelu"}, {"feed_forward_proj": "gated-silu"},
    {"feed_forward_proj": "gelu"}, {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
    {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True},
    {"feed_forward_proj": "gated-gelu", "is_gated_act": False}, {"num_decoder_layers": None},
    {"n_positions": 512, "output_past": True, "dropout_rate": 0.3},
    {"task_specific_params": {"summarization": {"prefix": "summarize: "}}},
]  # fmt: skip


@pytest.mark.parametrize("values", OPTIONS, ids=json.dumps)
@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
def test_the_config_means_what_from_pretrained_makes_of_it(
    values: dict[str, Any], head: bool, tmp_path: Path
) -> None:
    """The options through transformers' own files: gate, activation, scale, and whether it is tied."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**{**SIZES, **values}))
    with torch.no_grad():
        model.shared.weight.normal_()
    if head:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(61, 30))
    model.save_pretrained(tmp_path)
    written = {"model_type": "t5", **SIZES, **values}
    (tmp_path / "config.json").write_text(json.dumps(written))
    reference = T5ForConditionalGeneration.from_pretrained(tmp_path)
    found = read(values, head)
    assert found.scaled == reference.config.scale_decoder_outputs
    assert found.gated == hasattr(reference.encoder.block[0].layer[1].DenseReluDense, "wi_0")
    assert found.tied == torch.equal(reference.lm_head.weight, reference.shared.weight)
    assert found.decoder_layers == len(reference.decoder.block)
    assert found.encoder_layers == len(reference.encoder.block)
    name = reference.config.dense_act_fn
    assert found.act is t5.ACTIVATIONS[name]
    again = json.loads(T5Config(**written).to_json_string())  # and as transformers 5 writes it
    assert read({k: v for k, v in again.items() if k != "head_dim"}, head) == found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"feed_forward_proj": "gated-gated-gelu"}, r'feed_forward_proj.*like "relu"'),
    ({"feed_forward_proj": "wide-gelu"}, r'feed_forward_proj.*like "relu"'),
    ({"feed_forward_proj": 3}, r'feed_forward_proj.*like "relu"'),
    ({"feed_forward_proj": "gated-mish"}, r"feed_forward_proj.*'gated-mish'.*known activations"),
    ({"dense_act_fn": "mish"}, r"dense_act_fn.*known are"),
    ({"relative_attention_num_buckets": 3}, r"num_buckets = 3.*4 or more"),
    ({"relative_attention_max_distance": 16}, r"max_distance = 16.*half of the 32 buckets"),
    ({"decoder_start_token_id": None}, r"decoder_start_token_id = None.*id of a token"),
    ({"decoder_start_token_id": -1}, r"decoder_start_token_id = -1"),
    ({"is_encoder_decoder": False}, r"is_encoder_decoder"),
    ({"model_type": "mt5"}, r"model_type"),
    ({"num_layers": 0}, r"num_layers = 0.*positive"),
    ({"long_range": True}, r"long_range.*will not ignore"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_honoured_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedConfig, match=sentence):
        read(values)


def test_the_answer_begins_with_bos_where_nothing_is_said() -> None:
    assert read({"decoder_start_token_id": None, "bos_token_id": 5}).start_token_id == 5
