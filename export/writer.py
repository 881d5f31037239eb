"""A bundle's folder, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vlm_edge.errors import BundleExists, SettingError
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.quantizers.rounding import TINY, block_size
from vlm_edge.runtime.bundle import file_digest
from vlm_edge.runtime.manifest import NAME, EmbeddingSettings, FileEntry, Manifest

EMBEDDING_BLOCK = 64  # columns that share a scale in an int8 token table


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well.

    An older bundle at `output` is replaced; after a failure nothing is left behind.

    Raises:
        BundleExists: `output` is something else than a bundle or an empty folder.
        SettingError: the folder that should hold it cannot be written, or it is the current one.
    """
    check_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise SettingError(f"{output.parent} cannot be written: {error.strerror}") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        check_output(output)  # an export takes a while: somebody may have put something there
        _replace(output, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output(output: Path) -> None:
    """May `output` be replaced?

    Raises:
        BundleExists: it is something else than a bundle or an empty folder.
        SettingError: it is the current folder, which cannot be renamed away.
    """
    if output.resolve() == Path.cwd():
        raise SettingError(f"{output} is the current folder; choose another -o")
    if output.is_dir():
        if (output / NAME).is_file() or not any(output.iterdir()):
            return
        raise BundleExists(output)
    if output.exists() or output.is_symlink():
        raise BundleExists(output)


def _replace(output: Path, temporary: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    output.rename(old / output.name)
    try:
        temporary.rename(output)
    except BaseException:  # an interrupt too: the older bundle is in the folder removed below
        if not output.exists():
            (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_embeddings(table: TensorRef, folder: Path, quantize: bool) -> EmbeddingSettings:
    """The token table [vocab, width] as .npy, rows in order.

    Full precision keeps float16 as it is stored, and widens bfloat16 to float32 (numpy has none);
    quantized rows are int8 with one float32 scale per block of columns.
    """
    vocab, width = table.shape
    if not quantize:
        dtype = np.dtype(np.float16 if table.view.dtype == np.float16 else np.float32)
        with (folder / "embeddings.npy").open("wb") as file:
            _npy_header(file, dtype, (vocab, width))
            for rows in table.rows():
                rows.astype(dtype, copy=False).tofile(file)
        return EmbeddingSettings("embeddings.npy", None, None)
    block = block_size(width, EMBEDDING_BLOCK)
    scales = np.empty((vocab, width // block), np.float32)
    with (folder / "embeddings.npy").open("wb") as file:
        _npy_header(file, np.dtype(np.int8), (vocab, width))
        start = 0
        for rows in table.rows():
            blocks = rows.reshape(len(rows), -1, block)
            scale = np.maximum(np.abs(blocks).max(axis=2) / np.float32(127), TINY)
            scales[start : start + len(rows)] = scale
            np.rint(blocks / scale[..., None]).astype(np.int8).tofile(file)
            start += len(rows)
    np.save(folder / "embeddings_scales.npy", scales)
    return EmbeddingSettings("embeddings.npy", "embeddings_scales.npy", block)


def _npy_header(file: object, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]  # any binary file


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file in the folder but the manifest."""
    return {
        path.name: FileEntry(path.stat().st_size, file_digest(path))
        for path in sorted(folder.iterdir())
        if path.name != NAME
    }


def part_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes by engine (its graphs and weights), of the token table, and of the rest."""
    sizes = dict.fromkeys([*manifest.engines, "embeddings", "other"], 0)
    for name, entry in manifest.files.items():
        stem = name.split(".")[0].removesuffix("_scales")
        sizes[stem if stem in sizes else "other"] += entry.size
    return sizes
