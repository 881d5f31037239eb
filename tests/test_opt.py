"""OPT: transformers' logits and greedy tokens, calibration layer by layer, every lowering and precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import tiny_opt
from tensorrt_rtx import build, needs_tensorrt, profile
from tiny_opt import CASES, Subject

from vlm_edge.calibration.data import CalibrationSet, Prompt
from vlm_edge.errors import TensorShapeMismatch, UnsupportedConfig
from vlm_edge.export import (
    fold,
    graphs,
    language_study,
    weight_only_int4,
    weight_only_int8,
)
from vlm_edge.export.config import Config
from vlm_edge.export.examples import Example
from vlm_edge.export.language import families, llama, opt
from vlm_edge.export.layerwise import States, inputs_by_layer, runner
from vlm_edge.export.lowering import cpu, native
from vlm_edge.export.quantizers import Float, Observer
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.export.tensorrt.api import TensorRT
from vlm_edge.runtime import native as kernels
from vlm_edge.runtime import ort_decoder
from vlm_edge.runtime.feeds import prefill_feeds, windows
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.ort_decoder import OrtDecoder

TOLERANCE = 1e-4  # logits are of order 3
EXACT = 2e-5  # float32 sums in another order
ROUNDING = 0.1  # relative; up to 0.066 through three layers that round the input of every product
MARGIN = 2e-3  # a reference whose winner leads by less could flip by rounding alone
NATIVE = pytest.mark.skipif(kernels.library() is None, reason="our kernels were not built here")
CAPACITY = 48
LENGTHS = (5, 31, 1, 18, 12, 7, 23, 9)
DATA = CalibrationSet((), (), tuple(Prompt((), str(n)) for n in LENGTHS), "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(case) -> the checkpoint."""
    root, made = tmp_path_factory.mktemp("opt"), dict[str, Path]()

    def make(case: str) -> Path:
        if case not in made:
            made[case] = tiny_opt.build(case, root / case)
        return made[case]

    return make


@pytest.fixture(scope="module")
def subject(folder: Callable[[str], Path]) -> Callable[..., Subject]:
    """subject(case, cache_dtype="float32")"""
    made: dict[Any, Subject] = {}

    def make(*key: Any) -> Subject:
        if key not in made:
            made[key] = tiny_opt.read(folder(key[0]), *key[1:])
        return made[key]

    return make


@pytest.fixture(scope="module")
def trt() -> TensorRT:
    return TensorRT("tensorrt-rtx")


def quiet(*_: Any) -> None:
    """No progress."""


def written(it: Subject, path: Path, quantizer: Any = None) -> Path:
    graphs.save(it.part.build(quantizer or Float()), path)
    return path


def run(graph: Path, it: Subject, embeds: np.ndarray, room: int = 0) -> dict[str, np.ndarray]:
    """All outputs for a prompt, in a cache with `room` unused positions."""
    session, count = open_session(graph, "llm", 1), embeds.shape[1]
    feeds = prefill_feeds(it.settings, embeds)
    feeds["logit_positions"] = np.arange(count)
    for name, value in feeds.items():
        if name.startswith("past."):
            feeds[name] = np.pad(value, ((0, 0), (0, 0), (0, room), (0, 0)))
        elif name.endswith("_mask"):
            masked = np.finfo(np.float32).min
            feeds[name] = np.pad(value, ((0, 0),) * 3 + ((0, room),), constant_values=masked)
    inputs = {spec.name for spec in session.get_inputs()}
    names = [spec.name for spec in session.get_outputs()]
    found = session.run(names, {k: v for k, v in feeds.items() if k in inputs})
    return dict(zip(names, found, strict=True))


def opened(graph: Path, it: Subject) -> OrtDecoder:
    """The runtime's decoder over a graph."""
    bundle: Any = SimpleNamespace(
        manifest=SimpleNamespace(decoder=it.settings), graph=lambda *_: graph
    )
    return OrtDecoder(bundle, threads=1)


