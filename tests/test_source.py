"""Where a checkpoint comes from: a folder, or a Hub name read from the local cache without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_edge.errors import CheckpointMissing, SettingError
from vlm_edge.export import source
from vlm_edge.export.source import resolve
from vlm_edge.runtime.manifest import read_manifest

REVISION = "0123456789abcdef0123456789abcdef01234567"


def into_cache(folder: Path, home: Path, name: str) -> Path:
    """The checkpoint as huggingface_hub keeps it: blobs, and links to them by revision."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for path in (repository / "refs", repository / "blobs", snapshot):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for index, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{index:040x}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


OFFLINE = """
import json, sys
from pathlib import Path
from vlm_edge.errors import CheckpointMissing
from vlm_edge.export.pipeline import export
from vlm_edge.export.source import resolve

out, present, revision = Path(sys.argv[1]), sys.argv[2:5], sys.argv[5]
said = {}
for name in present:
    said[name] = str(export(name, out / name.replace("/", "-")).bundle)
said["by revision"] = str(resolve(present[0], revision)[0])
for name, wanted in (("acme/absent", None), (present[0], "v9")):
    try:
        export(name, out / "absent", revision=wanted)
    except CheckpointMissing as error:
        said[f"{name} {wanted}"] = str(error)
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps(said))
"""


def test_a_hub_name_is_exported_from_the_cache_offline(
    tmp_path: Path, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    cases = {
        "acme/one-file": "clip-llama",
        "acme/two_files.v4": "clip-llama-v4",
        "a/b": "clip-llama",
    }
    snapshots = [into_cache(checkpoint(c), tmp_path / "home", name) for name, c in cases.items()]
    (tmp_path / "elsewhere" / "acme" / "one-file").mkdir(parents=True)  # not where it runs
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "out"), *cases, REVISION],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    for name, case in cases.items():
        made = read_manifest(Path(said[name]))
        assert made.source.name == name  # no path of the machine
        assert made.files == read_manifest(bundle(case)).files
    assert said["by revision"] == str(snapshots[0])
    absent = said["acme/absent None"]
    assert "acme/absent" in absent
    assert "cache" in absent
    assert "acme/one-file" in said["acme/one-file v9"]
    assert all("\n" not in sentence for sentence in said.values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        name.replace("/", "-") for name in cases
    )


def test_a_folder_is_named_by_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llava-7b").mkdir()
    monkeypatch.chdir(tmp_path / "llava-7b")
    assert resolve(tmp_path / "llava-7b") == (tmp_path / "llava-7b", "llava-7b")
    assert resolve(".") == (Path("."), "llava-7b")


def test_a_folder_comes_before_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == (Path("org/model"), "model")


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "/no/such/folder",
        "a/b/c",
        "org/",
        "/model",
        "org/mo del",
        "../x",
        "",
        "org/mödel",
    ],
)
def test_what_is_neither_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(CheckpointMissing, match="no such folder, and it is no Hub name"):
            resolve(name)
    with pytest.raises(CheckpointMissing):
        resolve(Path(name) if name else Path("gone"))


@pytest.mark.parametrize(
    "name", ["org/a--b", "org/a..b", "org/model.git", "org/" + "x" * 100, "org/ends-"]
)
def test_names_that_the_hub_does_not_allow(name: str) -> None:
    """huggingface_hub refuses them before it looks anywhere."""
    with pytest.raises(CheckpointMissing) as caught:
        resolve(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def hub_errors() -> dict[str, tuple[Exception, str]]:
    from huggingface_hub import errors

    # whatever client this version of huggingface_hub speaks through
    httpx = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    request = httpx.Request("GET", "https://huggingface.co/api/models/org/model")
    answer = httpx.Response(404, request=request)
    return {
        "repository": (
            errors.RepositoryNotFoundError("gone\nlong", response=answer),
            "no such repository",
        ),
        "gated": (errors.GatedRepoError("ask\nfirst", response=answer), "private"),
        "revision": (errors.RevisionNotFoundError("gone", response=answer), "no revision v2"),
        "cache": (errors.LocalEntryNotFoundError("offline"), "cache"),
        "server": (errors.HfHubHTTPError("500\nsorry", response=answer), "500"),
        "empty": (OSError(), "did not give it"),
        "timeout": (httpx.ReadTimeout("too slow", request=request), "too slow"),
    }


@pytest.mark.parametrize(
    "kind", ["repository", "gated", "revision", "cache", "server", "empty", "timeout"]
)
def test_what_the_hub_answers_becomes_one_sentence(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    error, said = hub_errors()[kind]

    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(CheckpointMissing) as caught:
        resolve("org/model", "v2")
    assert str(caught.value).startswith("org/model: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_files_needed_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("org/model", "v2")
        asked.append(list(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/model", "v2") == (tmp_path, "org/model")
    assert asked == [source.SMALL_FILES, [*source.SMALL_FILES, "model.safetensors"]]
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    (tmp_path / source.INDEX).write_text(json.dumps({"weight_map": weights}))
    resolve("org/model", "v2")
    assert asked[-1] == [*source.SMALL_FILES, "model-1.safetensors", "model-2.safetensors"]


def test_without_a_source_there_is_a_demo_of_some_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_edge.export import demo

    monkeypatch.setattr(demo, "assemble", lambda arch: tmp_path / demo.find(arch).arch)
    assert resolve(None) == (tmp_path / "llava", "vlm-edge demo")
    assert resolve(None, arch="llava")[0].name == "llava"
    assert resolve(None, arch="blip2")[0].name == "blip2"
    with pytest.raises(SettingError, match=r"no demo model of smolvlm.*llava, blip2"):
        resolve(None, arch="smolvlm")
    assert resolve(tmp_path, arch="smolvlm")[0] == tmp_path, "a checkpoint says itself what it is"
