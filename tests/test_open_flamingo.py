"""OpenFlamingo: prompts, pixels, logits of every step and greedy tokens are those of its own package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cache
from open_flamingo_reference import logits as reference_logits
from tiny_open_flamingo import (
    OPEN_FLAMINGO_CASES,
    Pieces,
    TinyOpenFlamingo,
    build_pieces,
    whole,
)

from vlm_edge import VLM
from vlm_edge.errors import (
    BundleExists,
    CheckpointMissing,
    ExtraMissing,
    ImageCountMismatch,
    TemplateError,
    UnsupportedConfig,
)
from vlm_edge.export import open_flamingo
from vlm_edge.export.config import Config
from vlm_edge.export.language import families, mpt
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.verify import verify

pytestmark = pytest.mark.skipif(
    find_spec("open_flamingo") is None, reason="requirements/open-flamingo.txt is not installed"
)

MARGIN, LOGIT_TOLERANCE, NEW_TOKENS = 5e-4, 1e-4, 10  # the margin in deviations of the logits
A, B, C = Path("wide.png"), Path("tall.png"), Path("photo.jpg")  # names of pictures
PROMPTS: dict[str, list[str | Path]] = {
    "image first": [A, "what is the color?"],
    "text first": [" User: this is ", A, " what is it?"],
    "text last": ["what", A],
    "two in a row": [A, B, "what is the color?"],
    "few-shot": [A, "a color.<|endofchunk|>", B, " the thing. <|endofchunk|>", C, "what"],
    "no image": ["what is this and that"],
}
Loaded = Callable[[str], VLM]
Built = Callable[[str], Pieces]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Built:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("open-flamingo")
    return Cache(lambda case: build_pieces(case, root / case))


@pytest.fixture(scope="module")
def checkpoints(pieces: Built) -> Callable[[str], Path]:
    def make(case: str) -> Path:
        it = pieces(case)
        return whole(it, it.checkpoint.parent / "whole", OPEN_FLAMINGO_CASES[case].rule)

    return Cache(make)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Loaded:
    root = tmp_path_factory.mktemp("open-flamingo-bundles")

    def make(case: str) -> VLM:
        export(checkpoints(case), root / case)
        return VLM.load(root / case, threads=1)

    return Cache(make)


def placed(parts: list[str | Path], pictures: dict[str, Path]) -> list[str | Path]:
    return [pictures[part.name] if isinstance(part, Path) else part for part in parts]


def theirs_of(pieces: Pieces, parts: list[str | Path]) -> tuple[list[int], np.ndarray]:
    """Token ids of the text with `<image>` for each picture, and CLIP's pixels; of a prompt without any one
    blank picture, which the package needs."""
    import transformers
    from transformers.image_utils import load_image

    text = "".join("<image>" if isinstance(part, Path) else part for part in parts)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(pieces.vision)
    images = [load_image(str(part)) for part in parts if isinstance(part, Path)]
    if not images:
        return pieces.tokenizer(text)["input_ids"], np.zeros((1, 3, 30, 30), np.float32)
    pixels = processor(images=images, return_tensors="np")["pixel_values"]
    return pieces.tokenizer(text)["input_ids"], pixels


@pytest.mark.verifies(
    "flamingo", "OpenFlamingo: token ids, pixels, logits of every step, greedy tokens"
)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", OPEN_FLAMINGO_CASES)
def test_answers_are_those_of_the_package(
    case: str, prompt: str, loaded: Loaded, pieces: Built, pictures: dict[str, Path]
) -> None:
    vlm, it = loaded(case), pieces(case)
    parts = placed(PROMPTS[prompt], pictures)
    built = vlm.build_prompt(parts)
    ids, pixels = theirs_of(it, parts)
    assert built.token_ids == ids
    if built.pictures:
        ours = np.concatenate([vlm.pixels(picture) for picture in built.pictures])
        np.testing.assert_array_equal(ours, pixels)
    tokens = list(vlm.generate(parts, max_new_tokens=NEW_TOKENS, ignore_eos=True).token_ids)
    assert it.model.media_token_id not in tokens, "it would be another picture: choose another salt"
    # Each token is the package's choice after those before it, so together they are its greedy answer.
    expected = reference_logits(it.model, ids + tokens[:-1], pixels)[len(ids) - 1 :]
    read = vlm.inputs(built)
    assert read.media is not None
    vlm.decoder.length = 0
    vlm.decoder.attend(read.media)
    found = [vlm.decoder.prefill(read.embeds).copy()]
    rows = vlm.embeddings.rows(np.array(tokens[:-1], np.int64))
    found += [vlm.decoder.decode(row).copy() for row in rows]
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < LOGIT_TOLERANCE, f"step {step}"
    best = np.sort(expected, axis=1)
    margins = (best[:, -1] - best[:, -2]) / expected.std(axis=1)
    assert margins.min() > MARGIN, "near a tie: choose another salt"
    assert expected.argmax(axis=1).tolist() == tokens


@pytest.mark.verifies("flamingo", "OpenFlamingo: `vlm verify` ladder")
@pytest.mark.parametrize("case", ["llama-first", "gpt_neox-serial", "mpt-clip"])
def test_the_ladder_is_climbed(
    case: str, loaded: Loaded, checkpoints: Callable[[str], Path], pictures: dict[str, Path]
) -> None:
    images = [pictures["wide.png"], pictures["rotated.jpg"]]
    report = verify(loaded(case).bundle.path, checkpoints(case), images, "what is it?", 6)
    assert report.ok, report
    names = {rung.name for rung in report.rungs if rung.probe == "picture"}
    assert {"vision", "connector", "media_kv", "prefill logits", "greedy tokens"} <= names


def test_a_wrong_block_is_named(
    loaded: Loaded, checkpoints: Callable[[str], Path], pictures: dict[str, Path], tmp_path: Path
) -> None:
    """The ladder finds one gate that differs, by the layer it stands before."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "whole"
    shutil.copytree(checkpoints("llama"), folder)
    path = folder / "flamingo.safetensors"
    tensors = load_file(path)
    tensors["flamingo.gated_cross_attn_layers.3.ff_gate"] += 0.05
    save_file(tensors, path, metadata={"format": "pt"})
    report = verify(loaded("llama").bundle.path, folder, [pictures["wide.png"]], "what?", 2)
    failed = next(rung for rung in report.rungs if rung.ok is False)
    assert (failed.name, failed.layer) == ("prefill logits", "llm.layers.3")


