"""The form of the graphs for TensorRT 10 (JetPack 6): opset 20, and the values of the portable form.

ONNX Runtime runs both, a language model as the runtime does: a prompt in chunks, then single positions, into
caches of a fixed capacity whose other positions hold what was there before. TensorRT-RTX parses and builds
it; that is not TensorRT 10.3, whose parser nothing here can ask.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import defs
from small_graph import write
from tensorrt_rtx import needs_tensorrt

from vlm_edge.errors import EngineFailure
from vlm_edge.export.lowering import tensorrt, trt10
from vlm_edge.export.lowering.decompose import decompose
from vlm_edge.export.tensorrt.api import BuildSettings, TensorRT
from vlm_edge.export.tensorrt.layers import promised
from vlm_edge.runtime import media
from vlm_edge.runtime.feeds import causal_mask, empty_cache, windows
from vlm_edge.runtime.manifest import DecoderSettings, TensorSpec, read_manifest
from vlm_edge.runtime.plans import FloatType, PlanProfile

Bundles = Callable[..., Path]
CAPACITY, CHUNK = 30, 8
EXACT = 1e-5  # of the largest value: sums in another order
HALF = 0.02  # relative, of logits from products in float16; up to 0.008

OPEN_FLAMINGO = ["llama", "gpt_neox", "mpt-clip"]
needs_open_flamingo = pytest.mark.skipif(
    find_spec("open_flamingo") is None, reason="requirements/open-flamingo.txt is not installed"
)
# Every architecture and language model; GQA, MQA, a window, two masks, dynamic RoPE, part of a head rotated,
# biases by distance, cross-attention, pictures attended to.
CASES = [
    "clip-llama-v4", "clip-llama-native", "clip-mistral-window", "clip-padded-square", "siglip-qwen2",
    "next-clip-mistral", "idefics3-factor3", "blip2-opt-projection", "blip2-t5", "instructblip-vicuna",
    "idefics", "mllama", *(pytest.param(name, marks=needs_open_flamingo) for name in OPEN_FLAMINGO),
]  # fmt: skip
QUANTIZED = ["siglip-qwen2", "blip2-t5", "mllama"]


def lowered(bundle: Path, part: str, folder: Path, float_type: FloatType = "float32") -> Path:
    """The part as TensorRT 10 builds it, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for weights in bundle.glob(f"{part}.data"):
        shutil.copy(weights, folder)  # onnx's checker refuses links
    return trt10.lower(bundle / f"{part}.onnx", folder, PlanProfile(float_type, CAPACITY, CHUNK, 3))


