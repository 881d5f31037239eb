"""Checkpoint folders read through memory-mapped safetensors, and tensors streamed while they are written."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graph import ref

from vlm_edge.errors import CheckpointMissing, TensorMissing, TensorShapeMismatch, UnsupportedConfig
from vlm_edge.export import checkpoint as checkpoint_module
from vlm_edge.export.checkpoint import DTYPES, Checkpoint, Weights, refuse_quantized
from vlm_edge.export.config import Config
from vlm_edge.export.tensors import StreamedTensor, float_tensor, pack_int4, transposed

VALUES = np.array([[0.0, 1.0, -2.5], [3.25, 1e-3, -65504.0]])


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand; `length` is the header length that it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensors(**values: np.ndarray) -> bytes:
    """One after another, as safetensors lays them out."""
    kinds = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype("int64"): "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in values.items():
        ends = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": kinds[value.dtype], "shape": value.shape, "data_offsets": ends}
        data += value.tobytes()
    return container(header, data)


def folder(path: Path, *files: tuple[str, bytes], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("kind", DTYPES)
def test_every_float_type_is_read_as_float32(kind: str, tmp_path: Path) -> None:
    stored = VALUES.astype(DTYPES[kind])
    found = Checkpoint(folder(tmp_path, ("model.safetensors", tensors(w=stored))))
    tensor = found.tensor("w", (2, 3))
    assert tensor.shape == (2, 3)
    assert tensor.numpy().dtype == np.float32
    np.testing.assert_array_equal(tensor.numpy(), stored.astype(np.float32))
    assert found.dtype() == stored.dtype.name


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    wanted = {
        "half": torch.randn(5, 7).to(torch.float16),
        "brain": torch.randn(3, 4, 2).to(torch.bfloat16),
        "full": torch.randn(9),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "position_ids": torch.arange(4)[None],
    }
    folder(tmp_path)
    save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint(tmp_path)
    for name, tensor in wanted.items():
        if name == "position_ids":
            assert name not in found  # integer buffers are no weights
            continue
        values = found.tensor(name, tuple(tensor.shape)).numpy()
        np.testing.assert_array_equal(values, tensor.float().numpy())


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    """Writers pad the header so that values are aligned; the format does not ask for it."""
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    for padding in range(8):
        raw = json.dumps(header).encode() + b" " * padding
        content = container(raw, np.array([1.5, -2], np.float32).tobytes())
        found = Checkpoint(folder(tmp_path, ("model.safetensors", content)))
        np.testing.assert_array_equal(found.tensor("w", [2]).numpy(), [1.5, -2])


def test_values_stay_in_the_file(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = Checkpoint(folder(tmp_path, ("model.safetensors", tensors(w=values))))
    view = found.tensor("w", (3, 4)).view
    for _ in range(9):
        if isinstance(view, np.memmap):
            break
        view = view.base
    assert isinstance(view, np.memmap)
    assert view.mode == "r"


def test_an_index_names_the_files(tmp_path: Path) -> None:
    one, two = (np.full((2, 2), n, np.float32) for n in (1, 2))
    index = json.dumps(
        {"metadata": {}, "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    )
    folder(
        tmp_path,
        ("x-1.safetensors", tensors(a=one)),
        ("x-2.safetensors", tensors(b=two)),
        ("other.safetensors", b"is not read"),
        ("model.safetensors.index.json", index.encode()),
    )
    found = Checkpoint(tmp_path)
    np.testing.assert_array_equal(found.tensor("a", (2, 2)).numpy(), one)
    np.testing.assert_array_equal(found.tensor("b", (2, 2)).numpy(), two)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match="x-2.safetensors is missing"):
        Checkpoint(tmp_path)


def test_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    one = np.ones((1, 2), np.float32)
    folder(tmp_path, ("a.safetensors", tensors(a=one)), ("b.safetensors", tensors(b=one)))
    assert {"a", "b"} == {name for name in ("a", "b", "c") if name in Checkpoint(tmp_path)}


def test_renames_apply_in_order(tmp_path: Path) -> None:
    stored = {"model.tower.layer.3.q.weight": np.ones((1, 1), np.float32)}
    folder(tmp_path, ("model.safetensors", tensors(**stored)))
    renames = ((r"^model\.", ""), (r"\.layer\.(\d+)\.", r".layers.\1."), (r"^tower\.", "vision."))
    found = Checkpoint(tmp_path, renames)
    tensor = Weights(found).sub("vision").sub("layers").sub(3).sub("q").tensor("weight", 1, 1)
    assert tensor.name == "model.tower.layer.3.q.weight"  # messages speak of the file's own name


def test_absent_and_wrongly_shaped_tensors_are_named(tmp_path: Path) -> None:
    folder(tmp_path, ("model.safetensors", tensors(**{"a.b": np.ones((2, 3), np.float32)})))
    weights = Weights(Checkpoint(tmp_path)).sub("a")
    assert weights.has("b")
    assert not weights.has("c")
    with pytest.raises(TensorMissing, match=r"a\.c"):
        weights.tensor("c", 2, 3)
    with pytest.raises(TensorShapeMismatch, match=r"a\.b has shape \[2, 3\].*\[3, 2\]"):
        weights.tensor("b", 3, 2)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = bytes(8)
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "shorter than its length field": b"\x02\0\0",
    "length beyond the file": container({"w": ENTRY}, DATA, length=1 << 20),
    "absurd length": container({"w": ENTRY}, DATA, length=(1 << 64) - 1),
    "header cut": container(b'{"w": {"dtype": "F32", "sha'),
    "header is a list": container([1], DATA),
    "header is not text": container(b"\xff\xfe\x00\x01", DATA),
    "entry is a number": container({"w": 1}, DATA),
    "no offsets": container({"w": {"dtype": "F32", "shape": [2]}}, DATA),
    "no shape": container({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
    "one offset": container({"w": {**ENTRY, "data_offsets": [0]}}, DATA),
    "offsets beyond the file": container({"w": {**ENTRY, "data_offsets": [0, 12]}}, DATA),
    "offsets that are no numbers": container({"w": {**ENTRY, "data_offsets": ["0", "8"]}}, DATA),
    "offsets before the data": container({"w": {**ENTRY, "data_offsets": [-8, 0]}}, DATA),
    "offsets swapped": container({"w": {**ENTRY, "data_offsets": [8, 0]}}, DATA),
    "fewer bytes than the shape needs": container({"w": {**ENTRY, "shape": [3]}}, DATA),
    "more bytes than the shape needs": container({"w": {**ENTRY, "shape": [1]}}, DATA),
    "half a value": container({"w": {**ENTRY, "data_offsets": [0, 7]}}, DATA),
    "negative shape": container({"w": {**ENTRY, "shape": [-1]}}, DATA),
    "dtype is no name": container({"w": {**ENTRY, "dtype": ["F32"]}}, DATA),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(content: bytes, tmp_path: Path) -> None:
    folder(tmp_path, ("model.safetensors", content))
    with pytest.raises(CheckpointMissing) as caught:
        Checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_a_broken_index_is_named(index: str, tmp_path: Path) -> None:
    folder(tmp_path, ("model.safetensors.index.json", index.encode()))
    with pytest.raises(CheckpointMissing, match=r"index\.json|safetensors"):
        Checkpoint(tmp_path)


def test_an_empty_header_is_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    found = Checkpoint(folder(tmp_path, ("model.safetensors", container({}))))
    with pytest.raises(TensorMissing):
        found.tensor("w", (1,))


def test_the_digest_follows_config_and_headers_only(tmp_path: Path) -> None:
    values = np.ones((2, 2), np.float32)

    def digest(stored: dict[str, np.ndarray], **config: Any) -> str:
        return Checkpoint(
            folder(tmp_path, ("model.safetensors", tensors(**stored)), **config)
        ).digest()

    first = digest({"w": values})
    assert first == digest(
        {"w": 2 * values}
    )  # reading all values would take a minute on a 7B model
    assert (
        len({first, digest({"v": values}), digest({"w": values[:1]}), digest({"w": values}, a=1)})
        == 4
    )


def test_dtype_is_what_most_tensors_have(tmp_path: Path) -> None:
    half, full = np.ones((1, 1), np.float16), np.ones((1, 1), np.float32)
    folder(
        tmp_path,
        ("model.safetensors", tensors(a=full, b=half, c=half, d=np.arange(3), e=np.arange(3))),
    )
    assert Checkpoint(tmp_path).dtype() == "float16"


def test_a_quantized_checkpoint_is_refused() -> None:
    refuse_quantized(Config({"quantization_config": None}))
    with pytest.raises(UnsupportedConfig, match="quantization_config = 'awq'"):
        refuse_quantized(Config({"quantization_config": {"quant_method": "awq", "bits": 4}}))


# -- streamed tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 40, 100, 1 << 20])
@pytest.mark.parametrize("shape", [(7,), (7, 5), (1, 9), (6, 2, 3)])
def test_rows_are_the_whole_tensor_within_the_budget(
    shape: tuple[int, ...], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", budget)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tensor = ref(values)
    blocks = list(tensor.rows())
    assert all(block.nbytes <= max(budget, values[:1].nbytes) for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), values)
    np.testing.assert_array_equal(np.concatenate(list(tensor.T.rows())), values.T)


def test_split_is_along_the_outputs() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    gate, up = ref(values).split(2)
    np.testing.assert_array_equal(gate.numpy(), values[:2])
    np.testing.assert_array_equal(up.numpy(), values[2:])


@pytest.mark.parametrize("budget", [1, 64, 1 << 20])
def test_a_streamed_tensor_is_the_same_by_every_way_out(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", budget)
    values = np.random.default_rng(0).standard_normal((9, 5)).astype(ml_dtypes.bfloat16)
    for tensor, wanted in (
        (float_tensor(ref(values)), values.astype(np.float32)),
        (transposed(ref(values)), values.T.astype(np.float32)),
    ):
        file = io.BytesIO()
        tensor.tofile(file)
        assert file.getvalue() == tensor.tobytes() == wanted.tobytes()
        np.testing.assert_array_equal(tensor.numpy(), wanted)
        assert tensor.shape == ir.Shape(wanted.shape)


def test_only_one_block_is_in_memory() -> None:
    made, alive = [], []

    def blocks() -> Iterator[np.ndarray]:
        for value in range(4):
            made.append(value)
            yield np.full((1, 2), value, np.float32)

    class File:
        def write(self, data: Any) -> None:
            alive.append(made[-1])

    StreamedTensor(blocks, ir.DataType.FLOAT, (4, 2)).tofile(File())
    assert alive == [0, 1, 2, 3]  # each is written before the next is made


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_int4_is_packed_low_half_first(values: list[int]) -> None:
    packed = pack_int4(np.array(values, np.int8))
    halves = [half for byte in packed.tolist() for half in (byte & 15, byte >> 4)]
    assert len(packed) == (len(values) + 1) // 2
    assert [half - 16 if half > 7 else half for half in halves][: len(values)] == values
    assert halves[len(values) :] in ([], [0])


@pytest.mark.parametrize("shape", [(4, 6), (3, 5)])
def test_a_streamed_int4_tensor_is_the_same_by_every_way_out(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    tensor = StreamedTensor(lambda: [values], ir.DataType.INT4, shape)
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == tensor.tobytes() == pack_int4(values).tobytes()
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), values)
