"""The decoder and its cache: however the positions come in, the logits are those of one whole prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_edge.errors import DeviceUnavailable, EngineFailure, SettingError
from vlm_edge.runtime import ort, ort_decoder
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.engine import open_engines
from vlm_edge.runtime.ort import OrtEngine
from vlm_edge.runtime.ort_decoder import CHUNK, ROOM, STEP, OrtDecoder

# default RoPE; llama3 and MQA; a window of 11; a window in one layer of two; yarn; int4 weights
CASES = [("clip-llama", "fp32"), ("clip-llama-native", "fp32"), ("clip-mistral-window", "fp32"),
         ("siglip-qwen2", "fp32"), ("siglip-llama-yarn-v4", "fp32"), ("clip-llama", "int4")]  # fmt: skip
WINDOWS = CASES[2:4]
MASKED, UNMASKED = CASES[0], CASES[2]  # attention that takes a mask, and GroupQueryAttention
# Sums of float32 in another order (kernels differ by the number of rows); logits are of order 3.
TOLERANCE = 2e-5
# In a quantized model activations are rounded to int8, and our kernels attend in float32 for a few
# queries and in bfloat16 for many: rounding differences of one unit become visible ones (of 80 steps
# against prefills: median 0.025, largest 0.059). One stale key of a hundred is off by 0.2, a position
# by 0.4.
RELATIVE_INT4 = 0.08

Open = Callable[..., OrtDecoder]


@pytest.fixture(scope="module")
def opened(bundle: Callable[..., Path]) -> Iterator[Open]:
    """opened(case, precision) -> its decoder, emptied."""
    decoders: dict[Any, OrtDecoder] = {}

    def make(*key: str) -> OrtDecoder:
        if key not in decoders:
            decoders[key] = OrtDecoder(Bundle(bundle(*key)), threads=1)
        decoders[key].length = 0
        return decoders[key]

    yield make
    for decoder in decoders.values():
        decoder.close()


def fresh(key: tuple[str, str], bundle: Callable[..., Path]) -> OrtDecoder:
    return OrtDecoder(Bundle(bundle(*key)), threads=1)


def embeds(
    key: tuple[str, str], bundle: Callable[..., Path], count: int, seed: int = 0
) -> np.ndarray:
    width = Bundle(bundle(*key), check=False).manifest.decoder.width
    return np.random.default_rng(seed).standard_normal((1, count, width)).astype(np.float32)


def same(found: np.ndarray, expected: np.ndarray, key: tuple[str, str]) -> None:
    """Failing here points at the cache: positions, masks, write_indices or what a growth copies."""
    if key[1] == "fp32":
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    else:
        assert np.linalg.norm(found - expected) < RELATIVE_INT4 * np.linalg.norm(expected)
    assert np.abs(expected).max() > 0.5  # there is something to compare


@pytest.mark.parametrize("key", CASES, ids=lambda key: "-".join(key))
def test_chunks_are_the_whole(
    key: Any, opened: Open, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = embeds(key, bundle, 100)
    whole = opened(*key).prefill(x).copy()
    for chunk in (1, 7, 64, 99):
        monkeypatch.setattr(ort_decoder, "CHUNK", chunk)
        same(opened(*key).prefill(x), whole, key)
    monkeypatch.setattr(ort_decoder, "CHUNK", CHUNK)
    decoder = opened(*key)
    for start, stop in ((0, 1), (1, 30), (30, 31), (31, 100)):
        found = decoder.prefill(x[:, start:stop])
    same(found, whole, key)


@pytest.mark.parametrize("key", CASES, ids=lambda key: "-".join(key))
def test_steps_are_the_whole_across_growing_capacities(
    key: Any, opened: Open, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position at a time through several growths, against a prefill and a decoder that had the
    memory from the start."""
    monkeypatch.setattr(ort_decoder, "ROOM", STEP)
    count = 3 * STEP + 5
    x = embeds(key, bundle, count)
    growing, roomy = fresh(key, bundle), fresh(key, bundle)
    roomy._reserve(count)
    assert growing.capacity == 0
    capacities = []
    for index in range(count):
        step = growing.prefill if index == 0 else growing.decode
        found = step(x[:, index : index + 1] if index == 0 else x[0, index])
        same(found, roomy.decode(x[0, index]), key)
        capacities.append(growing.capacity)
        assert growing.length == index + 1
    assert len(set(capacities)) >= 3
    assert all(0 <= capacity - index <= STEP for index, capacity in enumerate(capacities))
    for index in (0, STEP - 1, STEP, count - 2):
        same(opened(*key).prefill(x[:, : index + 1]), fresh_logits(key, bundle, x, index), key)
    same(growing.decode(x[0, 0]), opened(*key).prefill(np.concatenate([x, x[:, :1]], 1)), key)


