"""Tiny bundles of every family and what each is asked, made on the machine that has torch.

`python bundles.py FOLDER`: FOLDER/<case>-<precision>/, FOLDER/pictures/ and FOLDER/questions.json, which
`ask.py` reads on every machine. Checkpoints are those of the tests (tests/tiny*.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from families import build_case
from pictures import write_pictures

from vlm_edge.export import layer_times, static
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan

ALL = ("fp32", "int8", "int4")
# case -> the precisions it is exported with. Many of the first are here because the tests that run on the
# other machine ask for them.
CASES: dict[str, tuple[str, ...]] = {
    "clip-llama": ALL,
    "clip-llama-v4": ("fp32",),
    "clip-llama-native": ("fp32", "int4"),
    "clip-llama-biases": ("fp32",),
    "clip-mistral-window": ("fp32",),
    "clip-mistral-v4": ("fp32",),
    "clip-padded-square": ("fp32",),
    "siglip-qwen2": ("fp32", "int4"),
    "siglip-qwen2-v4": ("fp32",),
    "siglip-llama-yarn-v4": ("fp32",),
    "dinov2-llama": ALL,
    "next-clip-mistral": ("fp32",),
    "smolvlm": ALL,
    "blip2-opt": ALL,
    "blip2-t5": ALL,
    "instructblip-t5": ("fp32",),
    "idefics": ALL,
    "llama": ("fp32",),
    "mllama": ALL,
}
QUESTION = "what is the color?"
QUESTIONS = [[QUESTION, ["wide.png"]], [QUESTION, ["rotated.jpg"]], [QUESTION, []]]


def main(folder: Path) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # At these sizes INT8 gains nothing: as in the tests, layers are called faster, so that all of them
    # are quantized, and the error of random weights is allowed.
    layer_times.measure = lambda *_: layer_times.Times(2.0, 1.0)  # type: ignore[assignment]  # as tests/conftest.py does
    static.MAX_ERROR = 10.0
    (folder / "pictures").mkdir(parents=True)
    write_pictures(folder / "pictures")
    with tempfile.TemporaryDirectory() as work:
        for case, precisions in CASES.items():
            checkpoint = build_case(case, Path(work) / case)
            for precision in precisions:
                plan = PrecisionPlan.uniform(precision)
                export(checkpoint, folder / f"{case}-{precision}", precision=plan)
    names = [f"{case}-{precision}" for case, many in CASES.items() for precision in many]
    text = json.dumps({"bundles": names, "questions": QUESTIONS}, indent=1)
    (folder / "questions.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
