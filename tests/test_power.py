"""Power: sources read from recorded files and text, energy as the area under readings, a bench with both."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge.benchmarks import latency, power, power_sources
from vlm_edge.benchmarks.power import Meter, Reading, energy
from vlm_edge.benchmarks.power_sources import Child, Rails, Rapl, Unreadable, find, nvidia_smi_watts
from vlm_edge.benchmarks.schema import POWER, Measured, Report
from vlm_edge.benchmarks.table import table
from vlm_edge.cli.main import cli

JETSON = Path(__file__).parent / "fixtures" / "jetson"


# -- sources --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "watts", "covers"),
    [
        ("orin-nano-8gb-jetpack-6", 5.016 * 0.977, "the whole module (VDD_IN)"),
        # In watts as tegrastats showed them for these volts and amperes: 3.575 of VDD_GPU_SOC.
        ("agx-orin-64gb-jetpack-6", 3.57552 + 1.430208 + 4.968,
         "the module, as the sum of VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0"),
        ("agx-thor-128gb-jetpack-7", 28.906, "the whole board (VIN)"),
    ],
)  # fmt: skip
def test_a_boards_monitors(board: str, watts: float, covers: str) -> None:
    source = find("tensorrt", JETSON / board)
    assert (source.name, source.covers) == ("hwmon", covers)
    assert source.read() == pytest.approx(watts)


def test_every_rail_of_a_board() -> None:
    rails = Rails(JETSON / "agx-orin-64gb-jetpack-6").rails()
    assert set(rails) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert rails["VDDQ_VDD2_1V8AO"] == pytest.approx(1.09296)


def without_monitors(tmp_path: Path) -> Path:
    root = shutil.copytree(JETSON / "orin-nano-8gb-jetpack-6", tmp_path / "root")
    shutil.rmtree(root / "sys/class/hwmon")
    return root


def program(folder: Path, name: str, prints: str) -> Path:
    """A program that prints a text, over and over."""
    path = folder / name
    lines = f"import time\nwhile True:\n    print({prints!r}, flush=True)\n    time.sleep(0.02)\n"
    path.write_text(f"#!{sys.executable}\n{lines}", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_tegrastats_where_no_monitor_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (JETSON / "tegrastats" / "orin-nano-jetpack-6.txt").read_text(encoding="utf-8")
    program(tmp_path, "tegrastats", f"starting\n{line}")
    monkeypatch.setenv("PATH", str(tmp_path))
    source = find("tensorrt", without_monitors(tmp_path))
    assert source.read() == 4.9
    source.close()


def test_a_board_without_either_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreadable, match="neither a power monitor in /sys/class/hwmon nor"):
        find("tensorrt", without_monitors(tmp_path))


def test_a_monitor_that_may_not_be_read(tmp_path: Path) -> None:
    root = shutil.copytree(JETSON / "orin-nano-8gb-jetpack-6", tmp_path / "root")
    (root / "sys/class/hwmon/hwmon1/in1_input").unlink()
    with pytest.raises(Unreadable, match="in1_input"):
        Rails(root)


@pytest.mark.parametrize(
    ("line", "watts"),
    [("power.draw [W]\n", None), ("38.12 W\n", 38.12), ("38.12\n", 38.12), ("[N/A]\n", None)],
)
def test_nvidia_smis_lines(line: str, watts: float | None) -> None:
    assert nvidia_smi_watts(line) == watts


def test_a_desktop_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver's program is asked for the GPU that CUDA would take first."""
    path = tmp_path / "nvidia-smi"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[-1] == '2', sys.argv\n"
        "assert sys.argv[1] == '--query-gpu=power.draw'\nprint('[N/A]\\n71.50', flush=True)\n",
        encoding="utf-8",
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    source = find("cuda", tmp_path)
    assert source.read() == 71.5
    with pytest.raises(EOFError, match="prints no power"):
        source.read()
    source.close()
    assert source.covers == "the GPU's board, without the machine"
    with pytest.raises(Unreadable, match="no energy counters"):
        find("cpu", tmp_path)  # the GPU's power says nothing of a run on the processor


def test_no_gpu_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreadable, match="no nvidia-smi"):
        find("tensorrt", tmp_path)