def fresh_logits(key: Any, bundle: Callable[..., Path], x: np.ndarray, index: int) -> np.ndarray:
    decoder = fresh(key, bundle)
    for position in range(index + 1):
        logits = decoder.decode(x[0, position])
    return logits.copy()


@pytest.mark.parametrize("key", CASES, ids=lambda key: "-".join(key))
def test_what_is_cut_off_is_forgotten(key: Any, opened: Open, bundle: Callable[..., Path]) -> None:
    x, other = embeds(key, bundle, 90), embeds(key, bundle, 60, seed=1)
    decoder = opened(*key)
    decoder.prefill(x)
    for _ in range(3):
        decoder.decode(other[0, 0])
    for kept in (40, 12, 1, 0):
        decoder.length = kept
        found = decoder.prefill(other).copy()
        whole = fresh(key, bundle).prefill(np.concatenate([x[:, :kept], other], axis=1))
        same(found, whole, key)
        assert decoder.length == kept + 60
        decoder.length = kept
        step = decoder.decode(other[0, 0])
        same(step, fresh(key, bundle).prefill(np.concatenate([x[:, :kept], other[:, :1]], 1)), key)


@pytest.mark.parametrize("key", WINDOWS, ids=lambda key: "-".join(key))
def test_a_window_forgets_what_is_before_it(
    key: Any, opened: Open, bundle: Callable[..., Path]
) -> None:
    """With two layers a position sees 2 * (window - 1) back where both have the window."""
    window = Bundle(bundle(*key)).manifest.decoder.sliding_window
    assert window == {"clip-mistral-window": 11, "siglip-qwen2": 9}[key[0]]
    x = embeds(key, bundle, 60)
    last = opened(*key).prefill(x).copy()
    reach = 2 * (window - 1)
    changed = x.copy()
    changed[0, : 60 - reach - 1] = embeds(key, bundle, 60, seed=2)[0, : 60 - reach - 1]
    found = opened(*key).prefill(changed).copy()
    if key[0] == "clip-mistral-window":
        same(found, last, key)
    else:  # its first layer sees everything
        assert np.abs(found - last).max() > 100 * TOLERANCE
    changed[0, 60 - reach - 1] += 3
    found = opened(*key).prefill(changed)
    assert np.abs(found - last).max() > 100 * TOLERANCE


def test_a_full_attention_sees_all(opened: Open, bundle: Callable[..., Path]) -> None:
    key = CASES[0]
    x = embeds(key, bundle, 300)  # more than one chunk
    before = opened(*key).prefill(x).copy()
    x[0, 0] += 3
    assert np.abs(opened(*key).prefill(x) - before).max() > 100 * TOLERANCE


def test_the_cache_is_updated_in_place(bundle: Callable[..., Path]) -> None:
    """A step writes its own position into the arrays that were there, and into no other."""
    key = CASES[0]
    decoder = fresh(key, bundle)
    x = embeds(key, bundle, 10)
    decoder.prefill(x[:, :8])
    arrays = {name: value.numpy() for name, value in decoder._caches.items()}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    assert len(arrays) == 2 * decoder._settings.layers
    for position in (8, 9):
        before = {name: array.copy() for name, array in arrays.items()}
        decoder.decode(x[0, position])
        for name, array in arrays.items():
            assert decoder._caches[name].data_ptr() == addresses[name]
            changed = np.flatnonzero((array != before[name]).any(axis=(0, 1, 3)))
            assert changed.tolist() == [position], name


def test_growing_keeps_what_was_written_and_no_more(bundle: Callable[..., Path]) -> None:
    key = CASES[0]
    decoder = fresh(key, bundle)
    decoder.prefill(embeds(key, bundle, 20))
    decoder.length = 5
    before = decoder._caches["key.1"].numpy().copy()
    decoder._reserve(STEP + 1)
    after = decoder._caches["key.1"].numpy()
    np.testing.assert_array_equal(after[:, :, :5], before[:, :, :5])
    assert not after[:, :, 5:].any()


