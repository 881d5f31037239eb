"""Visual tokens in their places of the embedded prompt, and prefixes shared with the cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge.errors import VisualTokenMismatch
from vlm_edge.runtime.splice import prefix_keys, shared_prefix, splice

IMAGE = 7
TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)


class Rows:
    """An embedding table that has no row for ids beyond it."""

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return TABLE[ids]


def features(count: int, start: float) -> np.ndarray:
    return np.full((count, 2), start, np.float32) + np.arange(count, dtype=np.float32)[:, None] / 10


def test_images_take_their_places_in_order() -> None:
    ids = np.array([1, IMAGE, IMAGE, 2, IMAGE, 3])
    found = splice(ids, IMAGE, Rows(), [features(2, 100), features(1, 200)])
    expected = [TABLE[1], [100, 100], [100.1, 100.1], TABLE[2], [200, 200], TABLE[3]]
    assert found.shape == (1, 6, 2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_the_image_token_needs_no_row() -> None:
    ids = np.array([1, 99_999])
    np.testing.assert_array_equal(splice(ids, 99_999, Rows(), [features(1, 5)])[0, 1], [5, 5])


def test_no_image() -> None:
    np.testing.assert_array_equal(splice(np.array([4, 2]), IMAGE, Rows(), [])[0], TABLE[[4, 2]])


@pytest.mark.parametrize(
    ("places", "counts", "said"),
    [(1, [2], "1 visual places, expected 2 visual tokens"), (3, [1, 1], r"3 visual.*2 = 1 \+ 1"), (1, [], "expected 0 visual tokens"), (0, [4], "0 visual")],
)  # fmt: skip
def test_counts_must_agree(places: int, counts: list[int], said: str) -> None:
    ids = np.array([1, *[IMAGE] * places, 2])
    with pytest.raises(VisualTokenMismatch, match=said):
        splice(ids, IMAGE, Rows(), [features(count, 0) for count in counts])


A, B = "a" * 64, "b" * 64


def keys(ids: list[int], *images: tuple[str, int]) -> np.ndarray:
    return prefix_keys(np.array(ids), IMAGE, images)


def test_text_keeps_its_ids_and_images_are_told_apart() -> None:
    first = keys([1, IMAGE, IMAGE, 2], (A, 2))
    assert first[[0, 3]].tolist() == [1, 2]
    assert (first[[1, 2]] < 0).all()
    np.testing.assert_array_equal(first, keys([1, IMAGE, IMAGE, 2], (A, 2)))
    assert (first != keys([1, IMAGE, IMAGE, 2], (B, 2))).tolist() == [False, True, True, False]
    assert shared_prefix(first, keys([1, IMAGE, IMAGE, 2, 9], (A, 2))) == 4
    assert shared_prefix(first, keys([1, IMAGE, IMAGE, 2, 9], (B, 2))) == 1
    two = keys([IMAGE, IMAGE, IMAGE], (A, 1), (B, 2))
    assert two[0] == first[1]
    assert two[1] == two[2] == keys([IMAGE], (B, 1))[0]


def test_digests_of_any_value_fit() -> None:
    """60 bits of it: -1 - (2^60 - 1) is an int64."""
    assert keys([IMAGE], ("f" * 64, 1))[0] == -(2**60)
    assert keys([IMAGE], ("0" * 64, 1))[0] == -1


SHORT = st.lists(st.integers(0, 2), max_size=8)


@given(cached=SHORT, wanted=SHORT.filter(bool))
def test_shared_prefix(cached: list[int], wanted: list[int]) -> None:
    found = shared_prefix(np.array(cached, np.int64), np.array(wanted, np.int64))
    assert 0 <= found < len(wanted)  # one position at least is computed: its logits are wanted
    assert cached[:found] == wanted[:found]
    if found < min(len(cached), len(wanted) - 1):
        assert cached[found] != wanted[found]
