"""Where a checkpoint comes from: a folder, the Hugging Face Hub, or a built-in demo model."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_edge.errors import CheckpointMissing, ExtraMissing
from vlm_edge.export.checkpoint import indexed_files

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
INDEX = "model.safetensors.index.json"
# All an export reads besides the weights; the weights follow once the index names them.
SMALL_FILES = [
    "config.json", "generation_config.json", INDEX, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
]  # fmt: skip


def resolve(
    source: str | Path | None, revision: str | None = None, arch: str | None = None
) -> tuple[Path, str]:
    """The checkpoint's folder, fetched if need be, and a name for it without any path of the machine.

    Args:
        source: a folder, a Hub name, or None for the demo model.
        revision: of a Hub repository.
        arch: which demo model; None is the LLaVA. A checkpoint says itself what it is.

    Raises:
        CheckpointMissing: there is no such folder or repository, or the Hub cannot be reached.
        DemoPartsMissing: no source, and the demo model's packages are not installed.
        SettingError: no source, and the architecture has no demo model.
    """
    if source is None:
        from vlm_edge.export import demo

        return demo.assemble(arch or demo.DEFAULT), "vlm-edge demo"
    folder = Path(source)
    if folder.is_dir():
        return folder, folder.resolve().name
    if isinstance(source, str) and HUB_NAME.fullmatch(source):
        return _fetch(source, revision), source
    raise CheckpointMissing(
        source, "there is no such folder, and it is no Hub name such as org/model"
    )


def _fetch(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ExtraMissing("export", "huggingface_hub", "fetching from the Hub") from error
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES))
        index = folder / INDEX
        if index.is_file():
            weights = indexed_files(index)
        else:
            weights = ["model.safetensors"]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES + weights)
        )
    except RevisionNotFoundError as error:
        raise CheckpointMissing(name, f"the Hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointMissing(
            name, "the Hub has no such repository, or it is private (log in with `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointMissing(
            name, "the Hub cannot be reached and the local cache does not hold it; give a folder"
        ) from error
    except CheckpointMissing:
        raise
    except Exception as error:  # the HTTP client's own errors, which differ between hub versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointMissing(name, f"the Hub did not give it ({reason})") from error
