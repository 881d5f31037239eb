"""Ranges: what the graph keeps of a layer's input, and the range each method makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graph import run, write

from vlm_edge.calibration import histogram as histogram_module
from vlm_edge.calibration import ranges as ranges_module
from vlm_edge.calibration.histogram import BINS, Histogram, entropy, least_squares
from vlm_edge.calibration.ranges import (
    CHANNELS,
    METHODS,
    RANGE,
    SAMPLE,
    SIZE,
    FeatureError,
    Statistics,
    feature_error,
    magnitudes,
    migration,
)
from vlm_edge.errors import CalibrationError

# -- what the graph keeps ---------------------------------------------------------------------


def reduced(values: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """float32 [tiles, tokens, channels] through `magnitudes`, by kind."""
    kinds = (RANGE, CHANNELS, SAMPLE, SIZE)
    graph = write(
        path,
        lambda op, x: [magnitudes(op, x["x"])[kind] for kind in kinds],
        {"x": ("float32", ("a", "b", "c"))},
        {kind: ("float32", (f"n{i}",)) for i, kind in enumerate(kinds)},
    )
    return dict(zip(kinds, run(graph, {"x": values}), strict=True))


@pytest.mark.parametrize("percentile", [99.99, 99.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 17, 31), (1, 300, 100)])
def test_the_graph_keeps_the_largest_magnitudes(
    shape: tuple[int, ...], percentile: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges_module, "PERCENTILE", percentile)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = reduced(values, tmp_path / "g.onnx")
    np.testing.assert_array_equal(found[CHANNELS], np.abs(values).max(axis=(0, 1)))
    falling = np.sort(np.abs(values).ravel())[::-1]
    np.testing.assert_array_equal(found[RANGE], falling[: len(found[RANGE])])
    share = values.size * (1 - percentile / 100)
    assert max(1, share - 0.01) <= len(found[RANGE]) <= share + 1.01
    np.testing.assert_array_equal(found[SAMPLE], np.abs(values).ravel())  # few: all of them
    assert found[SIZE] == [values.size]


@pytest.mark.parametrize("samples", [700, 701, 16799, 16800])
def test_a_large_input_is_sampled_evenly(
    samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than asked for, all channels in their turn, at the usual widths."""
    monkeypatch.setattr(ranges_module, "SAMPLES", samples)
    values = np.arange(1, 16801, dtype=np.float32).reshape(1, 350, 48)
    found = reduced(values, tmp_path / "g.onnx")[SAMPLE]
    assert samples / 31 <= len(found) <= samples
    places = found.astype(int) - 1
    (stride,) = set(np.diff(places))
    assert stride == 1 or stride % 30 == 1
    assert places[0] == 0
    assert places[-1] + stride >= values.size
    assert len(set(places % 48)) == min(48, len(places))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 15000, 59999])
def test_no_bad_value_is_lost(bad: float, place: int, tmp_path: Path) -> None:
    """ReduceMax may lose a NaN; what is checked must not."""
    values = np.random.default_rng(0).standard_normal((1, 600, 100)).astype(np.float32)
    values.ravel()[place] = bad
    found = reduced(values, tmp_path / "g.onnx")
    with pytest.raises(CalibrationError, match="input of layer is not finite"):
        Statistics().add({kind + "layer": array for kind, array in found.items()})


# -- over pictures ----------------------------------------------------------------------------


def outputs(**values: list[float]) -> dict[str, np.ndarray]:
    """Of layers with one input channel: the largest magnitudes, which are all there is."""
    found: dict[str, np.ndarray] = {}
    for name, magnitude in values.items():
        array = np.array(magnitude, np.float32)
        found[RANGE + name] = found[SAMPLE + name] = array
        found[CHANNELS + name] = array[:1]
        found[SIZE + name] = np.array([len(array)], np.float32)
    return found