# -- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 41])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(
    case: str, length: int, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    it = subject(case)
    graph = written(it, tmp_path / "llm.onnx")
    onnx.checker.check_model(str(graph), full_check=True)
    embeds = it.embeds(length)
    expected = it.logits(embeds)
    assert expected.std() > 0.5
    found = run(graph, it, embeds, room=3)["logits"][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(
    case: str,
    chunk: int,
    subject: Callable[..., Subject],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the runtime's decoder, prefilled whole and in chunks, over a cache that grows."""
    monkeypatch.setattr(ort_decoder, "CHUNK", chunk)
    it = subject(case)
    decoder = opened(written(it, tmp_path / "llm.onnx"), it)
    embeds = it.embeds(58)
    found, tokens = [decoder.prefill(embeds)], list[int]()
    for _ in range(20):
        tokens.append(int(found[-1].argmax()))
        row = it.table[tokens[-1]]
        embeds = np.concatenate([embeds, row[None, None]], axis=1)
        found.append(decoder.decode(row).copy())
    expected = it.logits(embeds)[57:]  # causal: each step's are among those of the whole
    np.testing.assert_allclose(np.stack(found), expected, rtol=0, atol=TOLERANCE)
    second, best = np.sort(expected, axis=1)[:, -2:].T
    assert (best - second).min() > MARGIN, "a near-tie: choose another salt"
    assert tokens == expected.argmax(axis=1)[:-1].tolist()
    assert decoder.length == 78 and decoder.capacity == 128
    assert len(set(tokens)) >= 4, "the reference repeats itself and would hide errors"


def test_all_positions_and_no_more(subject: Callable[..., Subject], tmp_path: Path) -> None:
    """The table's last row is used; there is none behind it."""
    it = subject("pre-norm")
    decoder = opened(written(it, tmp_path / "llm.onnx"), it)
    embeds = it.embeds(it.settings.max_positions)
    np.testing.assert_allclose(
        decoder.prefill(embeds), it.logits(embeds)[-1], rtol=0, atol=TOLERANCE
    )
    with pytest.raises(Exception, match="out of data bounds"):
        decoder.decode(embeds[0, 0])


# -- calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_layers_in_turn_are_the_whole_model(
    case: str, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    it = subject(case)
    embeds = it.prompts(LENGTHS)
    examples = it.examples(embeds)
    states = States(examples, tmp_path / "states.npy")
    seen: set[str] = set()
    for inputs in inputs_by_layer("llm", it.part, examples, states, False, tmp_path, quiet):
        seen |= {path for found in inputs.values() for path in found.weights}
    head = runner(it.part.layers.build_head(Float()), tmp_path / "head.onnx")
    for index, embed in enumerate(embeds):
        feeds = Example(embed).feeds(it.settings, states[index])
        found = head({**feeds, "logit_positions": np.arange(embed.shape[1])})["logits"][0]
        np.testing.assert_allclose(found, it.logits(embed), rtol=0, atol=TOLERANCE)
    every = Observer(lambda op, x: {})
    it.part.build(every)
    assert seen | it.part.keep8 == set(every.weights)
    assert not seen & it.part.keep8


@pytest.mark.parametrize("case", ["pre-norm", "as-350m", "galactica"])
def test_only_inputs_behind_norms_that_feed_nothing_else_are_scaled(
    case: str, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    it = subject(case)
    examples = it.examples(it.prompts(LENGTHS[:2]))
    states = States(examples, tmp_path / "states.npy")
    norms = case != "as-350m"  # there their outputs are summed as well
    for index, inputs in enumerate(
        inputs_by_layer("llm", it.part, examples, states, False, tmp_path, quiet)
    ):
        found = {first.split(".")[-1]: kept.smoothable for first, kept in inputs.items()}
        entry = {"project_in": False} if case == "as-350m" and index == 0 else {}
        assert found == {
            "q_proj": norms, "out_proj": False, "fc1": norms, "fc2": False, **entry
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_quantized_models_say_nearly_the_same(
    case: str,
    kind: str,
    subject: Callable[..., Subject],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With random weights of this size logits are of order 5, and INT4 throughout costs 0.1 to 0.45 nats."""
    monkeypatch.setattr(weight_only_int4, "BUDGET", 1e9)  # no layer in more bits
    monkeypatch.setattr(weight_only_int8, "BUDGET", 1e9)
    it = subject(case)
    (tmp_path / "scratch").mkdir()
    write = {"int4": weight_only_int4.write_int4, "int8": weight_only_int8.write_int8}[kind]
    examples = it.examples(it.prompts(LENGTHS), DATA.held_out_prompts)
    said = write("llm", it.part, examples, tmp_path, tmp_path / "scratch", quiet)
    assert said["kl"] < {"int8": 8e-3, "int4": 0.6}[kind]
    if kind == "int4":
        assert (said["scaled_layers"] > 0) == CASES[case].get("do_layer_norm_before", True)
    else:
        assert len(said["layers"]) == len(language_study.linear_layers(it.part))
    graph = ir.load(tmp_path / "llm.onnx").graph
    stored = {value.dtype for value in graph.initializers.values()}
    assert (ir.DataType.INT4 in stored) == (kind == "int4")
    assert "Mul" not in {node.op_type for node in graph}  # scales of inputs went into the norms


@pytest.mark.parametrize("case", CASES)
def test_scales_of_inputs_change_nothing(
    case: str, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    """Inputs divided, weights multiplied, both in float32: equal, folded into the norm or not. Behind a
    norm that a sum reads too they must not be folded."""
    it = subject(case)
    every = Observer(lambda op, x: {})
    it.part.build(every)
    rng = np.random.default_rng(0)
    wanted = {p: w.shape[1] for p, w in every.weights.items() if p.endswith(("proj", "fc1"))}
    wanted = {p: n for p, n in wanted.items() if not p.endswith("out_proj")}
    widths = {every.readers[path]: width for path, width in wanted.items()}
    factors = {p: rng.uniform(0.5, 2, n).astype(np.float32) for p, n in widths.items()}
    smoothing = {path: factors[every.readers[path]] for path in wanted}
    model = it.part.build(WeightOnly(8, 32, smoothing=smoothing, exact=every.weights))
    before = CASES[case].get("do_layer_norm_before", True)
    assert fold.into_norms(model.graph) == (len(factors) if before else 0)
    graphs.save(model, tmp_path / "llm.onnx")
    embeds = it.embeds(17)
    found = run(tmp_path / "llm.onnx", it, embeds)["logits"][0]
    np.testing.assert_allclose(found, it.logits(embeds), rtol=0, atol=TOLERANCE)


# -- lowering ---------------------------------------------------------------------------------


def lowered(kind: str, it: Subject, portable: Path) -> tuple[Path | None, list[str]]:
    """The graph for the CPU or for our kernels, and its operators."""
    lower = {"cpu": cpu.lower, "cpu-native": native.lower}[kind]
    name = lower(portable, windows(it.settings))
    graph = None if name is None else portable.with_name(name)
    return graph, [] if graph is None else [node.op_type for node in ir.load(graph).graph]


@pytest.mark.parametrize("length", [1, 29])
@pytest.mark.parametrize("case", CASES)
def test_full_precision_is_lowered_exactly(
    case: str, length: int, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    it = subject(case)
    portable = written(it, tmp_path / "llm.onnx")
    graph, kinds = lowered("cpu", it, portable)
    if it.settings.head_dim % cpu.HEAD_MULTIPLE:
        assert graph is None  # the operator would refuse it
        return
    assert kinds.count("GroupQueryAttention") == it.settings.layers
    assert not {"RotaryEmbedding", "Attention", "TensorScatter", "Transpose"} & set(kinds)
    embeds = it.embeds(length)
    expected, found = run(portable, it, embeds), run(graph, it, embeds)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=EXACT, err_msg=name)


def test_steps_of_the_lowered_graph(subject: Callable[..., Subject], tmp_path: Path) -> None:
    it = subject("pre-norm-24")
    graph, _ = lowered("cpu", it, written(it, tmp_path / "llm.onnx"))
    decoder, embeds = opened(graph, it), it.embeds(60)
    decoder.prefill(embeds[:, :50])
    for position in range(50, 60):
        found = decoder.decode(embeds[0, position])
        expected = it.logits(embeds[:, : position + 1])[-1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@NATIVE
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_our_kernels_give_the_quantized_model(
    case: str, cache_dtype: str, bits: int, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    """A prompt, a chunk and steps; ours round activations to int8 by block and multiply in bfloat16."""
    it = subject(case, cache_dtype)
    portable = written(it, tmp_path / "llm.onnx", WeightOnly(bits, 32, it.part.keep8))
    graph, kinds = lowered("cpu-native", it, portable)
    name = "CachedAttention" + ("Int8" if cache_dtype == "int8" else "")
    assert kinds.count(name) == it.settings.layers
    if bits == 8:  # INT4 of an odd number of columns stays as it is
        keys = CASES[case]
        left = {"Linears", name, "Gather"}
        if not keys.get("do_layer_norm_before", True):
            left |= {"LayerNormalization"}  # read by sums too
        if "word_embed_proj_dim" not in keys:
            left |= {"Add"}  # of the positions; else project_in's operator adds them
        assert set(kinds) == left
    theirs, ours = opened(portable, it), opened(graph, it)
    embeds = it.embeds(45)
    for start, stop in [(0, 30), (30, 33), *((i, i + 1) for i in range(33, 45))]:
        expected, found = (d.prefill(embeds[:, start:stop]).copy() for d in (theirs, ours))
        assert np.linalg.norm(found - expected) < ROUNDING * np.linalg.norm(expected)


@NATIVE
@pytest.mark.parametrize("case", ["pre-norm", "as-350m", "galactica"])
def test_our_attention_is_that_of_the_rounded_cache(
    case: str, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    """Of a float model only attention is lowered."""
    it = subject(case, "int8")
    portable = written(it, tmp_path / "llm.onnx")
    graph, kinds = lowered("cpu-native", it, portable)
    assert kinds.count("CachedAttentionInt8") == it.settings.layers
    theirs, ours = opened(portable, it), opened(graph, it)
    embeds = it.embeds(20)
    for position in range(20):
        expected, found = (d.decode(embeds[0, position]).copy() for d in (theirs, ours))
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)
    exact = it.logits(embeds)[-1]
    assert 1e-5 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.08


@needs_tensorrt
@pytest.mark.parametrize("case", ["pre-norm", "as-350m", "galactica"])
def test_tensorrt_builds_it(
    case: str, trt: TensorRT, subject: Callable[..., Subject], tmp_path: Path
) -> None:
    it = subject(case)
    for name, quantizer in (("fp32", Float()), ("int8", WeightOnly(8, 32))):
        portable = written(it, tmp_path / f"{name}.onnx", quantizer)
        inputs = it.part.interface.inputs
        built = build(trt, portable, inputs, tmp_path / name, profile(capacity=CAPACITY)).built
        assert ("Int8" in built.dtypes) == (name == "int8")


# -- config.json ------------------------------------------------------------------------------

# Salesforce/blip2-opt-2.7b's text_config: all else is OPTConfig's own default.
PUBLISHED = {
    "_name_or_path": "facebook/opt-2.7b", "activation_dropout": 0.0,
    "architectures": ["OPTForCausalLM"], "eos_token_id": 50118, "ffn_dim": 10240,
    "hidden_size": 2560, "model_type": "opt", "num_attention_heads": 32, "num_hidden_layers": 32,
    "prefix": "</s>", "torch_dtype": "float16", "vocab_size": 50304, "word_embed_proj_dim": 2560,
}  # fmt: skip


def test_the_published_config() -> None:
    found = opt.read(Config(PUBLISHED, "text_config"))
    assert (found.width, found.state_width, found.hidden, found.layers) == (2560, 2560, 10240, 32)
    assert (found.heads, found.head_dim, found.max_positions) == (32, 80, 2048)
    assert (found.bias, found.affine, found.norm_before, found.final_norm) == (True,) * 4
    assert found.tied and not found.projected and found.vocab_size == 50304


def test_all_keys_that_transformers_writes_are_known() -> None:
    """As it writes a whole OPT, with its own defaults where we have the same."""
    import transformers

    found = opt.read(Config(transformers.OPTConfig().to_dict(), "text_config"))
    assert found == opt.read(Config({"model_type": "opt"}, "text_config"))
    assert found.width == found.state_width == 768


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"do_layer_norm_before": False}, {"norm_before": False, "final_norm": False}),
        ({"_remove_final_layer_norm": True}, {"norm_before": True, "final_norm": False}),
        ({"word_embed_proj_dim": None}, {"width": 768, "projected": False}),
        ({"word_embed_proj_dim": 512}, {"width": 512, "state_width": 768, "projected": True}),
        ({"enable_bias": False}, {"bias": False, "affine": True}),
        ({"layer_norm_elementwise_affine": False}, {"bias": True, "affine": False}),
        ({"tie_word_embeddings": False}, {"tied": False}),
    ],
    ids=str,
)
def test_keys_mean_what_the_reference_reads(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    found = opt.read(Config(keys, "text_config"))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_attention_heads": 7}, "num_attention_heads = 7.*divide hidden_size = 768"),
        ({"activation_function": "mish"}, "activation_function.*mish.*relu"),
        ({"do_layer_norm_before": "yes"}, "do_layer_norm_before"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim = 0"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),  # OPT has none: it would be ignored
        ({"model_type": "gpt2"}, "model_type.*gpt2"),
    ],
    ids=str,
)
def test_other_values_are_refused_by_name(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedConfig, match=said):
        opt.read(Config(keys, "text_config"))


def test_families_are_found_by_their_name() -> None:
    sizes = {"num_attention_heads": 4, "hidden_size": 64}
    for default, kind in (("opt", opt.OptConfig), ("llama", llama.DecoderConfig)):
        found = families.read(Config(sizes, "text_config"), default)  # type: ignore[arg-type]
        assert type(found) is kind
    named = Config({**sizes, "model_type": "opt"}, "text_config")
    found = families.read(named, "llama", "int8")
    assert type(found) is opt.OptConfig
    assert found.settings().cache_dtype == "int8"
    with pytest.raises(UnsupportedConfig, match=r"gpt2.*llama, mistral, mpt, opt, qwen2"):
        families.read(Config({"model_type": "gpt2"}, "text_config"), "opt")


def test_a_position_table_of_another_length_is_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder("pre-norm"), copy)
    tiny.edit_json(copy / "config.json", "max_position_embeddings", 91)
    with pytest.raises(TensorShapeMismatch, match="embed_positions"):
        tiny_opt.part_of(copy)[0].build(Float())