def powercap(root: Path, *packages: int) -> Path:
    """RAPL's files with these counters, and a part of the first package that is not to be added."""
    for number, microjoules in enumerate(packages):
        zone = root / f"sys/class/powercap/intel-rapl:{number}"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text(f"package-{number}\n", encoding="ascii")
        (zone / "energy_uj").write_text(f"{microjoules}\n", encoding="ascii")
        (zone / "max_energy_range_uj").write_text("999\n", encoding="ascii")
    core = root / "sys/class/powercap/intel-rapl:0:0"
    core.mkdir(exist_ok=True)
    (core / "name").write_text("core\n", encoding="ascii")
    return root


def test_a_processors_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages, one whose counter wraps: 30 and 50 microjoules in two seconds."""
    clock = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr(power_sources.time, "monotonic", lambda: next(clock))
    source = Rapl(powercap(tmp_path, 970, 100))
    powercap(tmp_path, 0, 150)
    assert source.read() == pytest.approx(40e-6)


def test_counters_that_only_root_may_read(tmp_path: Path) -> None:
    root = powercap(tmp_path, 1)
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    with pytest.raises(Unreadable, match="only root"):
        find("cpu", root)


# -- energy ---------------------------------------------------------------------------------

STEADY = [Reading(0.1 * i, 5.0) for i in range(51)]


@given(begin=st.floats(0.01, 2), length=st.floats(0.31, 2.9))
def test_steady_power_gives_power_times_time(begin: float, length: float) -> None:
    assert energy(STEADY, begin, begin + length) == pytest.approx(5 * length)


@given(st.lists(st.floats(0, 100), min_size=12, max_size=12), st.floats(0.35, 0.8))
def test_energy_of_the_parts_is_that_of_the_whole(watts: list[float], cut: float) -> None:
    readings = [Reading(0.1 * i, value) for i, value in enumerate(watts)]
    whole = energy(readings, 0.01, 1.1)
    left, right = energy(readings, 0.01, cut), energy(readings, cut, 1.1)
    assert whole is not None and left is not None
    assert right is not None or 1.1 - cut < power.SHORTEST
    if right is not None:
        assert left + right == pytest.approx(whole, abs=1e-9)


def test_power_between_readings_is_interpolated() -> None:
    rising = [Reading(0, 0.0), Reading(1, 10.0)]
    assert energy(rising, 0.25, 0.75) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("begin", "end"),
    [(1.0, 1.2), (-1.0, 2.0), (4.0, 6.0)],
    ids=["too short", "before the first reading", "behind the last"],
)
def test_energy_that_readings_do_not_tell(begin: float, end: float) -> None:
    assert energy(STEADY, begin, end) is None


def test_energy_over_a_gap_is_unknown() -> None:
    holed = [reading for reading in STEADY if not 1.0 < reading.at < 2.5]
    assert energy(holed, 0.5, 3.0) is None
    assert energy(holed, 2.6, 3.0) == pytest.approx(2.0)


# -- the meter ------------------------------------------------------------------------------


def test_a_meter_reads_a_child_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "IDLE", 1.0)
    source = Child([str(program(tmp_path, "smi", "7.0"))], nvidia_smi_watts, "the GPU")
    meter = Meter(source)
    meter.start()
    try:
        begin = meter._readings[0].at
        meter.settle()
        assert meter.idle_w == pytest.approx(7)
        assert meter.energy(begin + 0.1, begin + 0.5) == pytest.approx(2.8)
    finally:
        meter.close()
    assert source._process.poll() is not None
    assert meter.reason is None


def test_readings_that_end_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "IDLE", 0.5)
    meter = Meter(Child([sys.executable, "-c", "print('7.0')"], nvidia_smi_watts, "the GPU"))
    meter.start()
    meter.settle()
    assert meter.idle_w is None
    assert "prints no power" in str(meter.about(False)["reason"])
    meter.close()
    assert not meter._thread.is_alive()


def test_a_meter_without_a_source_knows_nothing() -> None:
    meter = Meter(None, "why")
    meter.start()
    meter.settle()
    assert meter.energy(0, 1) is None
    assert meter.about(False) == {
        "source": None, "covers": None, "interval_ms": None, "idle_w": None, "reason": "why",
    }  # fmt: skip
    meter.close()


# -- in a report ----------------------------------------------------------------------------


class Steady(Meter):
    """5 W at any time."""

    def energy(self, begin: float, end: float) -> float | None:
        return 5.0 * (end - begin)


def test_energy_of_a_token_is_of_the_decode() -> None:
    """A request of 3 s, 2 s of them the decode of 4 tokens behind the first."""
    found = latency.energy_figures(Steady(None), (10.0, 11.0, 13.0), new_tokens=5)
    assert found == {"power_w": 5.0, "energy_j": 15.0, "energy_mj_per_token": 2500.0}
    assert latency.energy_figures(Meter(None), (10.0, 11.0, 13.0), new_tokens=5) == {}


def bench(bundle: Path, *args: str) -> dict[str, Any]:
    options = ("--runs", "3", "--warmup", "0", "--threads", "1", "--json", "-", *args)
    result = CliRunner().invoke(cli, ["bench", str(bundle), *options])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_bench_with_a_boards_power(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sensors are a recorded board's, the rest is real: runs, threads, clocks of two processes."""
    board = JETSON / "orin-nano-8gb-jetpack-6"
    real = latency.metering
    monkeypatch.setattr(latency, "metering", lambda device: real(device, board))
    monkeypatch.setattr(power, "IDLE", 0.8)
    monkeypatch.setattr(power, "SHORTEST", 0.001)  # the tiny model is done in less than a reading
    monkeypatch.setattr(power, "GAP", 60)  # however busy this machine is
    document = bench(bundle("clip-llama"), "--new-tokens", "40")
    watts = 5.016 * 0.977
    assert document["power"]["source"] == "hwmon"
    assert document["power"]["reason"] is None
    assert document["power"]["idle_w"] == pytest.approx(watts, rel=1e-3)
    assert document["power_w"]["median"] == pytest.approx(watts, rel=1e-3)
    # At least what the decoder's steps take (sampling and text come on top), less than the whole request:
    # true of every run, so of the medians of three.
    steps = 1000 * watts / document["decode_tokens_per_s"]["median"]
    whole = 1000 * document["energy_j"]["median"] / 39
    assert 0.98 * steps < document["energy_mj_per_token"]["median"] < whole
    seconds = document["ttft_ms"]["median"] / 1000
    assert document["energy_j"]["median"] > watts * seconds