class Session:
    """ONNX Runtime on the CPU; products with INT4 weights in float32."""

    def __init__(self, graph: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # Where all sizes are fixed it makes a Gemm of a bias, and the Gemm's Q/DQ unsigned, then refuses it.
        self._session = onnxruntime.InferenceSession(
            graph,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],
        )
        self.inputs = {value.name: value.type for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def dtype(self, name: str) -> str:
        return {"tensor(float)": "float32", "tensor(float16)": "float16"}.get(
            self.inputs[name], "int64"
        )

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        own = {n: value.astype(self.dtype(n)) for n, value in feeds.items() if n in self.inputs}
        return dict(zip(self.outputs, self._session.run(None, own), strict=True))


def calls(settings: DecoderSettings) -> Iterator[tuple[int, int]]:
    """Where each call begins and how many positions it has."""
    prompt = 21
    step = CHUNK if settings.chunked_prefill else prompt
    for start in range(0, prompt, step):
        yield start, min(step, prompt - start)
    yield from ((position, 1) for position in range(prompt, prompt + 3))


def constants(
    settings: DecoderSettings, count: int
) -> tuple[dict[str, np.ndarray], media.Media | None]:
    """What all calls read of an encoder's prompt, or of pictures: two in the middle of the text, so that
    the first positions see none."""
    rng = np.random.default_rng(1)
    sizes = {"batch": 1, "source": 11}
    made = {
        spec.name: rng.standard_normal([sizes.get(str(d), d) for d in spec.shape]).astype(
            np.float32
        )
        for spec in settings.cross()
    }
    if settings.media is None:
        return made, None
    ids = np.full(count, 5)
    ids[[4, 12]] = 7
    shape = settings.media.kv_heads, 6, settings.media.head_dim
    pictures = [
        {s.name: rng.standard_normal(shape).astype(np.float32) for s in settings.media.arrays()}
        for _ in range(2)
    ]
    seen = media.media(ids, 7, settings.media, pictures)
    return {**made, **seen.arrays}, seen


class Decoding:
    """A language model over several calls, its caches kept as the runtime keeps them."""

    def __init__(self, graph: Path, settings: DecoderSettings) -> None:
        self._session, self._settings = Session(graph), settings
        rng = np.random.default_rng(2)
        self.caches = {
            name: (rng.standard_normal(array.shape) * 10).astype(
                self._session.dtype(f"past.{name}")
            )
            for name, array in empty_cache(settings, CAPACITY).items()
        }  # as a longer conversation would have left them

    def call(self, feeds: dict[str, np.ndarray], start: int, count: int) -> np.ndarray:
        past = {f"past.{name}": array for name, array in self.caches.items()}
        found = self._session.run({**feeds, **past})
        for name, array in self.caches.items():
            present = found[f"present.{name}"]
            if present.shape[2] == CAPACITY:
                self.caches[name] = present
            else:
                assert present.shape == (*array.shape[:2], count, array.shape[3])
                array[:, :, start : start + count] = present
        return found["logits"]


def feeds(
    settings: DecoderSettings, seen: media.Media | None, start: int, count: int
) -> dict[str, np.ndarray]:
    positions = np.arange(start, start + count)
    rng = np.random.default_rng(start)
    made = {
        "inputs_embeds": rng.standard_normal((1, count, settings.width)).astype(np.float32),
        "positions": positions[None],
        "write_indices": positions[:1],
        "logit_positions": np.arange(count),
    }
    for name, window in windows(settings).items():
        made[name] = causal_mask(positions, CAPACITY, window)[None, None]
    if seen is not None:
        made |= seen.of(slice(start, start + count)).feeds()
    return made


def same(found: np.ndarray, expected: np.ndarray, tolerance: float = EXACT) -> None:
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def compare_language_model(bundle: Path, folder: Path) -> None:
    settings = read_manifest(bundle).decoder
    graph = lowered(bundle, "llm", folder)
    portable, ours = Decoding(bundle / "llm.onnx", settings), Decoding(graph, settings)
    fixed, seen = constants(settings, 24)
    for start, count in calls(settings):
        given = {**feeds(settings, seen, start, count), **fixed}
        same(ours.call(given, start, count), portable.call(given, start, count))
        for name, expected in portable.caches.items():
            same(ours.caches[name], expected)


def random_inputs(inputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    sizes = {"batch": 1, "tiles": 3, "source": 13, "tokens": 5, "instruction": 4}
    rng = np.random.default_rng(0)
    made = {}
    for spec in inputs:
        shape = [sizes.get(str(d), d) for d in spec.shape]
        made[spec.name] = (
            rng.integers(1, 4, shape)
            if spec.dtype == "int64"
            else rng.standard_normal(shape).astype(np.float32)
        )
    return made


def compare_part(bundle: Path, part: str, folder: Path) -> None:
    given = random_inputs(read_manifest(bundle).engines[part].inputs)
    graph = lowered(bundle, part, folder)
    expected = Session(bundle / f"{part}.onnx").run(given)
    found = Session(graph).run(given)
    assert found.keys() == expected.keys()
    for name in expected:
        same(found[name], expected[name])


def check(graph: Path) -> None:
    """onnx's own check, and no operator, attribute or type that opset 20 has not (but INT4's)."""
    onnx.checker.check_model(str(graph), full_check=True)
    model = ir.load(graph)
    four = any(v.dtype == ir.DataType.INT4 for v in model.graph.initializers.values())
    assert model.graph.opset_imports == {"": 21 if four else 20}
    for node in model.graph.all_nodes():
        schema = defs.get_schema(node.op_type, 20)
        assert set(node.attributes) <= set(schema.attributes) or (
            node.op_type == "DequantizeLinear" and node.inputs[0].dtype == ir.DataType.INT4
        )


@pytest.mark.parametrize("case", CASES)
def test_full_precision_gives_the_same_values(case: str, bundle: Bundles, tmp_path: Path) -> None:
    compare_bundle(bundle(case), tmp_path)
    assert not any(tmp_path.glob("*.floats.data"))  # all weights are the bundle's


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_gives_the_same_values(
    case: str, precision: str, bundle: Bundles, tmp_path: Path
) -> None:
    compare_bundle(bundle(case, precision), tmp_path)


def compare_bundle(bundle: Path, folder: Path) -> None:
    """Every engine of a bundle."""
    for part in read_manifest(bundle).engines:
        if part == "llm":
            compare_language_model(bundle, folder)
        else:
            compare_part(bundle, part, folder)
        check(folder / f"{part}.onnx")


@pytest.mark.parametrize("case", ["siglip-qwen2", "blip2-t5", "mllama"])
def test_float16_is_near(case: str, bundle: Bundles, tmp_path: Path) -> None:
    bundle = bundle(case)
    settings = read_manifest(bundle).decoder
    graph = lowered(bundle, "llm", tmp_path, "float16")
    check(graph)
    portable, ours = Decoding(bundle / "llm.onnx", settings), Decoding(graph, settings)
    assert all(array.dtype == np.float16 for array in ours.caches.values())
    fixed, seen = constants(settings, 24)
    for start, count in calls(settings):
        given = {**feeds(settings, seen, start, count), **fixed}
        expected, found = portable.call(given, start, count), ours.call(given, start, count)
        assert np.linalg.norm(found - expected) < HALF * np.linalg.norm(expected)


def test_inputs_stay_and_the_new_keys_come_out(bundle: Bundles, tmp_path: Path) -> None:
    bundle = bundle("siglip-qwen2")
    graph = ir.load(lowered(bundle, "llm", tmp_path)).graph
    portable = ir.load(bundle / "llm.onnx").graph
    settings = read_manifest(bundle).decoder
    for ours, theirs in ((graph.inputs, portable.inputs), (graph.outputs, portable.outputs)):
        assert [(v.name, v.dtype) for v in ours] == [(v.name, v.dtype) for v in theirs]
    shapes = {str(v.name): list(v.shape or ()) for v in (*graph.inputs, *graph.outputs)}
    assert shapes["past.key.0"] == [1, settings.kv_heads, CAPACITY, settings.head_dim]
    assert shapes["present.key.0"] == [1, settings.kv_heads, "sequence", settings.head_dim]
    assert shapes["attention_mask"] == [1, 1, "sequence", CAPACITY]


def test_weights_of_float_products_become_floats_once(bundle: Bundles, tmp_path: Path) -> None:
    """In a file of their own; those of INT8 products and INT4 stay where they are."""
    folder = bundle("siglip-qwen2", "int8")
    for part, kept in (("llm", 0), ("vision", 1)):
        path = lowered(folder, part, tmp_path)
        found = ir.load(path).graph.initializers.values()
        floats = [v for v in found if str(v.name).endswith(".floats")]
        assert bool(floats) != kept and any(v.dtype == ir.DataType.INT8 for v in found) == kept
        needed = sum(4 * v.const_value.size for v in floats if v.const_value is not None)
        written = tmp_path / f"{part}.floats.data"
        assert written.is_file() != kept
        assert kept or needed <= written.stat().st_size < needed + trt10.ALIGNMENT * len(floats)
    four = ir.load(lowered(bundle("siglip-qwen2", "int4"), "llm", tmp_path / "int4")).graph
    assert any(v.dtype == ir.DataType.INT4 for v in four.initializers.values())


@pytest.mark.parametrize("heads_of_mask", [1, 6])
def test_a_group_of_heads_shares_its_keys(heads_of_mask: int, tmp_path: Path) -> None:
    """6 query heads over 2 of keys and values, with a mask for all and with one for each."""
    specs = {
        "q": ("float32", ("batch", 6, "s", 8)),
        "k": ("float32", ("batch", 2, 5, 8)),
        "v": ("float32", ("batch", 2, 5, 8)),
        "mask": ("float32", ("batch", heads_of_mask, "s", 5)),
    }
    graph = write(
        tmp_path / "attention.onnx",
        lambda op, x: [op.Attention(*x.values())],
        specs,
        {"y": specs["q"]},
    )
    model = ir.load(graph)
    model.graph.opset_imports[""] = 20
    assert decompose(model.graph) == 1
    ir.save(model, tmp_path / "written.onnx")
    rng = np.random.default_rng(0)
    given = {
        name: rng.standard_normal([{"batch": 2, "s": 3}.get(str(d), d) for d in shape]).astype(
            np.float32
        )
        for name, (_, shape) in specs.items()
    }
    same(Session(tmp_path / "written.onnx").run(given)["y"], Session(graph).run(given)["y"])


def test_a_form_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    spec = ("float32", (1, 2, 3, 8))
    graph = write(
        tmp_path / "causal.onnx",
        lambda op, x: [op.Attention(x["q"], x["q"], x["q"], is_causal=1)],
        {"q": spec},
        {"y": spec},
    )
    with pytest.raises(EngineFailure, match="Attention Attention_node_0 has a form"):
        decompose(ir.load(graph).graph)


@pytest.mark.parametrize(
    ("version", "needed"),
    [
        ("10.3.0.30", True),
        ("10.3.0", True),
        ("10.14.1", True),
        ("10.15.1", False),
        ("11.4.1", False),
    ],
)
def test_the_versions_that_want_it(version: str, needed: bool) -> None:
    assert trt10.needed(version) == needed


@needs_tensorrt
@pytest.mark.parametrize(
    ("case", "precision", "float_type"),
    [
        ("siglip-qwen2", "int8", "float16"),
        ("siglip-qwen2", "int4", "float16"),
        ("blip2-t5", "int4", "float32"),
        ("mllama", "fp32", "float16"),
    ],
)
def test_tensorrt_rtx_builds_it(
    case: str, precision: str, float_type: FloatType, bundle: Bundles, tmp_path: Path
) -> None:
    bundle = bundle(case, precision)
    trt = TensorRT("tensorrt-rtx")
    for part, entry in read_manifest(bundle).engines.items():
        graph = lowered(bundle, part, tmp_path, float_type)
        room = PlanProfile(float_type, CAPACITY, CHUNK, 3, media=40)
        built = trt.build(
            part, graph, BuildSettings(tensorrt.profiles(entry.inputs, room, 6), ("8.6",))
        )
        assert built.int8_products >= promised(ir.load(graph).graph)
        assert (
            bool(built.int8_products) == (part == "vision" and precision != "fp32")
            or part == "connector"
        )
        stored = {v.dtype for v in ir.load(graph).graph.initializers.values()}
        assert ("Int4" in built.dtypes) == (ir.DataType.INT4 in stored)
