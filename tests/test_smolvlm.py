"""Idefics3 and SmolVLM: prompts, tiles, logits and greedy tokens are those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cache
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import scene
from PIL import Image
from reference import Reference
from tiny import edit_json
from tiny_smolvlm import SMOL_CASES, TinySmol, build_smol, processor_of

from vlm_edge.errors import LimitNotKept, UnsupportedConfig
from vlm_edge.export.pipeline import export, read_model
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.processor import read_processor
from vlm_edge.export.quantizers import Float
from vlm_edge.export.vision.idefics3 import position_ids
from vlm_edge.runtime.tiling import TileLimits

MARGIN, LOGIT_TOLERANCE, NEW_TOKENS = 2e-3, 1e-4, 16
SHAPES = {
    "square": (300, 300), "tall": (100, 400), "wide": (400, 100), "odd": (61, 37),
    "tiny": (5, 3), "large": (4000, 3000), "strip": (700, 9),
}  # fmt: skip
PROMPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: ("<image>\nwhat is the color?", (name,)) for name in SHAPES},
    "two images": ("what <image> and the other<image>", ("odd", "tall")),
    "no image": ("what is this and that", ()),
}


class SmolReference(Reference):
    """The model with the processor of Idefics3, SmolVLM's own being out of reach (tiny_smolvlm.py)."""

    def __init__(self, folder: Path, spec: TinySmol) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.processor = processor_of(spec)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("shapes"), {}
    for seed, (name, size) in enumerate(SHAPES.items()):
        paths[name] = folder / f"{name}.bmp"
        scene(97, 83, seed).resize(size, Image.Resampling.BICUBIC).save(paths[name])
    return paths


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """smol(case) -> folder of the checkpoint."""
    root = tmp_path_factory.mktemp("smol")
    return Cache(lambda case: build_smol(case, root / case))


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, smol: Callable[[str], Path]
) -> Callable[..., Path]:
    """bundles(case, precision="fp32") -> folder."""
    root = tmp_path_factory.mktemp("smol-bundles")

    def make(case: str, precision: str = "fp32") -> Path:
        out = root / f"{case}-{precision}"
        export(smol(case), out, precision=PrecisionPlan.uniform(precision))
        return out

    return Cache(make)


@pytest.fixture(scope="module")
def loaded(bundles: Callable[..., Path]) -> Callable[..., Any]:
    from vlm_edge import VLM

    return Cache(lambda *key: VLM.load(bundles(*key), device="cpu", threads=1))


@pytest.fixture(scope="module")
def truth(smol: Callable[[str], Path]) -> Callable[[str], SmolReference]:
    import torch

    torch.set_num_threads(1)
    return Cache(lambda case: SmolReference(smol(case), SMOL_CASES[case]))


@pytest.mark.verifies("smolvlm", "token ids, pixels, prefill logits, greedy tokens")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", SMOL_CASES)
def test_answers_are_those_of_transformers(
    case: str,
    prompt: str,
    loaded: Callable[..., Any],
    truth: Callable[[str], SmolReference],
    shapes: dict[str, Path],
) -> None:
    vlm, reference = loaded(case), truth(case)
    text, names = PROMPTS[prompt]
    images = [shapes[name] for name in names]
    built = vlm.build_prompt(text, images, False)
    expected = reference.answer(text, images, NEW_TOKENS)
    assert built.token_ids == expected.prompt_ids
    if images:
        pixels = np.concatenate([vlm.pixels(picture) for picture in built.pictures])
        np.testing.assert_array_equal(pixels, reference.inputs(text, images)["pixel_values"][0])
    vlm.decoder.length = 0
    logits = vlm.decoder.prefill(vlm.embed(built)).copy()
    wanted = reference.logits(text, images)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=LOGIT_TOLERANCE)
    assert min(expected.margins) > MARGIN, "a near-tie: choose another salt in tiny_smolvlm.py"
    assert len(set(expected.token_ids)) >= 3, "the reference repeats itself and would hide errors"
    found = vlm.generate(text, images, False, max_new_tokens=NEW_TOKENS, temperature=0)
    assert list(found.token_ids) == expected.token_ids
    assert found.text == expected.text