def test_ranges_over_pictures() -> None:
    statistics = Statistics()
    statistics.add({**outputs(a=[5, 3], b=[1, 0.5]), "features": np.array([99.0])})
    statistics.add(outputs(a=[4, 3.5], b=[7, 0.25]))
    found = statistics.ranges({"a": "a", "b": "b", "c": "b"})
    assert set(found.limits) == set(METHODS)
    assert found.limits["minmax"] == {"a": 5.0, "b": 7.0, "c": 7.0}
    assert found.limits["percentile"] == {"a": 3.5, "b": 0.5, "c": 0.5}
    average = {"a": 0.9 * 5 + 0.1 * 4, "b": 0.9 * 1 + 0.1 * 7}
    assert found.limits["average"] == pytest.approx(average | {"c": average["b"]})
    assert {path: float(c[0]) for path, c in found.channels.items()} == {"a": 5, "b": 7, "c": 7}
    for method in ("entropy", "mse"):
        limits = found.limits[method]
        assert 0 < limits["a"] <= 5
        assert limits["b"] == limits["c"]
    for bad in (np.nan, np.inf):
        with pytest.raises(CalibrationError, match="input of a is not finite"):
            statistics.add(outputs(a=[bad]))


def test_a_layer_of_zeros_has_no_range() -> None:
    statistics = Statistics()
    statistics.add(outputs(a=[0.0, 0.0]))
    assert {m: v["a"] for m, v in statistics.ranges({"a": "a"}).limits.items()} == dict.fromkeys(
        METHODS, 0.0
    )


def test_a_sample_stands_for_the_whole() -> None:
    """Largest exactly, the rest by every 31st: the clips are those of all values."""
    values = np.abs(np.random.default_rng(0).standard_t(4, 1_000_000)).astype(np.float32)
    falling = np.sort(values)[::-1]
    statistics, whole = Statistics(), Histogram()
    for piece in np.split(values, 4):
        whole.add(piece)
        statistics.add(
            {
                "range.a": np.sort(piece)[::-1][:25],
                "channels.a": piece.max(keepdims=True),
                "sample.a": piece[::31],
                "size.a": np.array([piece.size], np.float32),
            }
        )
    found = statistics.histograms["a"]
    assert found.counts.sum() == pytest.approx(values.size)
    assert (found.peak, found.exponent) == (whole.peak, whole.exponent)
    assert found.peak == falling[0]
    beyond = int(falling[3] / found.width)  # the tail is exact
    np.testing.assert_array_equal(found.counts[beyond:], whole.counts[beyond:])
    assert least_squares(found) == pytest.approx(least_squares(whole), rel=0.02)


# -- the histogram ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), max_size=9),
        min_size=1,
        max_size=5,
    )
)
def test_pieces_add_up_to_the_whole(pieces: list[list[float]]) -> None:
    streamed, whole = Histogram(), Histogram()
    for piece in pieces:
        streamed.add(np.array(piece, np.float32))
    everything = np.array([value for piece in pieces for value in piece], np.float32)
    whole.add(everything)
    np.testing.assert_array_equal(streamed.counts, whole.counts)
    assert (streamed.exponent, streamed.peak) == (whole.exponent, whole.peak)
    expected = np.floor(everything.astype(np.float64) / whole.width)
    np.testing.assert_array_equal(np.bincount(expected.astype(int), minlength=BINS), whole.counts)
    if everything.size and everything.max() >= 2.0**-100:
        assert BINS // 2 <= whole.peak / whole.width < BINS


def squared_error(values: np.ndarray, clip: float) -> float:
    step = clip / 127
    return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean())


GENERATOR = np.random.default_rng(7)
DISTRIBUTIONS = {
    "gaussian": GENERATOR.standard_normal(400_000),
    "laplace": GENERATOR.laplace(size=400_000),
    "uniform": GENERATOR.uniform(-3, 3, 400_000),
    "one-sided": np.maximum(GENERATOR.standard_normal(400_000), 0),  # as after ReLU
    "heavy": GENERATOR.standard_t(2.5, 400_000),
    "outliers": np.concatenate([GENERATOR.standard_normal(400_000), [80.0, -120.0]]),
    "few": GENERATOR.standard_normal(50),
}


def counted(name: str) -> tuple[np.ndarray, Histogram]:
    values = DISTRIBUTIONS[name].astype(np.float32)
    found = Histogram()
    for piece in np.array_split(np.abs(values), 7):
        found.add(piece)
    return values, found


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_clips_where_brute_force_does(name: str) -> None:
    values, found = counted(name)
    clip = least_squares(found)
    tried = np.abs(values).max() * 2 ** (-np.arange(0, 100) / 16)
    least = min(squared_error(values, t) for t in tried)
    assert squared_error(values, clip) <= least * (1.02 if len(values) > 1000 else 1.2)
    assert 0 < clip <= np.abs(values).max()


