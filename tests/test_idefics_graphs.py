"""IDEFICS's graphs: features, latents, keys and values, logits and greedy tokens are transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from blip_parts import close, layer_outputs
from conftest import Cache
from safetensors.numpy import load_file, save_file
from small_graph import run
from tiny_idefics import IDEFICS_CASES, build_idefics

from vlm_edge.export import archs, graphs
from vlm_edge.export.checkpoint import Checkpoint, Weights
from vlm_edge.export.language import idefics
from vlm_edge.export.language.interface import decoder_part
from vlm_edge.export.layerwise import runner
from vlm_edge.export.model import Model, Part
from vlm_edge.export.processor import read_processor
from vlm_edge.export.prompt_files import read_prompt_files
from vlm_edge.export.quantizers import Float, Observer
from vlm_edge.runtime.feeds import MASKED, prefill_feeds
from vlm_edge.runtime.media import Media
from vlm_edge.runtime.ort_decoder import OrtDecoder

IMAGE, AROUND, END = -1, -2, 2  # in the prompts below: the first two as the tokenizer numbers them
# Prompts by what is odd in them; `<image>` with or without what the processor puts around it.
PROMPTS: dict[str, list[int]] = {
    "image first": [1, AROUND, IMAGE, AROUND, 280, 12, 291],
    "text first, two in a row": [1, 283, 284, AROUND, IMAGE, AROUND, IMAGE, AROUND, 300],
    "text between, last": [1, AROUND, IMAGE, AROUND, 265, 270, 275, AROUND, IMAGE, AROUND],
    "an end token between": [1, AROUND, IMAGE, AROUND, 266, END, 1, 277, 290, IMAGE, 301, 302],
    "an end token last": [1, IMAGE, 266, 281, END, 279],
    "no picture": [1, 287, 288, 269, 305],
    "one token": [1],
    "one picture alone": [IMAGE],
}
MARGIN = 2e-3  # of greedy tokens that rounding cannot flip


@dataclass(frozen=True)
class Subject:
    """A tiny IDEFICS in transformers and as written graphs."""

    folder: Path
    reference: Any
    model: Model
    graphs: dict[str, Path]

    def layers(self, part: str) -> list[str]:
        """Paths of a part's linear layers."""
        observer = Observer(lambda op, x: {})
        self.model.parts[part].build(observer)
        return list(observer.weights)

    def prompt(self, name: str) -> np.ndarray:
        """int64 [n]"""
        settings = self.model.prompt
        special = {IMAGE: settings.image_token_id, AROUND: settings.image_token_id + 1}
        return np.array([special.get(token, token) for token in PROMPTS[name]])

    def pixels(self, tiles: int, seed: int = 0) -> np.ndarray:
        """float32 [tiles, 3, height, width] of order 1."""
        shape = (tiles, 3, self.model.image.height, self.model.image.width)
        return np.random.default_rng(seed).standard_normal(shape, np.float32)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """What media_kv reads, by our graphs: float32 [tiles, tokens, width]."""
        features, *_ = run(self.graphs["vision"], {"pixel_values": pixels})
        if "connector" in self.graphs:
            features, *_ = run(self.graphs["connector"], {"features": features})
        return features

    def media(self, ids: np.ndarray, pixels: np.ndarray) -> Media:
        """Keys, values, mask and gate from the reference's mask of pictures."""
        seen = self.seen(ids, len(pixels))
        names = [spec.name for spec in self.model.parts["media_kv"].interface.outputs]
        found = run(self.graphs["media_kv"], {"image_features": self.features(pixels)})
        arrays = {  # [tiles, heads, tokens, head_dim] -> [1, heads, tiles * tokens, head_dim]
            name: np.concatenate(list(array), axis=1)[None]
            for name, array in zip(names, found, strict=True)
        }
        mask = np.where(seen, np.float32(0), MASKED).repeat(found[0].shape[2], axis=1)
        gate = np.stack([seen.any(axis=1), np.ones(len(ids))], axis=1).astype(np.float32)
        return Media(arrays, mask, gate)

    def seen(self, ids: np.ndarray, pictures: int) -> np.ndarray:
        """bool [n, pictures] as IdeficsProcessor says it."""
        import torch
        from transformers.models.idefics import processing_idefics as theirs

        tokenizer = SimpleNamespace(
            convert_tokens_to_ids=lambda _: self.model.prompt.image_token_id, eos_token_id=END
        )
        if self.model.prompt.image_token_id not in ids:
            return np.zeros((len(ids), pictures), bool)
        found, _ = theirs.image_attention_mask_for_packed_input_ids(
            torch.from_numpy(ids)[None], tokenizer, "pt"
        )
        mask = theirs.incremental_to_binary_attention_mask(found, "pt", num_classes=pictures)
        return mask[0].bool().numpy()

    def inputs(self, ids: np.ndarray, pixels: np.ndarray, more: Sequence[int] = ()) -> Any:
        """Of the reference, with tokens of an answer behind the prompt, which see what its last one sees."""
        import torch

        seen = self.seen(ids, len(pixels))
        seen = np.concatenate([seen, seen[-1:].repeat(len(more), axis=0)])
        return {
            "input_ids": torch.tensor([[*ids, *more]]),
            "pixel_values": torch.from_numpy(pixels)[None],
            "image_attention_mask": torch.from_numpy(seen)[None],
        }

    def logits(self, ids: np.ndarray, pixels: np.ndarray, more: Sequence[int] = ()) -> np.ndarray:
        """The reference's, float32 [n + len(more), vocab]."""
        import torch

        with torch.inference_mode():
            return self.reference(**self.inputs(ids, pixels, more)).logits[0].numpy()

    def table(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the token table, float32 [n, width]."""
        return np.asarray(self.model.embeddings.view[ids], np.float32)

    def feeds(self, ids: np.ndarray, media: Media) -> dict[str, np.ndarray]:
        """Of the llm graph for a whole prompt, asked for all logits."""
        return {
            **prefill_feeds(self.model.decoder, self.table(ids)[None]),
            **media.arrays,
            "media_mask": media.mask[None, None],
            "media_gate": media.gate[None],
            "logit_positions": np.arange(len(ids)),
        }

    def decoder(self) -> OrtDecoder:
        bundle: Any = SimpleNamespace(
            manifest=SimpleNamespace(decoder=self.model.decoder),
            graph=lambda *_: self.graphs["llm"],
        )
        return OrtDecoder(bundle, threads=1)


def make(name: str, folder: Path) -> Subject:
    import torch
    from transformers import IdeficsForVisionText2Text
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    build_idefics(name, folder)
    reference = IdeficsForVisionText2Text.from_pretrained(folder, dtype=torch.float32).eval()
    model = read(folder)
    written = {part: write(each, folder / f"{part}.onnx") for part, each in model.parts.items()}
    return Subject(folder, reference, model, written)


def read(folder: Path) -> Model:
    arch = archs.find("flamingo")
    checkpoint = Checkpoint(folder, arch.RENAMES)
    found: Model = arch.read(checkpoint, read_processor(folder), read_prompt_files(folder))
    return found


def write(part: Part, path: Path) -> Path:
    """The part's graph with its layers' outputs behind its own."""
    model = part.build(Float())
    named = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(named[n] for n in named if n and n.endswith(".output"))
    graphs.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run_llm(graph: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, of the feeds that the graph reads."""
    reads = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    return run(graph, {name: array for name, array in feeds.items() if name in reads})


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    root = tmp_path_factory.mktemp("idefics")
    return Cache(lambda case: make(case, root / case))


# -- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_features_are_those_of_transformers(
    case: str, tiles: int, subject: Callable[[str], Subject]
) -> None:
    """The last layer's output, class token first, without the final norm; and every layer's."""
    import torch

    it = subject(case)
    pixels = it.pixels(tiles, seed=tiles)
    vision = it.reference.model.vision_model
    expected, layers = layer_outputs(
        vision.encoder.layers, lambda: vision(torch.from_numpy(pixels)).last_hidden_state
    )
    found, *ours = run(it.graphs["vision"], {"pixel_values": pixels})
    close(found, expected)
    for output, theirs in zip(ours, layers, strict=True):
        close(output, theirs)


