"""The bundle stays portable: TensorRT-RTX parses and builds its graphs in every precision, without a GPU.

Vision encoders and connectors are built from the portable graph itself; language models after
`export/lowering/tensorrt.py`, which is exact (below).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graph import run, write
from tensorrt_rtx import Builder, Refused
from tiny import CASES, Tiny, build

from vlm_edge.errors import EngineFailure, SettingError
from vlm_edge.export.lowering import tensorrt
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import Manifest, TensorSpec, read_manifest

needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed (requirements/tensorrt-rtx.txt)",
)
# GQA and scaled RoPE; MQA and a width of 40; biases everywhere; a window; tied weights, biases and two
# masks; dynamic RoPE; MQA tied as the demo model; SwiGLU and joined layers.
BUILT = [
    "clip-llama-v4", "clip-llama-native", "clip-llama-biases", "clip-mistral-window", "siglip-qwen2",
    "clip-padded-square", "dinov2-llama", "dinov2-swiglu",
]  # fmt: skip
CAPACITY, CHUNK, TILES = 48, 16, 3

# One layer of each part in the widths of real models: CLIP ViT-L/14 and Qwen2-0.5B.
REAL = Tiny(
    vision_args=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, image_size=28,
                     patch_size=14, num_attention_heads=16),
    text="qwen2", text_args=dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=1,
                                 num_attention_heads=14, num_key_value_heads=2,
                                 tie_word_embeddings=True),
    images={"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
)  # fmt: skip


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder()


def lowered(folder: Path, part: str, capacity: int, tmp_path: Path) -> Path:
    """The graph TensorRT builds: the lowered one in a copy of the bundle, or the portable one."""
    copy = tmp_path / f"{folder.name}-{part}"
    copy.mkdir()
    for name in (f"{part}.onnx", f"{part}.data"):
        shutil.copy(folder / name, copy)
    name = tensorrt.lower(copy / f"{part}.onnx", capacity)
    assert (name is None) == (part != "llm"), "only language models are rewritten"
    return copy / (name or f"{part}.onnx")


def build_part(builder: Builder, folder: Path, part: str, tmp_path: Path) -> None:
    """Build it and check that what is quantized in the graph is quantized in the engine."""
    entry = read_manifest(folder).engines[part]
    graph = lowered(folder, part, CAPACITY, tmp_path)
    shapes = tensorrt.profiles(entry.inputs, CAPACITY, CHUNK, TILES)
    built = builder.build(graph, shapes)
    assert built.size > 0
    stored = {value.dtype for value in ir.load(graph).graph.initializers.values()}
    assert ("Int4" in built.dtypes) == (ir.DataType.INT4 in stored)
    assert ("Int8" in built.dtypes) == (ir.DataType.INT8 in stored)
    assert built.int8_products >= static_products(graph)
    assert bool(static_products(graph)) == (entry.precision == "int8" and part != "llm")


def static_products(graph: Path) -> set[str | None]:
    """Names of the products of two dequantized factors: the W8A8 linear layers."""

    def dequantized(value: ir.Value | None) -> bool:
        producer = None if value is None else value.producer()
        return producer is not None and producer.op_type == "DequantizeLinear"

    nodes = ir.load(graph).graph
    return {n.name for n in nodes if n.op_type == "MatMul" and all(map(dequantized, n.inputs))}


@needs_tensorrt
@pytest.mark.parametrize("case", BUILT)
def test_int8_builds(
    case: str, builder: Builder, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    for part in ("vision", "connector", "llm"):
        build_part(builder, bundle(case, "int8"), part, tmp_path)


@needs_tensorrt
@pytest.mark.parametrize("case", BUILT)
def test_int4_builds(
    case: str, builder: Builder, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    build_part(builder, bundle(case, "int4"), "llm", tmp_path)  # the other parts are INT8's


@needs_tensorrt
@pytest.mark.parametrize("case", ["clip-llama-biases", "siglip-qwen2", "dinov2-swiglu"])
def test_full_precision_builds(
    case: str, builder: Builder, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    for part in ("vision", "connector", "llm"):
        build_part(builder, bundle(case), part, tmp_path)


@needs_tensorrt
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_of_real_width_build(precision: str, builder: Builder, tmp_path: Path) -> None:
    from vlm_edge.export.pipeline import export
    from vlm_edge.export.precision import PrecisionPlan

    checkpoint = build("real-width", tmp_path / "checkpoint", REAL)
    folder = tmp_path / "bundle"
    export(checkpoint, folder, precision=PrecisionPlan.uniform(precision))
    for part in ("vision", "connector", "llm"):
        build_part(builder, folder, part, tmp_path)


@needs_tensorrt
def test_a_refusal_is_seen(builder: Builder, tmp_path: Path) -> None:
    """The portable language model has a symbolic capacity: were refusals lost, all above would pass."""
    spec = ("float32", (1, 2, "capacity", 4))
    graph = write(
        tmp_path / "cache.onnx",
        lambda op, x: [op.TensorScatter(x["past"], x["new"], x["at"], axis=2)],
        {"past": spec, "new": ("float32", (1, 2, 3, 4)), "at": ("int64", (1,))},
        {"present": spec},
    )
    shape = (1, 2, 8, 4)
    with pytest.raises(Refused, match="static"):
        builder.build(graph, ({"past": (shape,) * 3},))


# -- the lowering itself, which needs no TensorRT ---------------------------------------------


def llm_feeds(manifest: Manifest, count: int, capacity: int) -> dict[str, np.ndarray]:
    """A prompt of `count` random embeddings into a cache of `capacity` positions."""
    settings = manifest.decoder
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, count, settings.width)).astype(np.float32)
    feeds = prefill_feeds(settings, embeds)
    more = ((0, 0), (0, 0), (0, 0), (0, capacity - count))
    for name, value in feeds.items():
        if "mask" in name:
            feeds[name] = np.pad(value, more, constant_values=np.finfo(np.float32).min)
        elif name.startswith("past."):
            feeds[name] = np.pad(value, ((0, 0), (0, 0), (0, capacity - count), (0, 0)))
    names = {spec.name for spec in manifest.engines["llm"].inputs}
    return {name: value for name, value in feeds.items() if name in names}


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_the_lowered_language_model_gives_the_same_values(
    case: str, precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bundle(case, precision)
    graph = lowered(folder, "llm", 23, tmp_path)
    onnx.checker.check_model(str(graph), full_check=True)
    feeds = llm_feeds(read_manifest(folder), 13, 23)
    # ONNX Runtime's blockwise kernel would round the activations too; level 1 is float32.
    level = {"session__qdq_matmulnbits_accuracy_level": "1"}
    before, after = run(folder / "llm.onnx", feeds, **level), run(graph, feeds, **level)
    for portable, same in zip(before, after, strict=True):
        np.testing.assert_allclose(same, portable, rtol=0, atol=1e-5 * np.abs(portable).max())


def test_no_symbolic_capacity_and_no_copy_of_the_weights(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    graph = lowered(bundle("siglip-qwen2", "int8"), "llm", 23, tmp_path)
    assert not any(graph.parent.glob("*.tensorrt.data"))
    model = ir.load(graph)
    values = [*model.graph.inputs, *model.graph.outputs]
    dims = {str(d) for value in values for d in value.shape or ()}
    assert "capacity" not in dims and {"batch", "sequence", "asked", "23"} <= dims
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.parametrize("part", ["vision", "connector"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_parts_are_built_as_they_are(
    part: str, precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    graph = lowered(bundle("clip-llama", precision), part, 8, tmp_path)
    assert graph.name == f"{part}.onnx"
    assert not any(graph.parent.glob("*tensorrt*"))


def test_profiles_cover_prefill_and_decode() -> None:
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", 6)),
        TensorSpec("attention_mask", "float32", ("batch", 1, "sequence", "capacity")),
        TensorSpec("past.key.0", "float32", ("batch", 2, "capacity", 3)),
    ]
    prefill, decode = tensorrt.profiles(inputs, capacity=40, chunk=16)
    assert prefill["inputs_embeds"] == ((1, 1, 6), (1, 16, 6), (1, 16, 6))
    assert prefill["attention_mask"] == ((1, 1, 1, 40), (1, 1, 16, 40), (1, 1, 16, 40))
    assert decode["inputs_embeds"] == ((1, 1, 6),) * 3
    assert prefill["past.key.0"] == decode["past.key.0"] == ((1, 2, 40, 3),) * 3
    (short, _) = tensorrt.profiles(inputs, capacity=5, chunk=16)
    assert short["inputs_embeds"][2] == (
        1,
        5,
        6,
    )  # never more positions than the cache has room for
    pixels = TensorSpec("pixel_values", "float32", ("tiles", 3, 8, 8))
    (tiles,) = tensorrt.profiles([pixels], capacity=5, chunk=16, tiles=7)
    assert tiles == {"pixel_values": ((1, 3, 8, 8), (1, 3, 8, 8), (7, 3, 8, 8))}


def test_capacity_must_be_a_size(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="at least 1"):
        tensorrt.lower(tmp_path / "llm.onnx", 0)


def odd_int4(path: Path) -> Path:
    """x [rows, 35] @ an INT4 weight of 35 x 33: an odd number of half bytes."""
    from small_graph import ref, write_product

    from vlm_edge.export.quantizers.weight_only import WeightOnly

    weight = np.random.default_rng(0).standard_normal((33, 35)).astype(np.float32)
    return write_product(path, WeightOnly(4, 32).product("layer", ref(weight)), 35, 33)


def test_odd_int4_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match=r"35 x 33 .*weight.*export int8"):
        tensorrt.lower(odd_int4(tmp_path / "odd.onnx"), 8)


@needs_tensorrt
def test_odd_int4_weights_are_what_tensorrt_refuses(builder: Builder, tmp_path: Path) -> None:
    graph = odd_int4(tmp_path / "odd.onnx")
    with pytest.raises(Refused, match="odd tensor volume"):
        builder.build(graph, ({"x": ((1, 35), (1, 35), (4, 35))},))
