"""The report of `gpu.py` as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from vlm_edge.benchmarks.table import number

TIMES = {
    "image_ms": "picture, ms",
    "prefill_ms": "prefill, ms",
    "first_ms": "both, ms",
    "decode_tokens_per_s": "decode, tok/s",
}


def show(document: dict[str, Any]) -> None:
    """Print steps, answers and times."""
    console = Console(width=None if Console().is_terminal else 150)
    for table in tables(document):
        console.print(table)


def tables(document: dict[str, Any]) -> list[Table]:
    """Every table that has a row."""
    steps = document["steps"]
    made = [_steps(document)]
    answers = [step for step in steps if step["kind"] == "parity" and step["found"]]
    times = [step for step in steps if step["kind"] == "timings" and step["found"]]
    return made + ([_parity(answers)] if answers else []) + [_timings(step) for step in times]


def _steps(document: dict[str, Any]) -> Table:
    made = Table("step", "", "s", "why or what", title=_machine(document), title_justify="left")
    for step in document["steps"]:
        text = step["why"] or _brief(step)
        made.add_row(step["name"], step["status"], number(step["seconds"]), text)
    return made


def _machine(document: dict[str, Any]) -> str:
    found = [step["found"] for step in document["steps"] if step["kind"] == "environment"]
    gpu = found[0].get("gpu") if found else None
    if document["device"] == "cpu":
        return "rehearsal on the CPU: no figure below is of a GPU"
    if gpu is None:
        return f"device {document['device']}"
    return f"{gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}"


def _brief(step: dict[str, Any]) -> str:
    """The numbers of a step that has no table of its own."""
    if step["kind"] not in ("limits", "checkpoint", "bundle"):
        return ""
    return ", ".join(f"{name} {number(value)}" for name, value in step["found"].items())


def _parity(steps: list[dict[str, Any]]) -> Table:
    made = Table("answers against the CPU's", "bundle", title_justify="left")
    for heading in (
        "same tokens",
        "logit error",
        "allowed",
        "KL, nats",
        "read",
        "first other token",
    ):
        made.add_column(heading, justify="right")
    for step in steps:
        for precision, each in step["found"]["bundles"].items():
            first = each["first"]
            made.add_row(
                f"{step['model']} {step['device']}",
                precision,
                f"{each['same']} of {each['tokens']}",
                f"{each['logit_error']:.2e}",
                f"{step['found']['tolerance']:.2e}" if precision == "fp32" else "",
                f"{each['kl']:.1e}",
                f"{each['embeds_error']:.1e}",
                f"{first[0]['index']} of {first[0]['case']}" if first else "none",
            )
    return made


def _timings(step: dict[str, Any]) -> Table:
    found = step["found"]
    title = (
        f"{step['model']} on {step['device']}: {found['prompt_tokens']} prompt tokens "
        f"({found['visual_tokens']} visual), {found['new_tokens']} new; median of {found['runs']} runs"
    )
    made = Table("", title=title, title_justify="left")
    for heading in (*TIMES.values(), "GB/s", "of copy", "TFLOP/s", "of peak", "same"):
        made.add_column(heading, justify="right")
    for peer in ("eager", "compiled"):
        made.add_column(f"first token, decode: times {peer}", justify="right")
    for name, figures in found["subjects"].items():
        ratios = found["ratios"].get(name, {})
        made.add_row(
            f"transformers {name}" if name in ("eager", "compiled") else name,
            *(number(figures[key]) for key in TIMES),
            number(figures.get("decode_gb_s")),
            _share(figures.get("decode_share")),
            number(figures.get("prefill_tflops")),
            _share(figures.get("prefill_share")),
            str(found["same_tokens"].get(name, "")),
            *(_ratio(ratios.get(peer)) for peer in ("eager", "compiled")),
        )
    return made


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ratio(ratio: dict[str, float] | None) -> str:
    return f"{ratio['first_ms']:.2f}, {ratio['decode_tokens_per_s']:.2f}" if ratio else ""