@pytest.mark.parametrize(
    "case", [c for c in IDEFICS_CASES if "plain" not in c and c != "idefics-tied-v4"]
)
def test_latents_are_those_of_transformers(case: str, subject: Callable[[str], Subject]) -> None:
    import torch

    it = subject(case)
    resampler = it.reference.model.perceiver_resampler
    width = IDEFICS_CASES[case].vision_args.get("embed_dim", 36)
    for tiles in (1, 3):
        features = np.random.default_rng(tiles).standard_normal((tiles, 10, width), np.float32)
        found, *ours = run(it.graphs["connector"], {"features": features})
        with torch.inference_mode():
            context = torch.from_numpy(features)
            close(found, resampler(context))
            # A block's output is no module's: it is what its feed-forward reads and gives.
            x = resampler.latents.expand(tiles, -1, -1)
            for output, (attention, feed_forward) in zip(ours, resampler.blocks, strict=True):
                x = attention(context, x) + x
                x = feed_forward(x) + x
                close(output, x)


@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_keys_and_values_are_those_of_transformers(
    case: str, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they reach the reference's attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    it = subject(case)
    attend, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], list[Any]()

    def noting(module: Any, query: Any, key: Any, value: Any, *args: Any, **more: Any) -> Any:
        if getattr(module, "is_cross_attention", False):
            seen.extend([key, value])
        return attend(module, query, key, value, *args, **more)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", noting)
    ids, pixels = it.prompt("text between, last"), it.pixels(2)
    it.logits(ids, pixels)
    media = it.model.decoder.media
    assert media is not None and len(seen) == 2 * media.layers
    for name, theirs in zip(it.media(ids, pixels).arrays.values(), seen, strict=True):
        close(name, theirs)


