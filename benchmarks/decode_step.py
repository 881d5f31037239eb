"""What Python takes of a decode step: the time outside the engine's run, over the whole step.

Outside is all that stands between two runs of the graph: the next token's choice, its text, its row of
the embedding table, the inputs, and now and then a larger cache. Steps are those of `VLM.stream` on one
text prompt; the first token, which belongs to the prefill, and the warm-up run do not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vlm_edge.benchmarks.filler import fill
from vlm_edge.errors import SettingError
from vlm_edge.runtime.encoder_decoder import EncoderDecoder
from vlm_edge.runtime.ort_decoder import OrtDecoder
from vlm_edge.runtime.vlm import VLM

QUESTION = "Tell me a long story about the sea."


@dataclass(frozen=True)
class Steps:
    """One answer's decode steps, mean milliseconds of one.

    Attributes:
        whole_ms: from one token's text to the next one's.
        engine_ms: of this, inside the engine's run.
        growths: times that the cache was replaced by a larger one.
    """

    whole_ms: float
    engine_ms: float
    growths: int

    @property
    def python_us(self) -> float:
        return 1000 * (self.whole_ms - self.engine_ms)

    @property
    def share(self) -> float:
        """Python's, 0 to 1."""
        return 1 - self.engine_ms / self.whole_ms


class _Timed:
    """An InferenceSession whose runs are timed."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        begin = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - begin


def measure(
    bundle: Path,
    new_tokens: int,
    runs: int,
    prompt_tokens: int | None = None,
    threads: int | None = None,
    warmup: int = 1,
) -> list[Steps]:
    """Decode steps of `runs` answers of `new_tokens` tokens each; `prompt_tokens` as in `vlm bench`.

    Raises:
        SettingError: fewer than 2 new tokens, or no prompt of that many tokens.
        BundleError: the bundle does not load.
    """
    if new_tokens < 2:
        raise SettingError(f"new_tokens = {new_tokens}; the first is the prefill's, so at least 2")
    with VLM.load(bundle, threads=threads) as vlm:
        decoder = vlm.decoder
        if isinstance(decoder, EncoderDecoder):
            decoder = decoder.decoder
        assert isinstance(decoder, OrtDecoder)
        decoder._session = timed = _Timed(decoder._session)
        template = vlm.template is not None
        prompt = QUESTION
        if prompt_tokens is not None:
            prompt = fill(
                prompt,
                prompt_tokens,
                lambda text: len(vlm.build_prompt(text, (), template).token_ids),
            )
        found = []
        for run in range(warmup + runs):
            decoder.clear()  # so that every run has the growths that a first answer has
            stream = vlm.stream(prompt, (), template, max_new_tokens=new_tokens, ignore_eos=True)
            pieces = stream._pieces  # one a token, empty ones too
            next(pieces)
            capacities = {decoder.capacity}
            timed.seconds, begin = 0.0, time.perf_counter()
            for _ in pieces:
                capacities.add(decoder.capacity)
            whole = time.perf_counter() - begin
            if run >= warmup:
                steps = new_tokens - 1
                growths = len(capacities) - 1
                found.append(Steps(1000 * whole / steps, 1000 * timed.seconds / steps, growths))
    return found


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Fill the prompt to this many.")
@click.option("--new-tokens", default=128, show_default=True, type=click.IntRange(min=2))
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1))
def main(
    bundles: tuple[Path, ...],
    prompt_tokens: int | None,
    new_tokens: int,
    runs: int,
    threads: int | None,
) -> None:
    table = Table("bundle", "step, ms", "engine, ms", "Python, us", "Python, %", "cache grew")
    for bundle in bundles:
        steps = measure(bundle, new_tokens, runs, prompt_tokens, threads)
        table.add_row(
            bundle.resolve().name,
            f"{median(s.whole_ms for s in steps):.3f}",
            f"{median(s.engine_ms for s in steps):.3f}",
            f"{median(s.python_us for s in steps):.0f}",
            f"{100 * median(s.share for s in steps):.2f}",
            f"{steps[-1].growths} times",
        )
    console = Console()
    console.print(table)
    console.print(f"means over {new_tokens - 1} steps, medians of {runs} answers")


if __name__ == "__main__":
    main()