def test_pictures_matter(pieces: Built, pictures: dict[str, Path]) -> None:
    """Were they dropped on both sides, the test above would not see it; and the rules differ in what text
    before the first picture reads."""
    parts = placed(PROMPTS["text first"], pictures)
    for case, spec in OPEN_FLAMINGO_CASES.items():
        ids, pixels = theirs_of(pieces(case), parts)
        logits = reference_logits(pieces(case).model, ids, pixels)
        apart = np.abs(logits - reference_logits(pieces(case).model, ids, -pixels)).max(axis=1)
        assert apart[-1] > 0.01
        assert apart[0] > 0.01 if spec.rule == "previous" else apart[0] < 1e-4


# -- the language model alone --------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama", "gpt_neox", "mpt"])
def test_shut_gates_leave_the_language_model(
    text: Any, tmp_path: Path, pictures: dict[str, Path]
) -> None:
    """Whatever it attends to: logits are those of transformers' model in the language folder."""
    import torch
    import transformers

    spec = TinyOpenFlamingo(text=text, tokenizer="bytes")
    it = build_pieces(f"shut-{text}", tmp_path, spec)
    saved = torch.load(it.checkpoint, weights_only=True)
    state = saved["model_state_dict"]
    gates = [name for name in state if name.endswith("_gate")]
    assert len(gates) == 2 * 4
    torch.save(state | {name: torch.zeros(1) for name in gates}, it.checkpoint)
    export(whole(it, tmp_path / "whole", "previous"), tmp_path / "bundle")
    vlm = VLM.load(tmp_path / "bundle", threads=1)
    alone = transformers.AutoModelForCausalLM.from_pretrained(it.language, dtype=torch.float32)
    for parts in (placed(PROMPTS["text last"], pictures), PROMPTS["no image"]):
        built = vlm.build_prompt(parts)
        # the table's new rows, which `<image>` is one of, are in checkpoint.pt
        table = it.model.lang_encoder.get_input_embeddings()
        read = vlm.inputs(built)
        assert read.media is not None
        vlm.decoder.length = 0
        vlm.decoder.attend(read.media)
        found = vlm.decoder.prefill(read.embeds)
        with torch.inference_mode():
            embeds = table(torch.tensor([built.token_ids]))
            expected = alone(inputs_embeds=embeds).logits[0, -1].numpy()
        known = min(len(found), len(expected))
        assert known > 250
        np.testing.assert_allclose(found[:known], expected[:known], atol=2e-5)


