"""A bundle opened for reading: its manifest, its files checked, its token table memory-mapped."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlm_edge.errors import BundleDamaged, PromptError
from vlm_edge.runtime.manifest import NAME, EmbeddingSettings, Manifest, read_manifest


class Bundle:
    """The folder `vlm export` wrote.

    Args:
        path: the folder.
        check: compare every file's sha256 with the manifest's (about 0.5 s a GB); sizes are always
            compared.

    Raises:
        BundleError: there is no bundle, or it is damaged; the sentence names the file.
    """

    def __init__(self, path: str | Path, check: bool = True) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._check_names()
        self._check_sizes()
        if check:
            self._check_digests()

    def file(self, name: str) -> Path:
        return self.path / name

    def graph(self, engine: str, kind: str) -> Path:
        """The graph of `engine` for engine kind `kind` ("cpu"): its lowering, or the portable one."""
        entry = self.manifest.engines[engine]
        return self.file(entry.lowered.get(kind, entry.graph))

    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.manifest.files.values())

    def embeddings(self) -> Embeddings:
        return Embeddings(self.path, self.manifest.embeddings)

    def _check_names(self) -> None:
        manifest = self.manifest
        graphs = [g for e in manifest.engines.values() for g in (e.graph, *e.lowered.values())]
        tables = (manifest.embeddings.file, manifest.embeddings.scales)
        for name in (*graphs, *tables, manifest.prompt.chat_template, "tokenizer.json"):
            if name is not None and name not in manifest.files:
                raise BundleDamaged(self.path, f"{NAME} lists no file {name}")
        for name in manifest.files:
            # A manifest may come from anywhere: its files are inside the bundle, nowhere else.
            if Path(name).name != name:
                raise BundleDamaged(self.path, f"{NAME} names a file outside the bundle: {name}")
        missing = {"vision", "connector", "llm"} - manifest.engines.keys()
        if missing:
            raise BundleDamaged(self.path, f"{NAME} lists no engine {', '.join(sorted(missing))}")

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.file(name)
            if not path.is_file():
                raise BundleDamaged(self.path, f"{name} is missing")
            if path.stat().st_size != entry.size:
                raise BundleDamaged(
                    self.path, f"{name} has {path.stat().st_size} bytes instead of {entry.size}"
                )

    def _check_digests(self) -> None:
        names = list(self.manifest.files)
        with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
            digests = pool.map(lambda name: file_digest(self.file(name)), names)
            for name, digest in zip(names, digests, strict=True):
                if digest != self.manifest.files[name].sha256:
                    raise BundleDamaged(self.path, f"{name} differs from the sha256 in {NAME}")


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Embeddings:
    """The token table, read row by row from the mapped file."""

    def __init__(self, folder: Path, settings: EmbeddingSettings) -> None:
        try:
            self._table = np.load(folder / settings.file, mmap_mode="r", allow_pickle=False)
            self._scales = (
                None
                if settings.scales is None
                else np.load(folder / settings.scales, mmap_mode="r", allow_pickle=False)
            )
        except (ValueError, OSError, EOFError) as error:
            raise BundleDamaged(folder, f"{settings.file} is not a table ({error})") from error

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, width] of token ids int64 [n].

        Raises:
            PromptError: an id has no row (a special token the model was never given one for).
        """
        if len(ids) and ids.max() >= len(self._table):
            raise PromptError(
                f"token {ids.max()} of the prompt has no row in the model's table of {len(self._table)}"
            )
        rows = self._table[ids]
        if self._scales is None:
            return np.asarray(rows, dtype=np.float32)
        scales = self._scales[ids]  # [n, blocks]
        blocks = rows.reshape(*scales.shape, -1).astype(np.float32)
        return (blocks * scales[..., None]).reshape(rows.shape)
