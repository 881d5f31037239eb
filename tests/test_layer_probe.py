"""The probe that compares the vision tower's layers."""

from __future__ import annotations

import torch

from vlm_edge.training.data import COLOURS, SHAPES
from vlm_edge.training.layer_probe import probe, with_one_shape


def test_pictures_tell_one_shape_and_one_colour():
    chosen = with_one_shape(60)
    assert 40 < len(chosen) <= 60
    for picture, told in chosen:
        answers = {a for q, a in picture.open if "background" not in q}
        shape, colour = SHAPES[told["shape"]], tuple(COLOURS)[told["colour"]]
        assert {a for a in answers if a in SHAPES} == {shape}
        assert {a for a in answers if a in COLOURS} == {colour}


def test_a_probe_reads_what_one_token_says_and_nothing_from_noise():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (300,), generator=generator)
    noise = torch.randn(300, 6, 12, generator=generator)
    torch.manual_seed(0)
    blind = probe(noise, truth, 3, 120)
    telling = noise.clone()
    telling[torch.arange(300), 2, truth] += 8  # one token, one channel an answer
    torch.manual_seed(0)
    seeing = probe(telling, truth, 3, 120)
    assert blind["accuracy"] < 0.6
    assert seeing["accuracy"] > 0.9
    assert seeing["loss"] < blind["loss"]
