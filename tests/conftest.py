"""Checkpoints, references and bundles the tests share, each made once per session when first asked for.

torch and transformers are imported inside the fixtures: tests that need neither run without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pictures import write_pictures

pytest_plugins = ["architecture_table"]

if TYPE_CHECKING:
    from reference import Reference

    from vlm_edge import VLM


class Cache(dict[Any, Any]):
    """Calls `make` for a key that is asked for the first time."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *key: Any) -> Any:
        if key not in self:
            self[key] = self.make(*key)
        return self[key]


@pytest.fixture(scope="session", autouse=True)
def every_layer_is_quantized() -> Iterator[None]:
    """At these sizes INT8 is hardly faster, and random weights err more than trained ones: so that
    tests of INT8 see the same on every machine, layers are called faster and the default budget is
    large. Tests of the choice itself (test_mixed.py) set their own."""
    from vlm_edge.export import layer_times, static

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_times, "measure", lambda *_: layer_times.Times(2.0, 1.0))
        patch.setattr(static, "MAX_ERROR", 10.0)
        yield


@pytest.fixture(autouse=True)
def calibration_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Path]:
    """Each test has a calibration cache of its own: calibration_cache() -> its folder."""
    from vlm_edge.calibration import cache

    root = Cache(lambda: tmp_path_factory.mktemp("cache"))  # made when first asked for
    monkeypatch.setattr(cache, "root", root)
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Image files by name; see pictures.SIZES."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(case) -> folder of a tiny checkpoint, of any of families.BUILDERS; do not write into it."""
    from families import build_case

    root = tmp_path_factory.mktemp("checkpoints")
    return Cache(lambda case: build_case(case, root / case))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    """reference(case) -> the checkpoint in transformers."""
    import torch
    from reference import Reference

    torch.set_num_threads(1)  # at these sizes threads only wait for each other
    return Cache(lambda case: Reference(checkpoint(case)))


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]
) -> Callable[..., Path]:
    """bundle(case, precision="fp32", cache="float32") -> folder of the exported bundle; do not write into
    it."""
    root = tmp_path_factory.mktemp("bundles")

    def export_case(case: str, precision: str, cache: Any) -> Path:
        from vlm_edge.export.pipeline import export
        from vlm_edge.export.precision import PrecisionPlan

        folder, plan = root / cache / f"{case}-{precision}", PrecisionPlan.uniform(precision)
        export(checkpoint(case), folder, precision=plan, cache_dtype=cache)
        return folder

    exported = Cache(export_case)
    return lambda case, precision="fp32", cache="float32": exported(case, precision, cache)


@pytest.fixture(scope="session")
def vlm(bundle: Callable[..., Path]) -> Callable[..., Any]:
    """vlm(case, precision="fp32") -> the bundle loaded on the CPU."""
    from vlm_edge import VLM

    return Cache(lambda *key: VLM.load(bundle(*key), device="cpu", threads=1))


@pytest.fixture
def model(bundle: Callable[..., Path]) -> Iterator[VLM]:
    """clip-llama, loaded for one test: nothing in its caches."""
    from vlm_edge import VLM

    with VLM.load(bundle("clip-llama"), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def shared(vlm: Callable[..., VLM]) -> VLM:
    """clip-llama, for tests that leave no trace."""
    return vlm("clip-llama")


@pytest.fixture
def picture(pictures: dict[str, Path]) -> Path:
    return pictures["wide.png"]