@pytest.mark.verifies("smolvlm", "chat template")
@pytest.mark.parametrize("case", ["idefics3-factor3", "smolvlm"])
def test_chat_template(
    case: str,
    loaded: Callable[..., Any],
    truth: Callable[[str], SmolReference],
    shapes: dict[str, Path],
) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = truth(case).processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>User:<image>what is it?<end_of_utterance>\nAssistant:"
    built = loaded(case).build_prompt("what is it?", shapes["odd"], True)
    expected = truth(case).inputs(text, [shapes["odd"]])["input_ids"][0].tolist()
    assert built.text == text
    assert built.token_ids == expected
    tokenizer = truth(case).processor.tokenizer
    eos = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert loaded(case).manifest.generation.eos_token_ids == (eos,)


@pytest.mark.parametrize("case", ["idefics3-factor3", "smolvlm"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_fewer_tiles_are_those_of_a_smaller_longest_edge(
    case: str,
    tiles: int,
    loaded: Callable[..., Any],
    shapes: dict[str, Path],
) -> None:
    """`tiles` along the long edge; beside an odd edge the processor would need another row."""
    spec, vlm = SMOL_CASES[case], loaded(case)
    size = {"longest_edge": spec.tile * tiles // 2 * 2}
    image_processor = processor_of(spec).image_processor
    for name in ("square", "wide", "tall", "tiny", "strip"):
        with Image.open(shapes[name]) as image:
            made = image_processor(image, size=size, return_row_col_info=True)
        pixels = np.asarray(made["pixel_values"][0])
        count = len(pixels)
        picture = vlm.build_prompt("<image>", shapes[name], False, TileLimits(count)).pictures[0]
        assert picture.plan.tiles == count
        assert picture.plan.grid == (made["rows"][0][0], made["cols"][0][0])
        np.testing.assert_array_equal(vlm.pixels(picture), pixels)
        assert vlm.count_tokens(*SHAPES[name], max_tiles=count) == count * spec.tile_tokens


def test_an_odd_edge_can_need_another_row_and_fewer_tiles_do_not(
    loaded: Callable[..., Any],
) -> None:
    """Of 93 pixels, three tiles of 31, the reference makes 94 beside them, which is four."""
    tiler = loaded("idefics3-factor3").tiler
    assert tiler.plan(300, 300).grid == (4, 4)
    assert tiler.plan(300, 300, TileLimits(max_tiles=16)).grid == (3, 3)
    assert tiler.plan(300, 300, TileLimits(max_tiles=1)).grid == (0, 0)


def test_a_model_that_never_tiles_refuses_fewer_visual_tokens(loaded: Callable[..., Any]) -> None:
    assert loaded("idefics3-whole").count_tokens(500, 400, max_tiles=1) == 4
    with pytest.raises(LimitNotKept):
        loaded("idefics3-whole").count_tokens(500, 400, max_visual_tokens=3)


# -- the tiling against the processor ---------------------------------------------------------


def rows_and_columns(settings: dict[str, Any], width: int, height: int) -> tuple[int, int]:
    """What Idefics3ImageProcessor cuts, by its own steps on an array that has a shape and no values."""
    import transformers
    from transformers.image_processing_backends import PilBackend

    def resize(self: Any, image: Any, size: Any, **_: Any) -> Any:
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))

    processor = transformers.Idefics3ImageProcessorPil(
        do_rescale=False, do_normalize=False, do_pad=False, **settings
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PilBackend, "resize", resize)
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        made = processor(
            image,
            input_data_format="channels_first",
            do_convert_rgb=False,
            return_row_col_info=True,
        )
    return made["rows"][0][0], made["cols"][0][0]


@pytest.mark.verifies("smolvlm", "tiles of 2000 sizes of pictures")
@settings(max_examples=2000, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    tile=st.sampled_from([28, 31, 364, 384, 512]),
    edge=st.sampled_from([1, 2, 3, 4, 5, 9]),
    odd=st.integers(-3, 3),
)
def test_tiles_of_every_size_are_those_of_the_processor(
    width: int, height: int, tile: int, edge: int, odd: int
) -> None:
    from vlm_edge.runtime.tiling import Split, tiler

    longest = max(2, tile * edge + odd)
    ours = tiler(Split("split", 4, longest, True, "lanczos", "<f>", "<g>"), (tile, tile))
    plan = ours.plan(width, height)
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    assert plan.grid == rows_and_columns(sizes, width, height)
    assert plan.name in ours.grids()
    assert plan.tokens == 4 * plan.tiles
    least = ours.plan(width, height, TileLimits(max_tiles=1))
    assert (least.tiles, least.tokens) == (1, 4)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_tiles_without_a_first_resize(width: int, height: int) -> None:
    from vlm_edge.runtime.tiling import Split, tiler

    ours = tiler(Split("split", 4, None, True, "lanczos", "<f>", "<g>"), (50, 50))
    settings = {"do_resize": False, "max_image_size": {"longest_edge": 50}}
    assert ours.plan(width, height).grid == rows_and_columns(settings, width, height)


# -- positions --------------------------------------------------------------------------------


def reference_positions(trained: int, side: int) -> list[int]:
    """Of Idefics3VisionEmbeddings itself, read off a table that holds each position's number."""
    import torch
    from transformers import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    config = Idefics3VisionConfig(hidden_size=1, image_size=trained, patch_size=1)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(trained**2.0)[:, None])
        mask = torch.ones(1, side, side, dtype=torch.bool)
        found = embeddings(torch.zeros(1, 3, side, side), mask)
    return found[0, :side, 0].int().tolist()  # the first row of patches


