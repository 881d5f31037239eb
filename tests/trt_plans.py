"""A bundle on the stand-ins for CUDA and TensorRT: its plans name the graphs that `vlm build` would build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_trt
import pytest
from fake_cuda import FakeGpu

from vlm_edge import VLM
from vlm_edge.export.lowering import tensorrt, trt10
from vlm_edge.export.tensorrt.build import BuildOptions, profile_of
from vlm_edge.runtime import cuda, trt
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.plans import PlanKey, PlanStore, graph_digest, host_platform

VERSIONS = {"tensorrt": "10.16.0", "tensorrt-rtx": "1.7.1", "tensorrt-10.3": "10.3.0"}


@dataclass
class Machine:
    """What a test has in place of a GPU and TensorRT.

    Attributes:
        kind: as `fake_trt.module` takes it.
        root: folder for plans.
    """

    kind: str
    gpu: FakeGpu
    root: Path

    @property
    def device(self) -> str:
        return "tensorrt-rtx" if self.kind == "tensorrt-rtx" else "tensorrt"

    def key(self, bundle: Bundle, engine: str, profile: Any = None) -> PlanKey:
        return PlanKey(
            f"{self.device} {VERSIONS[self.kind]}",
            "{}.{}".format(*self.gpu.capability),
            host_platform(),
            graph_digest(bundle.manifest.engines[engine], bundle.manifest.files),
            profile,
        )

    def build(
        self, folder: Path, refusal: str | None = None, profiles: int | None = None, **options: Any
    ) -> Path:
        """Plans of a bundle, in a folder of their own.

        Args:
            refusal: what TensorRT says instead of taking them.
            profiles: how many of each engine's are kept; None: all.
            options: as `vlm build` has them.
        """
        bundle = Bundle(folder, check=False)
        profile = profile_of(bundle.manifest, BuildOptions(**{"float_type": "float32", **options}))
        place = self.root / f"{folder.name}-{self.kind}-{len(list(self.root.iterdir()))}"
        lower = trt10.lower if self.kind == "tensorrt-10.3" else tensorrt.lower
        picture = trt.picture_positions(bundle.manifest.tiling)
        for name, entry in bundle.manifest.engines.items():
            graphs = place / "graphs" / name
            graphs.mkdir(parents=True)
            graph = lower(bundle.file(entry.graph), graphs, profile)
            for link in [path for path in graphs.iterdir() if path.is_symlink()]:
                weights = link.resolve()  # ONNX Runtime reads none through a link
                link.unlink()
                link.hardlink_to(weights)
            shapes = tensorrt.profiles(entry.inputs, profile, picture)
            plan = fake_trt.write_plan(place / "new.plan", graph, shapes[:profiles], refusal)
            PlanStore(place).add(name, self.key(bundle, name, profile), plan, 1.0)
        return place

    def load(self, folder: Path, **options: Any) -> VLM:
        """The bundle on this machine; `options` as `vlm build` has them."""
        plans = self.build(folder, **options)
        return VLM.load(folder, device=self.device, plans=plans, check=False)


def machine(
    monkeypatch: pytest.MonkeyPatch, root: Path, kind: str = "tensorrt", **gpu: Any
) -> Machine:
    """Put the stand-ins where the real modules are loaded; `gpu` as `FakeGpu` takes it."""
    driver = FakeGpu(**gpu)
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    module = fake_trt.module(driver, kind, VERSIONS[kind])
    monkeypatch.setattr(trt, "load_module", lambda device: module)
    return Machine(kind, driver, root)