def test_alibi_slopes_are_those_of_transformers() -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in (*range(1, 18), 32, 48, 112):
        config = mpt.read(Config({"model_type": "mpt", "d_model": heads, "n_heads": heads}))
        penalties = build_mpt_alibi_tensor(heads, 2)[:, 0].numpy()  # of one step back, and none
        expected = penalties[:, 1] - penalties[:, 0]
        np.testing.assert_allclose(config.slopes(), expected, rtol=3e-7)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "mpt", "attn_config": {"qk_ln": True}}, "qk_ln"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "alibi"),
        ({"model_type": "mpt", "attn_config": {"alibi_bias_max": 6}}, "alibi_bias_max"),
        ({"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}}, "attn_type"),
        ({"model_type": "mpt", "attn_config": {"softmax_scale": 0.3}}, "softmax_scale"),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        ({"model_type": "mpt", "no_bias": False}, "no_bias"),
        ({"model_type": "mpt", "n_heads": 7}, "n_heads"),
        ({"model_type": "gpt_neox", "num_attention_heads": 7}, "num_attention_heads"),
        ({"model_type": "gpt_neox", "rotary_pct": 1.5}, "rotary_pct"),
        ({"model_type": "gpt_neox", "hidden_act": "mish"}, "hidden_act"),
        ({"model_type": "gpt_neox", "sliding_window": 8}, "sliding_window"),
    ],
)
def test_language_models_refuse_what_they_cannot_honour(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedConfig, match=named):
        families.read(Config(values, "text_config"), "llama")


# -- prompts ------------------------------------------------------------------------------------


def test_prompts_are_taken_to_the_letter(loaded: Loaded, pictures: dict[str, Path]) -> None:
    vlm, image = loaded("gpt_neox"), pictures["wide.png"]
    token = vlm.manifest.prompt.image_token_id
    plain = vlm.build_prompt(" what ", [image])
    assert plain.token_ids == vlm.build_prompt("<image> what ", [image]).token_ids
    assert plain.token_ids == vlm.build_prompt([image, " what "]).token_ids
    assert plain.token_ids[0] == token and plain.token_ids.count(token) == 1
    assert vlm.build_prompt([image, "what"]).token_ids != plain.token_ids
    with pytest.raises(ImageCountMismatch):
        vlm.build_prompt("<image><image>", [image])
    with pytest.raises(TemplateError):
        vlm.chat()


def test_answers_end_with_the_chunk(loaded: Loaded, pieces: Built) -> None:
    """As the package's `generate` does; the language model's own end token does not end them."""
    for case in ("llama", "mpt"):
        ends = pieces(case).tokenizer.convert_tokens_to_ids("<|endofchunk|>")
        assert loaded(case).manifest.generation.eos_token_ids == (ends,)


def test_a_picture_is_computed_once(loaded: Loaded, pictures: dict[str, Path]) -> None:
    from answers import counted

    vlm = loaded("mpt")
    vlm.clear_image_cache()
    runs = [counted(vlm, name) for name in ("vision", "connector", "media_kv")]
    for question in ("what is it", "what is this"):
        vlm.generate([pictures["wide.png"], question], max_new_tokens=5, ignore_eos=True)
    assert runs == [[1], [1], [1]]


@pytest.mark.parametrize(("case", "precision"), [("gpt_neox", "int8"), ("mpt", "int4")])
def test_quantized_bundles_stay_near(
    case: str,
    precision: str,
    loaded: Loaded,
    checkpoints: Callable[[str], Path],
    pictures: dict[str, Path],
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    report = export(checkpoints(case), bundle, precision=PrecisionPlan.uniform(precision))
    assert [*report.errors] == ["vision", "connector", "media_kv", "llm"]
    asked, found = placed(PROMPTS["few-shot"], pictures), []
    for vlm in (loaded(case), VLM.load(bundle, threads=1)):
        read = vlm.inputs(vlm.build_prompt(asked))
        assert read.media is not None
        vlm.decoder.length = 0
        vlm.decoder.attend(read.media)
        found.append(vlm.decoder.prefill(read.embeds).copy())
    cosine = float(found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1]))
    assert cosine > (0.97 if precision == "int8" else 0.85)