# -- the language model -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_logits_are_those_of_transformers(
    case: str, name: str, subject: Callable[[str], Subject]
) -> None:
    """At every position, with every layer's output."""
    it = subject(case)
    ids = it.prompt(name)
    pixels = it.pixels(max(1, PROMPTS[name].count(IMAGE)))
    inputs = it.inputs(ids, pixels)
    logits, layers = layer_outputs(
        it.reference.model.layers, lambda: it.reference(**inputs).logits[0]
    )
    found, *rest = run_llm(it.graphs["llm"], it.feeds(ids, it.media(ids, pixels)))
    close(found[0], logits)
    assert np.abs(found).max() > 1
    assert logits.shape[1] == it.model.decoder.vocab_size
    for output, theirs in zip(rest[-len(layers) :], layers, strict=True):
        close(output, theirs)


@pytest.mark.parametrize("name", ["text first, two in a row", "an end token last", "no picture"])
@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_greedy_tokens_are_those_of_transformers(
    case: str, name: str, subject: Callable[[str], Subject]
) -> None:
    """Step by step over the cache; and what the reference's own `generate` says."""
    it = subject(case)
    ids = it.prompt(name)
    pixels = it.pixels(max(1, PROMPTS[name].count(IMAGE)), seed=3)
    decoder = it.decoder()
    decoder.attend(it.media(ids, pixels))
    found, tokens = [decoder.prefill(it.table(ids)[None]).copy()], list[int]()
    for _ in range(11):
        tokens.append(int(found[-1].argmax()))
        found.append(decoder.decode(it.table(np.array(tokens[-1]))).copy())
    expected = it.logits(ids, pixels, tokens)[len(ids) - 1 :]
    close(np.stack(found), expected)
    second, best = np.sort(expected, axis=1)[:, -2:].T
    assert (best - second).min() > MARGIN, "a near-tie: choose another salt"
    generated = it.reference.generate(
        **it.inputs(ids, pixels), do_sample=False, max_new_tokens=11, eos_token_id=None
    )
    assert generated[0, len(ids) :].tolist() == tokens
    assert len(set(tokens)) >= 3, "the reference repeats itself and would hide errors"


def test_pictures_matter(subject: Callable[[str], Subject]) -> None:
    """Were gates or keys dropped on both sides, the tests above would not see it."""
    for case in IDEFICS_CASES:
        it = subject(case)
        ids, pixels = it.prompt("text between, last"), it.pixels(2)
        logits, other = it.logits(ids, pixels), it.logits(ids, pixels[::-1].copy())
        first = int(np.flatnonzero(ids == it.model.prompt.image_token_id)[0])
        assert np.abs(logits - other)[first:].max(axis=1).min() > 0.01
        np.testing.assert_allclose(logits[:first], other[:first], atol=1e-5)


# -- without pictures it is a Llama --------------------------------------------------------------


