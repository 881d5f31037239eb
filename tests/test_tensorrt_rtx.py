"""The gate without a GPU: TensorRT-RTX parses and builds every engine of every architecture, in float16,
INT8 and INT4, for two generations of GPUs; and what is quantized in the graph is quantized in the engine.

This is TensorRT-RTX on a machine without a GPU, not Jetson's TensorRT (docs/tensorrt.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Cache
from small_graph import run, write
from tensorrt_rtx import CASES, TARGETS, Gate, build, needs_tensorrt, profile
from tiny import CASES as LLAVA_CASES
from tiny import Tiny
from tiny import build as build_llava

from vlm_edge.errors import BuildFailed, EngineFailure
from vlm_edge.export.lowering import tensorrt
from vlm_edge.export.parts import ARRANGEMENT
from vlm_edge.export.pipeline import Target, export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.tensorrt.api import BuildSettings, TensorRT
from vlm_edge.runtime.engine import LANGUAGE
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import Manifest, TensorSpec, read_manifest
from vlm_edge.runtime.trt import picture_positions

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
def trt() -> TensorRT:
    return TensorRT("tensorrt-rtx")


def build_part(
    trt: TensorRT,
    folder: Path,
    part: str,
    tmp_path: Path,
    targets: tuple[str, ...] = TARGETS,
    **room: Any,
) -> Gate:
    """Build an engine of a bundle, and check that what is quantized in the graph is so in the engine."""
    manifest = read_manifest(folder)
    entry, decoder = manifest.engines[part], manifest.decoder
    picture = picture_positions(manifest.tiling)
    if decoder.media is not None:
        room["media"] = 2 * picture
    if not decoder.chunked_prefill:
        room["chunk"] = profile(**room).capacity
    place = tmp_path / f"{folder.name}-{part}-{'-'.join(targets)}"
    gate = build(trt, folder / entry.graph, entry.inputs, place, profile(**room), picture, targets)
    assert gate.built.plan.nbytes > 0
    for dtype, name in ((ir.DataType.INT8, "Int8"), (ir.DataType.INT4, "Int4")):
        assert (name in gate.built.dtypes) == gate.stores(dtype)
    assert gate.built.int8_products >= gate.promised
    assert len(gate.promised) == promised_layers(manifest, part)
    return gate


def promised_layers(manifest: Manifest, part: str) -> int:
    """Layers that the manifest says are W8A8; a language model's INT8 is of its weights alone."""
    if part in LANGUAGE or manifest.calibration is None:
        return 0
    layers = manifest.calibration["parts"][part]["layers"].values()
    return sum(layer["precision"] == "int8" for layer in layers)