# -- putting the pieces together -----------------------------------------------------------------


def with_state(it: Pieces, path: Path, change: Callable[[dict[str, Any]], Any]) -> Pieces:
    """The pieces with another checkpoint.pt."""
    import torch

    state = dict(torch.load(it.checkpoint, weights_only=True)["model_state_dict"])
    torch.save(change(state) or state, path / "changed.pt")
    return replace(it, checkpoint=path / "changed.pt")


def test_weights_are_linked_and_named(checkpoints: Callable[[str], Path], pieces: Built) -> None:
    folder, it = checkpoints("llama"), pieces("llama")
    linked = folder / "language-model.safetensors"
    assert linked.samefile(it.language / "model.safetensors")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {*names.values()} == {path.name for path in folder.glob("*.safetensors")}
    config = json.loads((folder / "config.json").read_text())
    assert config["cross_attention_layers"] == [1, 3] and config["resampler_depth"] == 2


def test_bad_state_dicts_are_named(pieces: Built, tmp_path: Path) -> None:
    it = pieces("llama")

    def refused(change: Callable[[dict[str, Any]], Any], error: type, match: str) -> None:
        with pytest.raises(error, match=match):
            whole(with_state(it, tmp_path, change), tmp_path / "whole", "immediate")
        assert not (tmp_path / "whole").exists()

    gate = "lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate"
    strange = "lang_encoder.model.layers.0.decoder_layer.mlp.up_proj.weight"
    refused(lambda s: s.update({strange: s[gate]}), UnsupportedConfig, "up_proj")
    refused(lambda s: s.update({"perceiver.frame_embs": s[gate]}), UnsupportedConfig, "frame_embs")
    table = "lang_encoder.model.embed_tokens.weight"
    refused(lambda s: {n: s[n] for n in s if n != table}, CheckpointMissing, "embed_tokens")
    refused(lambda s: s.update({table: s[table][:200]}), UnsupportedConfig, "token table")
    refused(lambda s: [1], CheckpointMissing, "state dict")
    with pytest.raises(CheckpointMissing, match="no such file"):
        open_flamingo.assemble(it.vision, it.language, tmp_path / "x.pt", tmp_path / "whole")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointMissing, match="cannot load"):
        open_flamingo.assemble(it.vision, it.language, tmp_path / "text.pt", tmp_path / "whole")


def test_bad_folders_are_named(
    pieces: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    it, out = pieces("llama"), tmp_path / "whole"
    with pytest.raises(UnsupportedConfig, match="known are gpt_neox, llama, mpt"):
        open_flamingo.assemble(it.language, it.vision, it.checkpoint, out)
    with pytest.raises(CheckpointMissing):
        open_flamingo.assemble(tmp_path / "nothing", it.language, it.checkpoint, out)
    shutil.copytree(it.language, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(CheckpointMissing, match=r"\.bin weights only"):
        open_flamingo.assemble(it.vision, tmp_path / "old", it.checkpoint, out)
    with pytest.raises(BundleExists):
        open_flamingo.assemble(it.vision, it.language, it.checkpoint, it.language)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ExtraMissing, match="torch"):
        open_flamingo.assemble(it.vision, it.language, it.checkpoint, out)
    assert not out.exists()


def test_the_command_writes_the_folder(
    pieces: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    it = pieces("llama-first")
    pieces_given = [str(it.vision), str(it.language), str(it.checkpoint)]
    open_flamingo.main([*pieces_given, str(tmp_path / "whole"), "--attend", "previous"])
    assert str(tmp_path / "whole") in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["only_attend_immediate_media"] is False
    with pytest.raises(SystemExit, match="exists"):
        open_flamingo.main([*pieces_given, str(tmp_path / "whole")])


@pytest.mark.parametrize("layers", [None, [], [3, 1], [0, 9], ["1"], [1, 1]])
def test_layers_are_checked(
    layers: Any, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(checkpoints("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"cross_attention_layers": layers}))
    with pytest.raises(UnsupportedConfig, match="cross_attention_layers"):
        export(folder, tmp_path / "bundle")