@pytest.mark.parametrize("how", ["alphas of zero", "gates of zero"])
@pytest.mark.parametrize("case", ["idefics", "idefics-tied"])
def test_shut_gates_leave_the_plain_decoder(
    case: str, how: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    """Whatever it attends to: logits are those of llama.py's decoder over the same tensors."""
    it = subject(case)
    arch, folder = archs.find("flamingo"), it.folder
    if how == "alphas of zero":
        folder = build_idefics(case, tmp_path / case)
        tensors = load_file(folder / "model.safetensors")
        shut = {name: value * 0 for name, value in tensors.items() if "alpha" in name}
        save_file({**tensors, **shut}, folder / "model.safetensors", metadata={"format": "pt"})
        assert shut
    gated = write(read(folder).parts["llm"], tmp_path / "gated.onnx")
    checkpoint = Checkpoint(folder, arch.RENAMES)
    text = idefics.read(checkpoint.config, features=1).text
    root = Weights(checkpoint)
    tables = root.sub("model.embed_tokens"), root.sub("lm_head")
    names = "additional_embedding", "additional_fc"
    which = 0 if text.tied else 1
    head = arch._extended(tables[which], names[which], IDEFICS_CASES[case].additional)
    plain = write(decoder_part(root.sub("model"), head, text), tmp_path / "plain.onnx")
    rng = np.random.default_rng(0)
    for count, pictures in ((1, 1), (2, 5), (13, 3)):
        ids = rng.integers(3, 310, count)
        media = it.media(ids, it.pixels(pictures, seed=count))
        mask = rng.choice(np.array([0, MASKED], np.float32), media.mask.shape)
        gate = rng.standard_normal(media.gate.shape).astype(np.float32)
        if how == "gates of zero":
            gate *= 0
        feeds = it.feeds(ids, Media(media.arrays, mask, gate))
        expected = run_llm(plain, feeds)
        for found, theirs in zip(run_llm(gated, feeds), expected, strict=True):
            close(found, theirs, 1e-5)


# -- what calibration needs -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["idefics", "idefics-plain", "idefics-tied"])
def test_the_layers_in_turn_are_the_whole_model(
    case: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    """A layer's graph reads no more of the pictures than it attends to."""
    it, every = subject(case), IDEFICS_CASES[case].every
    ids, pixels = it.prompt("an end token between"), it.pixels(2)
    feeds = it.feeds(ids, it.media(ids, pixels))
    part, states = it.model.parts["llm"], feeds["inputs_embeds"]
    assert part.layers is not None
    for index in range(part.layers.count):
        graph = part.layers.build(index, Float())
        reads = {value.name for value in graph.graph.inputs if str(value.name).startswith("media")}
        number = index // every
        expected = {f"media.{kind}.{number}" for kind in ("key", "value")}
        expected |= {"media_mask", "media_gate"}
        assert reads == (set() if index % every else expected)
        layer = runner(graph, tmp_path / "layer.onnx")
        states = layer({**feeds, "inputs_embeds": states})["output"]
    head = runner(part.layers.build_head(Float()), tmp_path / "head.onnx")
    found = head({"inputs_embeds": states, "logit_positions": feeds["logit_positions"]})
    close(found["logits"][0], it.logits(ids, pixels))


def test_linear_layers_by_engine(subject: Callable[[str], Subject]) -> None:
    """What depends on pictures alone is in media_kv; nothing is in two engines."""
    it = subject("idefics")
    block = "model.gated_cross_attn_layers.{}.cross_attn.{}_proj"
    assert set(it.layers("media_kv")) == {block.format(i, n) for i in (0, 1) for n in "kv"}
    llm = set(it.layers("llm"))
    assert {block.format(i, n) for i in (0, 1) for n in "qo"} <= llm
    assert len(llm) == 4 * 7 + 2 * (2 + 3) + 1 and "lm_head" in llm
    assert not llm & set(it.layers("media_kv"))
    assert it.model.parts["llm"].keep8 == {"lm_head"}
    assert [name for name, part in it.model.parts.items() if part.weight_only] == ["llm"]
    assert list(it.model.parts) == ["vision", "connector", "media_kv", "llm"]
    assert list(subject("idefics-plain").model.parts) == ["vision", "media_kv", "llm"]
    assert len(it.layers("connector")) == 2 * (4 + 2)
