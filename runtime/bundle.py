"""A bundle opened for reading: its manifest, its files checked, its token table memory-mapped."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlm_edge.errors import BundleDamaged, PromptError
from vlm_edge.runtime.instruction import Instruction
from vlm_edge.runtime.manifest import NAME, EmbeddingSettings, Manifest, read_manifest
from vlm_edge.runtime.tiling import AnyRes, Tiler, tiler
from vlm_edge.runtime.tokenizer import Tokenizer


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
        self._check_shapes()
        self._check_sizes()
        if check:
            self._check_digests()

    def file(self, name: str) -> Path:
        return self.path / name

    def graph(self, engine: str, *kinds: str) -> Path:
        """The graph of `engine` lowered for the first of `kinds` ("cpu-native", "cpu") that it was
        lowered for; the portable one if for none."""
        entry = self.manifest.engines[engine]
        lowered = [entry.lowered[kind] for kind in kinds if kind in entry.lowered]
        return self.file(lowered[0] if lowered else entry.graph)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.manifest.files.values())

    def embeddings(self) -> Embeddings:
        return Embeddings(self.path, self.manifest.embeddings)

    def tiler(self) -> Tiler:
        """What turns pictures into tiles, places and visual tokens."""
        tiling, image = self.manifest.tiling, self.manifest.image
        newline = None
        if isinstance(tiling, AnyRes):
            newline = self._vector(tiling.newline, self.manifest.decoder.width)
        return tiler(tiling, (image.height, image.width), newline)

    def instruction(self) -> Instruction | None:
        """What turns a prompt's text into the connector's own token ids, where it reads any."""
        settings = self.manifest.prompt.instruction
        if settings is None:
            return None
        return Instruction(Tokenizer(self.file(settings.tokenizer)), settings.max_tokens)

    def _vector(self, name: str, width: int) -> np.ndarray:
        """float32 [width] from a file of the bundle."""
        try:
            array = np.load(self.file(name), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BundleDamaged(self.path, f"{name} is not a vector ({error})") from error
        if array.shape != (width,) or array.dtype != np.float32 or not np.isfinite(array).all():
            found = f"{array.dtype} {list(array.shape)}"
            raise BundleDamaged(
                self.path, f"{name} is {found} instead of {width} finite numbers in float32"
            )
        return array

    def _check_names(self) -> None:
        manifest = self.manifest
        graphs = [g for e in manifest.engines.values() for g in (e.graph, *e.lowered.values())]
        tables = (manifest.embeddings.file, manifest.embeddings.scales)
        newline = manifest.tiling.newline if isinstance(manifest.tiling, AnyRes) else None
        prompt = manifest.prompt
        texts = (prompt.chat_template, prompt.instruction and prompt.instruction.tokenizer)
        for name in (*graphs, *tables, newline, *texts, "tokenizer.json"):
            if name is not None and name not in manifest.files:
                raise BundleDamaged(self.path, f"{NAME} lists no file {name}")
        for name in manifest.files:
            # A manifest may come from anywhere: its files are inside the bundle, nowhere else.
            if Path(name).name != name:
                raise BundleDamaged(self.path, f"{NAME} names a file outside the bundle: {name}")
        # A model that attends to pictures may do without a connector.
        wanted = {"vision", "llm", "connector" if manifest.decoder.media is None else "media_kv"}
        if manifest.decoder.start_token_id is not None:
            wanted |= {"llm_encoder"}
        if missing := wanted - manifest.engines.keys():
            raise BundleDamaged(self.path, f"{NAME} lists no engine {', '.join(sorted(missing))}")

    def _check_shapes(self) -> None:
        """Do the settings agree with the engines' own interfaces? A disagreement would show as an
        engine's error about some dimension, or not at all."""
        manifest = self.manifest
        specs = {
            (name, spec.name): spec
            for name, entry in manifest.engines.items()
            for spec in (*entry.inputs, *entry.outputs)
        }
        shapes = {key: spec.shape for key, spec in specs.items()}
        decoder, image = manifest.decoder, manifest.image
        caches = sum(1 for name, spec in shapes if name == "llm" and spec.startswith("past.key."))
        tokens = manifest.tiling.tile_tokens
        expected: dict[tuple[str, str], tuple[int | str, ...]] = {
            ("vision", "pixel_values"): ("tiles", 3, image.height, image.width),
            ("llm", "inputs_embeds"): ("batch", "sequence", decoder.width),
            ("llm", "logits"): ("batch", "asked", decoder.vocab_size),
            ("llm", "past.key.0"): ("batch", decoder.kv_heads, "capacity", decoder.head_dim),
        }
        if decoder.media is None:
            expected["connector", "image_features"] = ("tiles", tokens, decoder.width)
        else:
            expected |= {("media_kv", spec.name): spec.shape for spec in decoder.media.arrays()}
        for spec in decoder.cross():
            expected["llm_encoder", spec.name] = expected["llm", spec.name] = spec.shape
        if manifest.prompt.instruction is not None:
            expected["connector", "instruction_ids"] = ("tiles", "instruction")
        for (engine, name), shape in expected.items():
            found = shapes.get((engine, name))
            if found != shape:
                why = f"{NAME}: {engine}'s {name} is {found}, its settings say {shape}"
                raise BundleDamaged(self.path, why)
        tile, tiling = (image.height, image.width), manifest.tiling
        for size in tiling.resolutions if isinstance(tiling, AnyRes) else ():
            if size[0] % tile[0] or size[1] % tile[1]:
                why = f"{NAME}: resolution {list(size)} is not whole tiles of {list(tile)} pixels"
                raise BundleDamaged(self.path, why)
        dtype = specs["llm", "past.key.0"].dtype
        if dtype != decoder.cache_dtype:
            why = f"{NAME}: llm's cache is {dtype}, its settings say {decoder.cache_dtype}"
            raise BundleDamaged(self.path, why)
        if caches != decoder.layers:
            why = f"{NAME}: llm has {caches} caches, its settings say {decoder.layers} layers"
            raise BundleDamaged(self.path, why)

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