def test_known_clips() -> None:
    """Banner et al. 2018 (arXiv 1810.05723) give 3.92 sigma for a Gaussian and 9.89 b for a Laplace
    distribution at 8 bits (256 levels, here 255)."""
    assert least_squares(counted("gaussian")[1]) == pytest.approx(3.92, rel=0.03)
    assert least_squares(counted("laplace")[1]) == pytest.approx(9.89, rel=0.03)
    for method in (least_squares, entropy):
        assert method(counted("uniform")[1]) == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("factor", [2.0**-20, 3e-3, 1e4])
def test_clips_scale_with_the_values(name: str, factor: float) -> None:
    values, found = counted(name)
    scaled = Histogram()
    scaled.add(np.abs(values * np.float32(factor)))
    assert least_squares(scaled) == pytest.approx(factor * least_squares(found), rel=0.05)
    if np.frexp(factor)[0] == 0.5:  # the same bins; others change what entropy sees
        assert entropy(scaled) == factor * entropy(found)


def divergence(counts: np.ndarray, kept: int) -> float:
    """Migacz 2017, slide 38, bin by bin."""
    reference = counts[:kept].copy()
    reference[kept - 1] += counts[kept:].sum()
    levels: list[list[int]] = [[] for _ in range(128)]
    for bin_ in range(kept):
        levels[bin_ * 128 // kept].append(bin_)
    quantized = np.zeros(kept)
    for level in levels:
        filled = [b for b in level if counts[b] > 0]
        for b in filled:
            quantized[b] = sum(counts[level]) / len(filled)
    quantized[quantized == 0] = histogram_module.ALMOST_NONE
    total = counts[:kept].sum()
    return float(
        sum(
            p / reference.sum() * np.log((p / reference.sum()) / (q / total))
            for p, q in zip(reference, quantized, strict=True)
            if p > 0
        )
    )


@pytest.mark.parametrize("name", ["gaussian", "laplace", "one-sided", "heavy", "outliers"])
def test_entropy_is_the_least_divergence(name: str) -> None:
    _, found = counted(name)
    counts = found.counts.reshape(-1, 4).sum(axis=1)
    width = 4 * found.width
    used = int(found.peak / width) + 1
    tried = sorted({round(used / 2 ** (k / 16)) for k in range(80)} & set(range(128, used + 1)))
    best = min(reversed(tried), key=lambda kept: divergence(counts, kept))
    expected = found.peak if best == used else best * width
    assert entropy(found) == pytest.approx(expected, rel=1e-6)


def test_entropy_is_about_that_of_onnx_runtime() -> None:
    """Its histogram has other bins, so the two agree only roughly."""
    collector = pytest.importorskip("onnxruntime.quantization.calibrate").HistogramCollector
    for name in ("laplace", "outliers"):
        values, found = counted(name)
        peak = float(np.abs(values).max())
        counts, edges = np.histogram(values, bins=2049, range=(-peak, peak))
        theirs = collector("entropy", True, 2048, 128, 99.9, "same").get_entropy_threshold(
            (counts, edges, values.min(), values.max(), peak), 128
        )[1]
        assert entropy(found) == pytest.approx(float(theirs), rel=0.3), name
    assert entropy(counted("outliers")[1]) < 10  # of 120


# -- after the ranges -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_feature_error(pictures: int, tokens: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    exact = generator.standard_normal((pictures, 1, tokens, 5)).astype(np.float32)
    other = exact + generator.normal(0, 0.2, exact.shape).astype(np.float32)
    found = feature_error(zip(other, exact, strict=True))
    a, b = exact.reshape(-1, 5).astype(float), other.reshape(-1, 5).astype(float)
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_feature_error_of_nothing() -> None:
    error = FeatureError()
    error.add(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32))
    assert (error.cosine, error.relative) == (0.0, 0.0)


def test_migration_levels_the_channels() -> None:
    channels = np.array([100, 1, 0.01, 0, 3], np.float32)
    weights = np.array([0.1, 0.1, 2, 1, 0], np.float32)
    scales = migration(channels, weights, 0.5)
    np.testing.assert_allclose(scales[:3] ** 2, channels[:3] / weights[:3], rtol=1e-6)
    assert list(scales[3:]) == [1, 1]  # never read, or never there: left alone
    np.testing.assert_allclose(migration(channels, weights, 1.0)[:3], channels[:3], rtol=1e-6)