@needs_tensorrt
@pytest.mark.parametrize("case", CASES)
def test_full_precision_builds_in_float16(
    case: str, trt: TensorRT, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bundle(case, "fp32")
    for part in read_manifest(folder).engines:
        assert "Half" in build_part(trt, folder, part, tmp_path).built.dtypes


@needs_tensorrt
@pytest.mark.parametrize("case", CASES)
def test_int8_builds(case: str, trt: TensorRT, bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle(case, "int8")
    for part, entry in read_manifest(folder).engines.items():
        gate = build_part(trt, folder, part, tmp_path)
        assert entry.precision == "int8" and gate.stores(ir.DataType.INT8)
        assert bool(gate.promised) == (part not in LANGUAGE)


@needs_tensorrt
@pytest.mark.parametrize("case", CASES)
def test_int4_builds(case: str, trt: TensorRT, bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle(case, "int4")
    for part in set(LANGUAGE) & read_manifest(folder).engines.keys():  # the others are INT8's
        assert build_part(trt, folder, part, tmp_path).stores(ir.DataType.INT4)


@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "int4"])  # under INT4 other parts are in INT8
@pytest.mark.parametrize("case", ["clip-llama-biases", "blip2-t5", "idefics", "mllama"])
def test_the_rest_may_compute_in_float32(
    case: str, precision: str, trt: TensorRT, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bundle(case, precision)
    for part in read_manifest(folder).engines:
        built = build_part(trt, folder, part, tmp_path, float_type="float32").built
        assert "Half" not in built.dtypes and "Float" in built.dtypes


@needs_tensorrt
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_of_real_width_build(
    precision: str, target: str, trt: TensorRT, real: Callable[[str], Path], tmp_path: Path
) -> None:
    """For each target alone: what the gate builds for both at once is no compromise."""
    folder = real(precision)
    for part in ("vision", "connector", "llm") if precision == "int8" else ("llm",):
        gate = build_part(trt, folder, part, tmp_path, (target,))
        assert not unpacked(gate), "a weight is made floats of in every call"
    assert tensorrt.blockwise(ir.load(gate.graph).graph) == 0


def unpacked(gate: Gate) -> list[str]:
    """Layers that read quantized weights and compute no product."""
    return [
        layer.name
        for layer in gate.built.layers
        if {"Int8", "Int4"} & set(layer.reads)
        and not any("MatMul" in node for node in layer.nodes)
        and "Int8" not in layer.writes  # that quantizes an activation
    ]


@needs_tensorrt
def test_weights_in_blocks_are_unpacked_in_every_call(
    trt: TensorRT, real: Callable[[str], Path], tmp_path: Path
) -> None:
    """What `vlm build` warns of, of a bundle for the CPU; TensorRT may get better at it one day."""
    gate = build_part(trt, real("int8-cpu"), "llm", tmp_path, TARGETS[:1])
    blocks = tensorrt.blockwise(ir.load(gate.graph).graph)
    assert blocks == 8 and len(unpacked(gate)) >= blocks  # seven layers and the head


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("real")
    checkpoint = Cache(lambda: build_llava("real-width", root / "checkpoint", REAL))

    def make(kind: str) -> Path:
        """Quantized for TensorRT; "int8-cpu" as a bundle for the CPU is."""
        if kind == "int8":
            plan = PrecisionPlan("int8")
        else:
            plan = PrecisionPlan(parts={"llm": "int4" if kind == "int4" else "int8"})
        target: Target = "cpu" if kind == "int8-cpu" else "tensorrt-rtx"
        export(checkpoint(), root / kind, precision=plan, target=target)
        return root / kind

    return Cache(make)


@needs_tensorrt
def test_a_refusal_names_operator_and_layer(trt: TensorRT, tmp_path: Path) -> None:
    """A symbolic capacity, as the portable graph has: were refusals lost, all above would pass."""
    spec = ("float32", (1, 2, "room", 4))
    graph = write(
        tmp_path / "cache.onnx",
        lambda op, x: [op.TensorScatter(x["past"], x["new"], x["at"], axis=2)],
        {"past": spec, "new": ("float32", (1, 2, 3, 4)), "at": ("int64", (1,))},
        {"present": spec},
    )
    name = next(node.name for node in ir.load(graph).graph if node.op_type == "TensorScatter")
    shape = (1, 2, 8, 4)
    with pytest.raises(
        BuildFailed, match=f"did not build llm: operator TensorScatter of {name}: .*static"
    ):
        trt.build("llm", graph, BuildSettings(({"past": (shape,) * 3},), ("8.6",)))


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
@pytest.mark.parametrize("case", LLAVA_CASES)
def test_the_lowered_language_model_gives_the_same_values(
    case: str, precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = bundle(case, precision)
    shutil.copy(folder / "llm.data", tmp_path)  # the checker mistrusts links
    graph = tensorrt.lower(
        folder / "llm.onnx", tmp_path, profile(capacity=23, float_type="float32")
    )
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
    folder = bundle("siglip-qwen2", "int8")
    before = sorted(path.name for path in folder.iterdir())
    graph = tensorrt.lower(
        folder / "llm.onnx", tmp_path, profile(capacity=23, float_type="float32")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm.data", "llm.onnx"]
    assert (tmp_path / "llm.data").is_symlink()
    assert (tmp_path / "llm.data").samefile(folder / "llm.data")
    assert sorted(path.name for path in folder.iterdir()) == before
    model = ir.load(graph)
    values = [*model.graph.inputs, *model.graph.outputs]
    dims = {str(d) for value in values for d in value.shape or ()}
    assert "capacity" not in dims and {"batch", "sequence", "asked", "23"} <= dims


def test_profiles_cover_prefill_and_decode() -> None:
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", 6)),
        TensorSpec("attention_mask", "float32", ("batch", 1, "sequence", "capacity")),
        TensorSpec("past.key.0", "float32", ("batch", 2, "capacity", 3)),
    ]
    prefill, decode = tensorrt.profiles(inputs, profile(capacity=40))
    assert prefill["inputs_embeds"] == ((1, 1, 6), (1, 16, 6), (1, 16, 6))
    assert prefill["attention_mask"] == ((1, 1, 1, 40), (1, 1, 16, 40), (1, 1, 16, 40))
    assert decode["inputs_embeds"] == ((1, 1, 6),) * 3
    assert prefill["past.key.0"] == decode["past.key.0"] == ((1, 2, 40, 3),) * 3
    (short, _) = tensorrt.profiles(inputs, profile(capacity=5))
    assert short["inputs_embeds"][2] == (1, 5, 6)  # never more than the cache has room for


def test_profiles_of_what_sees_pictures() -> None:
    pixels = TensorSpec("pixel_values", "float32", ("tiles", 3, 8, 8))
    room = profile(tiles=7, media=30)
    (tiles,) = tensorrt.profiles([pixels], room)
    assert tiles == {"pixel_values": ((1, 3, 8, 8), (1, 3, 8, 8), (7, 3, 8, 8))}
    (together,) = tensorrt.profiles([pixels, ARRANGEMENT], room)  # all of a picture at once
    assert together["pixel_values"] == ((1, 3, 8, 8), (7, 3, 8, 8), (7, 3, 8, 8))
    assert together["aspect_ratio_id"] == ((1,),) * 3
    features = TensorSpec("image_features", "float32", ("tiles", "tokens", 6))
    (media,) = tensorrt.profiles([features], room, picture=10)  # one picture at a time
    assert media == {"image_features": ((1, 1, 6), (1, 10, 6), (1, 30, 6))}
    keys = TensorSpec("media.key.0", "float32", ("batch", 2, "media", 3))
    (attended,) = tensorrt.profiles([keys], room, picture=10)
    assert attended == {"media.key.0": ((1, 2, 1, 3), (1, 2, 10, 3), (1, 2, 30, 3))}


def odd_int4(path: Path) -> Path:
    """x [rows, 35] @ an INT4 weight of 35 x 33: an odd number of half bytes."""
    from small_graph import ref, write_product

    from vlm_edge.export.quantizers.weight_only import WeightOnly

    weight = np.random.default_rng(0).standard_normal((33, 35)).astype(np.float32)
    return write_product(path, WeightOnly(4, 32).product("layer", ref(weight)), 35, 33)


def test_odd_int4_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match=r"35 x 33 .*weight.*export int8"):
        tensorrt.lower(odd_int4(tmp_path / "odd.onnx"), tmp_path / "lowered", profile())


@needs_tensorrt
def test_odd_int4_weights_are_what_tensorrt_refuses(trt: TensorRT, tmp_path: Path) -> None:
    graph = odd_int4(tmp_path / "odd.onnx")
    with pytest.raises(BuildFailed, match="odd tensor volume"):
        trt.build("odd", graph, BuildSettings(({"x": ((1, 35), (1, 35), (4, 35))},), ("8.6",)))