@pytest.mark.verifies("smolvlm", "positions of patches")
@pytest.mark.parametrize("trained", range(1, 71))
def test_positions_are_those_of_the_reference(trained: int) -> None:
    sides = (1, 2, 3, trained // 2, trained - 1, trained, trained + 1, 2 * trained)
    for side in filter(None, sides):
        assert position_ids(trained, side).tolist() == reference_positions(trained, side), side


def test_positions_are_not_always_in_order() -> None:
    """Otherwise the tests above would not tell `position_ids` from `range`."""
    odd = [n for n in range(1, 71) if position_ids(n, n).tolist() != list(range(n))]
    assert {19, 25, 29} <= set(odd)
    assert not {16, 26, 27, 32} & set(odd)  # of published checkpoints


# -- vlm verify, quantized --------------------------------------------------------------------


@pytest.mark.verifies("smolvlm", "`vlm verify` ladder")
@pytest.mark.parametrize("case", ["idefics3", "smolvlm", "smolvlm-small-tiles"])
def test_verify_climbs_to_the_top(
    case: str, bundles: Callable[..., Path], smol: Callable[[str], Path], shapes: dict[str, Path]
) -> None:
    from vlm_edge.export.verify import verify

    report = verify(bundles(case), smol(case), [shapes["odd"], shapes["wide"]], new_tokens=4)
    assert [rung.name for rung in report.rungs if rung.ok is False] == []
    tiling = [rung for rung in report.rungs if rung.name == "tiling"]
    assert len(tiling) == 1 and "tokens" in tiling[0].detail
    assert report.rungs[-1].name == "greedy tokens"


def test_verify_names_the_position_that_is_wrong(
    bundles: Callable[..., Path],
    smol: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlm_edge.export.verify import verify
    from vlm_edge.export.vision import idefics3

    monkeypatch.setattr(idefics3, "position_ids", lambda trained, side: np.arange(side))
    export(smol("smolvlm"), tmp_path / "wrong")
    report = verify(tmp_path / "wrong", smol("smolvlm"), new_tokens=2)
    failed = [rung for rung in report.rungs if rung.ok is False]
    assert failed[0].name == "vision" and failed[0].layer == "vision.layers.0"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized(
    precision: str,
    loaded: Callable[..., Any],
    shapes: dict[str, Path],
    bundles: Callable[..., Path],
) -> None:
    from vlm_edge.export.verification.measures import cosine

    case = "idefics3-factor3"
    exact, rounded = loaded(case), loaded(case, precision)
    precisions = {name: e.precision for name, e in rounded.manifest.engines.items()}
    assert precisions["vision"] == "int8" and precisions["llm"] != "fp32"
    for name in ("odd", "wide"):
        first, second = (
            vlm.encode(vlm.build_prompt("<image>", shapes[name], False).pictures[0])
            for vlm in (exact, rounded)
        )
        assert first.shape == second.shape
        assert cosine(second, first) > 0.99
    data = json.loads((bundles(case, precision) / "manifest.json").read_text())["calibration"]
    assert any("x" in grid for grid in data["data"]["tilings"])


# -- files ------------------------------------------------------------------------------------


@pytest.fixture
def copy(smol: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda case: Path(shutil.copytree(smol(case), tmp_path / case))


@pytest.mark.parametrize(
    ("case", "file", "key", "value", "named"),
    [
        ("smolvlm", "processor_config.json", "image_seq_len", 24, "image_seq_len"),
        ("smolvlm", "processor_config.json", "image_seq_len", ..., "169 places"),
        ("smolvlm", "preprocessor_config.json", "size", {"height": 9, "width": 9}, "size"),
        ("smolvlm", "preprocessor_config.json", "max_image_size", 50, "max_image_size"),
        ("smolvlm", "preprocessor_config.json", "max_image_size", {"longest_edge": 1}, "patch_size"),
        ("smolvlm", "preprocessor_config.json", "do_center_crop", True, "do_center_crop"),
        ("smolvlm", "preprocessor_config.json", "image_processor_type", "CLIPImageProcessor",
         "image_processor_type"),
        ("smolvlm", "config.json", "scale_factor", 4, "scale_factor"),
        ("smolvlm", "config.json", "image_token_id", 7, "image_token_id"),
        ("smolvlm", "config.json", "vision_config.use_bigger_patches", 2, "use_bigger_patches"),
        ("smolvlm", "config.json", "text_config.qk_layer_norms", True, "qk_layer_norms"),
        ("idefics3", "processor_config.json", "image_processor.max_image_size",
         {"shortest_edge": 28}, "max_image_size"),
    ],
)  # fmt: skip
def test_refused_by_name(
    case: str, file: str, key: str, value: Any, named: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(case)
    edit_json(folder / file, key, value)
    if named == "image_processor_type":
        edit_json(folder / "processor_config.json", "image_seq_len", ...)
        for name in ("size", "max_image_size", "do_image_splitting", "do_pad", "video_sampling"):
            edit_json(folder / file, name, ...)
    with pytest.raises(UnsupportedConfig, match=named):
        read_model(folder)


def test_a_vocabulary_that_idefics3processor_would_extend(copy: Callable[[str], Path]) -> None:
    folder = copy("idefics3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<end_of_utterance>", "<the_end>"))
    with pytest.raises(UnsupportedConfig, match="<end_of_utterance>"):
        read_model(folder)


def test_the_names_of_smolvlms_tokens_are_the_tokenizers(copy: Callable[[str], Path]) -> None:
    folder = copy("smolvlm")
    edit_json(folder / "tokenizer_config.json", "fake_image_token", "<row_1_col_1>")
    edit_json(folder / "tokenizer_config.json", "global_image_token", "<row_1_col_2>")
    _, model, _ = read_model(folder)
    assert model.tiling.fake_token == "<row_1_col_1>"
    assert model.tiling.global_token == "<row_1_col_2>"


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
def test_every_spelling_of_the_image_processor(
    kind: str, suffix: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("smolvlm")
    path = folder / "preprocessor_config.json"
    edit_json(path, "image_processor_type", f"{kind}ImageProcessor{suffix}")
    for key in ("do_resize", "resample", "image_mean"):
        edit_json(path, key, ...)
    split = read_processor(folder).split
    assert split is not None and (split.tile, split.longest_edge, split.split) == (50, 150, True)
    edit_json(path, "do_resize", False)
    split = read_processor(folder).split
    assert split is not None and split.longest_edge is None


def test_video_settings_of_version_5(copy: Callable[[str], Path]) -> None:
    folder = copy("idefics3")
    edit_json(folder / "processor_config.json", "video_processor", {"fps": 1, "max_frames": 64})
    assert read_processor(folder).image_seq_len == 4


@pytest.mark.parametrize(("case", "whole", "text", "tied"), [
    ("smolvlm", True, False, True), ("smolvlm", False, True, True), ("smolvlm", ..., True, True),
    ("idefics3", False, True, False), ("idefics3", True, False, True),
])  # fmt: skip
def test_which_word_ties_the_head(
    case: str, whole: Any, text: bool, tied: bool, copy: Callable[[str], Path]
) -> None:
    """Both versions' checkpoints; `idefics3` has a head of its own in the file."""
    folder = copy(case)
    edit_json(folder / "config.json", "tie_word_embeddings", whole)
    edit_json(folder / "config.json", "text_config.tie_word_embeddings", text)
    _, model, _ = read_model(folder)
    llm = model.parts["llm"]
    assert llm.keep8 == {"text_model.embed_tokens" if tied else "lm_head"}
    llm.build(Float())


def test_the_benchmarks_checkpoint_has_the_tensors_of_smolvlm() -> None:
    import torch
    import transformers

    from vlm_edge.benchmarks import smolvlm_checkpoint as made

    config = transformers.SmolVLMConfig(
        vision_config=made.VISION, text_config=made.TEXT, scale_factor=made.FACTOR
    )
    with torch.device("meta"):
        model = transformers.SmolVLMForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert dict(made.shapes()) == expected