@pytest.mark.parametrize("needed", [1, 63, 64, 65, 1000, 4096, 20_001])
@pytest.mark.parametrize("key", [MASKED, UNMASKED], ids=["mask", "no-mask"])
def test_capacity_is_close_to_what_is_needed(
    key: tuple[str, str], needed: int, bundle: Callable[..., Path]
) -> None:
    decoder = fresh(key, bundle)
    assert bool(decoder._windows) == (key == MASKED)
    decoder._reserve(needed)
    ahead = max(STEP, needed // 8) if key == MASKED else max(ROOM, needed // 2)
    assert needed <= decoder.capacity <= needed + ahead
    assert decoder.capacity % STEP == 0
    held = decoder.capacity
    decoder._reserve(needed)
    assert decoder.capacity == held


@pytest.mark.parametrize(("key", "copies"), [(MASKED, 12), (UNMASKED, 2)], ids=["mask", "no-mask"])
def test_growing_one_by_one_copies_a_bounded_share(
    key: tuple[str, str], copies: int, bundle: Callable[..., Path]
) -> None:
    decoder, copied = fresh(key, bundle), 0
    held = 0
    for needed in range(1, 8001):
        decoder._reserve(needed)
        if decoder.capacity != held:
            copied, held = copied + held, decoder.capacity
        decoder.length = needed
    # A geometric series of ratio 9/8 and the small steps before it, or one of ratio 3/2.
    assert copied < copies * 8000


def test_decode_reuses_its_logits_and_prefill_does_not(bundle: Callable[..., Path]) -> None:
    """engine.Decoder: logits of decode hold until the next call; a prefill's are the caller's."""
    key = CASES[0]
    decoder, x = fresh(key, bundle), embeds(key, bundle, 6)
    first = decoder.prefill(x[:, :2])
    kept = first.copy()
    step = decoder.decode(x[0, 2])
    copy = step.copy()
    again = decoder.decode(x[0, 3])
    np.testing.assert_array_equal(first, kept)
    assert np.shares_memory(step, again)
    assert not np.array_equal(step, copy)


def test_dynamic_rope_is_prefilled_at_once(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base depends on the longest position of a call: in chunks the first ones would differ."""
    key = ("clip-padded-square", "fp32")
    settings = Bundle(bundle(*key)).manifest.decoder
    assert not settings.chunked_prefill
    assert settings.max_positions == 2 * 640
    x = embeds(key, bundle, 700)
    whole = fresh(key, bundle).prefill(x).copy()
    monkeypatch.setattr(ort_decoder, "CHUNK", 50)
    same(fresh(key, bundle).prefill(x), whole, key)
    decoder = fresh(key, bundle)  # what would happen otherwise
    for start in range(0, 700, 50):
        chunked = decoder.prefill(x[:, start : start + 50])
    assert np.abs(chunked - whole).max() > 100 * TOLERANCE


# -- engines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_an_absent_device_is_an_error(device: str, bundle: Callable[..., Path]) -> None:
    with pytest.raises(DeviceUnavailable, match=f"'{device}' is not available"):
        open_engines(Bundle(bundle("clip-llama")), device, None)


@pytest.mark.parametrize("device", ["", "CPU", "gpu", "cuda:0", None])
def test_an_unknown_device_is_another_error(device: Any, bundle: Callable[..., Path]) -> None:
    with pytest.raises(SettingError, match="known are cpu, cuda, tensorrt"):
        open_engines(Bundle(bundle("clip-llama")), device, None)


def test_engines_are_all_but_the_decoder(bundle: Callable[..., Path]) -> None:
    engines, decoder = open_engines(Bundle(bundle("clip-llama")), "cpu", 1)
    assert set(engines) == {"vision", "connector"}
    assert isinstance(decoder, OrtDecoder)


def test_what_an_engine_refuses_is_its_failure(bundle: Callable[..., Path], tmp_path: Path) -> None:
    engine = OrtEngine(Bundle(bundle("clip-llama")), "vision", 1)
    for feeds in (
        {"pixel_values": np.zeros((1, 3, 5, 5), np.float32)},
        {"pixels": np.zeros(1)},
        {},
    ):
        with pytest.raises(EngineFailure, match="engine vision failed") as caught:
            engine.run(feeds)
        assert "\n" not in str(caught.value)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineFailure, match="engine llm failed"):
        ort.open_session(tmp_path / "broken.onnx", "llm", None)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_runs_any_number_of_tiles(precision: str, bundle: Callable[..., Path]) -> None:
    engine = OrtEngine(Bundle(bundle("clip-llama", precision)), "vision", 1)
    tiles = np.random.default_rng(0).standard_normal((5, 3, 30, 30)).astype(np.float32)
    together = engine.run({"pixel_values": tiles})["features"]
    alone = [engine.run({"pixel_values": tile[None]})["features"][0] for tile in tiles]
    np.testing.assert_allclose(together, np.stack(alone), rtol=0, atol=1e-4)
