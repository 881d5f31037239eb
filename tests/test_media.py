"""Who sees which picture: the masks of IdeficsProcessor and of Flamingo's paper."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_edge.runtime.feeds import MASKED
from vlm_edge.runtime.manifest import MediaRule, MediaSettings
from vlm_edge.runtime.media import ALIKE, media, position_keys, seen

IMAGE, END, WORD = 7, 2, 5
TOKENS = st.lists(st.sampled_from([IMAGE, END, WORD, 6]), min_size=1, max_size=24)


def rule(name: MediaRule, end: int | None = None) -> MediaSettings:
    return MediaSettings(layers=2, kv_heads=3, head_dim=4, rule=name, end_token_id=end)


@settings(max_examples=300, deadline=None)  # the first imports torch
@given(TOKENS)
def test_idefics_masks(tokens: list[int]) -> None:
    import torch
    from transformers.models.idefics import processing_idefics as idefics

    class Tokenizer:
        eos_token_id = END

        def convert_tokens_to_ids(self, _token: str) -> int:
            return IMAGE

    count = tokens.count(IMAGE)
    ids = torch.tensor([tokens])
    latest, _ = idefics.image_attention_mask_for_packed_input_ids(ids, Tokenizer(), "pt")
    expected = idefics.incremental_to_binary_attention_mask(latest, "pt", num_classes=max(1, count))
    found = seen(np.array(tokens), IMAGE, rule("immediate", END), count)
    np.testing.assert_array_equal(found, expected[0].numpy()[:, :count].astype(bool))


@given(TOKENS)
def test_flamingo_masks(tokens: list[int]) -> None:
    """phi(l), the last picture at or before position l (arXiv 2204.14198, section 3.1.3)."""
    ids, count = np.array(tokens), tokens.count(IMAGE)
    for position in range(len(tokens)):
        phi = tokens[: position + 1].count(IMAGE)
        one = seen(ids, IMAGE, rule("immediate"), count)[position]
        every = seen(ids, IMAGE, rule("previous"), count)[position]
        assert np.flatnonzero(one).tolist() == ([phi - 1] if phi else [])
        assert np.flatnonzero(every).tolist() == list(range(phi))


@settings(max_examples=300, deadline=None)
@given(TOKENS)
def test_mllama_masks(tokens: list[int]) -> None:
    from transformers.models.mllama import processing_mllama as mllama

    count, ids = tokens.count(IMAGE), np.array(tokens)
    found = seen(ids, IMAGE, rule("mllama"), count)
    spans = mllama.get_cross_attention_token_mask(tokens, IMAGE)
    expected = mllama.convert_sparse_cross_attention_mask_to_dense(
        [spans], [[1] * count], 1, len(tokens)
    )
    np.testing.assert_array_equal(found, expected[0, :, :, 0].astype(bool))


def test_mllama_leaves_empty_tiles_to_who_sees_nothing() -> None:
    found = media(np.array([WORD, IMAGE]), IMAGE, rule("mllama"), pictures(4), [3])
    assert found.mask.tolist() == [[0] * 4, [0, 0, 0, MASKED]]
    assert found.gate.tolist() == [[1, 0], [1, 1]]
    alone = media(np.array([WORD, WORD]), IMAGE, rule("mllama"), [])
    assert alone.gate.tolist() == [[0, 0]] * 2


def pictures(*tokens: int) -> list[dict[str, np.ndarray]]:
    names = [spec.name for spec in rule("immediate").arrays()]
    return [
        {name: np.full((3, count, 4), index + 1, np.float32) for name in names}
        for index, count in enumerate(tokens)
    ]


def test_pictures_lie_one_after_another() -> None:
    ids = np.array([WORD, IMAGE, WORD, IMAGE, WORD])
    found = media(ids, IMAGE, rule("immediate"), pictures(2, 3))
    assert found.arrays["media.value.1"][0, 0, :, 0].tolist() == [1, 1, 2, 2, 2]
    open_, shut = np.float32(0), MASKED
    assert found.mask.tolist() == [
        [shut] * 5, *[[open_] * 2 + [shut] * 3] * 2, *[[shut] * 2 + [open_] * 3] * 2
    ]  # fmt: skip
    assert found.gate.tolist() == [[0, 1]] + [[1, 1]] * 4
    assert found.of(slice(3, None)).mask.tolist() == found.mask[3:].tolist()


def test_a_prompt_without_pictures_sees_nothing() -> None:
    for name in ("immediate", "previous"):
        found = media(np.array([WORD, WORD]), IMAGE, rule(name), [])
        assert found.arrays["media.key.0"].shape == (1, 3, 1, 4)
        assert (found.mask == MASKED).all()
        assert found.gate.tolist() == [[0, 1]] * 2


def test_text_before_any_picture_sees_all_alike_under_previous() -> None:
    found = media(np.array([WORD, IMAGE]), IMAGE, rule("previous"), pictures(2))
    assert (found.mask[0] == ALIKE).all()  # a mean, whatever the scores
    assert (np.float32(1e4) + ALIKE == ALIKE) and ALIKE > MASKED
    assert found.gate.tolist() == [[1, 1]] * 2


@pytest.mark.parametrize("name", ["immediate", "previous"])
def test_position_keys_tell_what_differs(name: MediaRule) -> None:
    ids = np.array([WORD, IMAGE, WORD, IMAGE, WORD])
    keys = position_keys(ids, IMAGE, rule(name), ["a", "b"])
    assert len(set(keys[1:].tolist())) == 4
    other = position_keys(ids, IMAGE, rule(name), ["a", "c"])
    same = keys == other
    # A later picture changes text before the first one only where that is a mean over all of them.
    assert same.tolist() == [name == "immediate", True, True, False, False]
    longer = position_keys(np.append(ids[:3], WORD), IMAGE, rule(name), ["a"])
    assert (longer[1:3] == keys[1:3]).all()
    assert all(first != second for first, second in pairwise(keys.tolist()))