def _mapped(file: Path) -> np.ndarray:
    """As a plain array over the mapped file: indexing a `memmap` costs a token 50 us more."""
    return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))


class Embeddings:
    """The token table, read row by row from the mapped file."""

    def __init__(self, folder: Path, settings: EmbeddingSettings) -> None:
        try:
            self._table = _mapped(folder / settings.file)
            self._scales = None if settings.scales is None else _mapped(folder / settings.scales)
        except (ValueError, OSError, EOFError) as error:
            raise BundleDamaged(folder, f"{settings.file} is not a table ({error})") from error
        wanted = "f" if settings.scales is None else "i"
        if self._table.ndim != 2 or self._table.dtype.kind != wanted:
            found = f"{self._table.dtype} {list(self._table.shape)}"
            raise BundleDamaged(folder, f"{settings.file} is {found}, not what its settings say")

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, width] of token ids int64 [n].

        Raises:
            PromptError: an id has no row (a special token the model was never given one for).
        """
        self._check(int(ids.max(initial=0)))
        rows = self._table[ids]
        if self._scales is None:
            return np.asarray(rows, dtype=np.float32)
        scales = self._scales[ids]  # [n, blocks]
        blocks = rows.reshape(*scales.shape, -1).astype(np.float32)
        return (blocks * scales[..., None]).reshape(rows.shape)

    def row(self, token_id: int) -> np.ndarray:
        """float32 [width] of one token, not to be written to: half the cost of `rows`, which see."""
        self._check(token_id)
        row = self._table[token_id]
        if self._scales is None:
            return np.asarray(row, dtype=np.float32)
        scales = self._scales[token_id]  # [blocks]
        return (row.reshape(len(scales), -1) * scales[:, None]).reshape(-1)

    def _check(self, token_id: int) -> None:
        if token_id >= len(self._table):
            raise PromptError(
                f"token {token_id} of the prompt has no row in the model's table of {len(self._table)}"
            )