def test_runs_too_short_to_measure_say_so(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = latency.metering
    board = JETSON / "orin-nano-8gb-jetpack-6"
    monkeypatch.setattr(latency, "metering", lambda device: real(device, board))
    monkeypatch.setattr(power, "IDLE", 0.4)
    monkeypatch.setattr(power, "SHORTEST", 1000)
    document = bench(bundle("clip-llama"), "--new-tokens", "3")
    assert document["power_w"] is None
    assert "shorter than 1000 s" in document["power"]["reason"]
    assert document["power"]["source"] == "hwmon"


def test_a_bench_without_power_says_why(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = latency.metering
    monkeypatch.setattr(latency, "metering", lambda device: real(device, tmp_path))
    document = bench(bundle("clip-llama"), "--new-tokens", "3")
    assert [document[name] for name in POWER] == [None] * 3
    assert "no energy counters" in document["power"]["reason"]
    assert document["throttling"] is document["machine"]["jetson"] is None


def report(**more: Any) -> Report:
    figures: dict[str, Any] = dict.fromkeys(("load_s", *POWER), 1.0)
    from vlm_edge.benchmarks.schema import FIGURES

    figures = {**dict.fromkeys(FIGURES), **figures}
    side = Measured({"name": "b", "precisions": {"llm": "int4"}}, {}, figures, [])
    settings = {"prompt_tokens": 9, "visual_tokens": 4, "tiles": 1, "new_tokens": 2, "runs": 3}
    jetson = {"jetpack": "6.2.1", "l4t": "36.4.7", "power_mode": "15W"}
    return Report("now", {"name": "a board", "jetson": jetson}, settings, side, **more)


def test_the_caption_names_board_throttling_and_power() -> None:
    about = {
        "source": "hwmon",
        "covers": "the whole module (VDD_IN)",
        "idle_w": 4.1,
        "reason": None,
    }
    slowed = {"overcurrent": {"oc3": 12}, "active": ["cpu-throttle-alert"]}
    made = table(report(power=about, throttling=slowed))
    assert str(made.caption).splitlines() == [
        "a board, JetPack 6.2.1 (L4T 36.4.7), 15W",
        "throttled: cpu-throttle-alert, oc3 12 times",
        "power: the whole module (VDD_IN), 4.1 W idle",
    ]
    assert [c for c in made.columns[0].cells if "mJ" in str(c)]
