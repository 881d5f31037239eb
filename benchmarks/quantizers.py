"""Our quantization beside ONNX Runtime's own and NNCF's: the same graphs, calibrated on the same data.

    python -m vlm_edge.benchmarks.quantizers [CHECKPOINT] --work DIR [--nncf-python PYTHON]

All start from the full-precision graphs that `vlm export` writes (of the demo model if no checkpoint is
given), calibrate on the calibration set without what it holds out, and are measured on what it holds
out: vision and connector by their features, the language model by the logits of a prompt's last
positions. Times are of one picture or prompt, batch 1, every subject once a round.

DIR keeps bundles and quantized models; what is there is used again, so a second call with --runs measures
times alone. PYTHON is one that has openvino and nncf (`quantizers_nncf.py`):

    python -m venv nncf && nncf/bin/pip install openvino==2026.4.1 nncf==3.4.0
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlm_edge.benchmarks import machine
from vlm_edge.benchmarks.quantizers_subjects import (
    NncfWorker,
    Row,
    Subject,
    Task,
    subjects,
    tasks,
)
from vlm_edge.benchmarks.schema import spread
from vlm_edge.benchmarks.table import number
from vlm_edge.calibration import data as calibration_data
from vlm_edge.calibration.divergence import divergence
from vlm_edge.calibration.ranges import feature_error

BUNDLES: dict[str, tuple[str, ...]] = {"fp32": (), "int8": ("--int8",), "int4": ("--int4",)}
console = Console()


def export(checkpoint: str | None, work: Path, calibration: Path | None) -> dict[str, Path]:
    """The checkpoint's bundles in each precision, by the command line as a user has it."""
    for name, flags in BUNDLES.items():
        if (work / name / "manifest.json").is_file():
            continue
        arguments = [*([] if checkpoint is None else [checkpoint]), *flags, "-o", str(work / name)]
        if calibration is not None and flags:
            arguments += ["--calibration-images", str(calibration)]
        code = "from vlm_edge.cli.main import main; main()"
        subprocess.run([sys.executable, "-c", code, "export", *arguments], check=True)
    return {name: work / name for name in BUNDLES}


def errors(
    task: Task, found: Iterable[np.ndarray], expected: Sequence[np.ndarray]
) -> dict[str, float]:
    """Of features their cosine and relative error; of logits KL divergence (nats a token) from full
    precision and the share of positions with the same most likely token."""
    pairs = zip(found, expected, strict=True)
    if task.kind == "features":
        error = feature_error(pairs)
        return {"cosine": error.cosine, "relative_error": error.relative}
    return asdict(divergence(pairs))


def measure(
    task: Task, measured: Iterable[tuple[Row, Subject]], runs: int, warmup: int = 2
) -> list[Row]:
    """Errors of every subject on the held-out items, then times in rounds; the first subject is full
    precision and the reference."""
    rows: list[Row] = []
    timed: list[tuple[Subject, list[float]]] = []
    expected: list[np.ndarray] = []
    for row, subject in measured:
        console.print(f"{task.part}: {row.tool}, {row.recipe} ({row.math})", style="dim")
        found = [_kept(subject, index) for index in task.held_out]
        expected = expected or found
        row.error = errors(task, found, expected)
        rows.append(row)
        timed.append((subject, []))
    longest = max(task.held_out, key=lambda i: sum(v.size for v in task.feeds(i).values()))
    rounds = warmup + runs if runs else 0
    for number_ in track(range(rounds), f"time {task.part}", console=console, transient=True):
        for subject, times in timed:
            # The quicker of two: after the others the first may find its threads on one core.
            spent = min(subject.run(longest, keep=False)[0] for _ in range(2))
            if number_ >= warmup:
                times.append(spent)
    for row, (_, times) in zip(rows, timed, strict=True):
        row.ms = spread("ms", times)
    return rows


def _kept(subject: Subject, index: int) -> np.ndarray:
    _, output = subject.run(index, keep=True)
    assert output is not None
    return output


# -- report -------------------------------------------------------------------------------------


def table(task: Task, rows: Sequence[Row]) -> Table:
    """One line a subject; speed as the ratio to our full precision too."""
    made = Table(
        title=f"{task.part}: {len(task.held_out)} held out of {task.count}", title_justify="left"
    )
    heads = ("cosine", "rel. error") if task.kind == "features" else ("KL, nats", "same top %")
    for head in ("quantizer", "recipe", "float math", "MB", "made in s", *heads, "ms", "speed"):
        made.add_column(head, justify="left" if head in ("quantizer", "recipe") else "right")
    first = rows[0].ms
    for row in rows:
        if task.kind == "features":
            cells = [f"{row.error['cosine']:.5f}", f"{row.error['relative_error']:.4f}"]
        else:
            cells = [f"{row.error['kl']:.4f}", f"{100 * row.error['top1_agreement']:.1f}"]
        times = ["-", "-"]
        if row.ms is not None and first is not None:
            times = [number(row.ms.median), f"{first.median / row.ms.median:.2f}x"]
        made.add_row(
            row.tool, row.recipe, row.math, number(row.size_mb), number(row.made_s), *cells, *times
        )
    return made


@click.command(help=__doc__)
@click.argument("checkpoint", required=False)
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--nncf-python", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A Python with openvino and nncf; without it these are left out.")  # fmt: skip
@click.option("--calibration-images", "calibration", type=click.Path(path_type=Path))
@click.option("--part", "parts", multiple=True, type=click.Choice(["vision", "connector", "llm"]),
              help="Only these; may be given several times.")  # fmt: skip
@click.option("--runs", default=15, show_default=True, type=click.IntRange(min=0))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    checkpoint: str | None,
    work: Path,
    nncf_python: Path | None,
    calibration: Path | None,
    parts: tuple[str, ...],
    runs: int,
    json_file: Path | None,
) -> None:
    logging.disable(logging.INFO)  # ONNX Runtime's quantizers report every node
    work.mkdir(parents=True, exist_ok=True)
    bundles = export(checkpoint, work, calibration)
    data = calibration_data.load(calibration)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "data": data.sha256,
        "runs": runs,
        "parts": {},
    }
    with contextlib.ExitStack() as stack:
        worker = None if nncf_python is None else NncfWorker(nncf_python)
        if worker is not None:
            stack.callback(worker.close)
            report["versions"] |= {k: worker.facts[k] for k in ("openvino", "nncf")}
        for task in tasks(bundles["fp32"], data):
            if parts and task.part not in parts:
                continue
            rows = measure(task, subjects(task, bundles, work, worker), runs)
            console.print(table(task, rows))
            report["parts"][task.part] = [asdict(row) for row in rows]
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
