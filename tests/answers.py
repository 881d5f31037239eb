"""Helpers of the VLM tests."""

from __future__ import annotations

from typing import Any

from vlm_edge import VLM

QUESTION = "what is the color?"
PLACES = 9  # visual tokens of an image in clip-llama


def greedy(model: VLM, *args: Any, **settings: Any) -> list[int]:
    settings = {"max_new_tokens": 12, "ignore_eos": True} | settings
    return model.generate(*args, **settings).token_ids


def counted(model: VLM, name: str) -> list[int]:
    """Grows by one for each run of the engine `name`."""
    engine, runs = getattr(model, name), []
    original = engine.run

    def run(feeds: Any) -> Any:
        runs.append(len(next(iter(feeds.values()))))
        return original(feeds)

    engine.run = run
    return runs
