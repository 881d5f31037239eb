"""What a Jetson board is and how it runs now, from files alone: nothing is changed and no service is asked.

Every reader takes a root folder, so that a tree of files from another board can be read
(`tests/fixtures/jetson`, where its README names the source of each format).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Releases of Jetson Linux (L4T) and the JetPack that brought them.
# Source: https://developer.nvidia.com/embedded/jetpack-archive
JETPACKS = {
    "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4", "35.6.1": "5.1.5",
    "36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0", "38.2.1": "7.0", "38.2.2": "7.0", "38.4.0": "7.1", "39.2.0": "7.2",
}  # fmt: skip
FAMILIES = {"35": "5", "36": "6", "38": "7", "39": "7"}  # of a release that the table lacks


@dataclass(frozen=True)
class Jetson:
    """A board; what its files do not say is None.

    Attributes:
        board: "NVIDIA Jetson AGX Orin Developer Kit", of the device tree.
        module: part number of the module, "p3701-0005".
        chip: "tegra234" (Orin) or "tegra264" (Thor).
        l4t: release of Jetson Linux, "36.4.7".
        jetpack: the package nvidia-jetpack's version, else what that L4T came with; "6" alone for a
            release that is newer than our table.
        tensorrt, cuda: versions of the installed packages.
        power_mode: name in nvpmodel.conf, "MAXN_SUPER".
        gpu_mhz, gpu_max_mhz: the GPU's clock now, and what power mode and limits allow.
        cpu_mhz, cpu_max_mhz: of the first core.
        celsius: of each thermal zone that can be read; a gated one cannot.
        throttled: cooling devices that slow something down at this moment.
        overcurrent: events since the board started, by counter ("oc3"), each a throttling by hardware.
        memory_mb, available_mb: MemTotal and MemAvailable, 10^6 bytes.
    """

    board: str
    module: str | None
    chip: str
    l4t: str | None
    jetpack: str | None
    tensorrt: str | None
    cuda: str | None
    power_mode: str | None
    gpu_mhz: float | None
    gpu_max_mhz: float | None
    cpu_mhz: float | None
    cpu_max_mhz: float | None
    celsius: dict[str, float]
    throttled: tuple[str, ...]
    overcurrent: dict[str, int]
    memory_mb: float | None
    available_mb: float | None


def read(root: Path = Path("/")) -> Jetson | None:
    """The board whose files lie below `root`; None where it is no Jetson."""
    compatible = _text(root / "proc/device-tree/compatible").split("\0")
    chip = next((c.removeprefix("nvidia,") for c in compatible if "nvidia,tegra" in c), None)
    if chip is None:
        return None
    packages = _packages(root / "var/lib/dpkg/status")
    l4t = l4t_release(_text(root / "etc/nv_tegra_release"))
    l4t = l4t or _upstream(packages.get("nvidia-l4t-core"))
    gpu, cpu = _gpu_clock(root), root / "sys/devices/system/cpu/cpu0/cpufreq"
    memory = meminfo(root)
    return Jetson(
        board=_text(root / "proc/device-tree/model").strip("\0") or chip,
        module=_module(compatible),
        chip=chip,
        l4t=l4t,
        jetpack=_upstream(packages.get("nvidia-jetpack")) or jetpack_of(l4t),
        tensorrt=_upstream(packages.get("libnvinfer10") or packages.get("libnvinfer8")),
        cuda=_cuda(packages),
        power_mode=power_mode(root),
        gpu_mhz=_number(gpu / "cur_freq", 1e6) if gpu else None,
        gpu_max_mhz=_number(gpu / "max_freq", 1e6) if gpu else None,
        cpu_mhz=_number(cpu / "scaling_cur_freq", 1000),
        cpu_max_mhz=_number(cpu / "scaling_max_freq", 1000),
        celsius=temperatures(root),
        throttled=throttled(root),
        overcurrent=overcurrent(root),
        memory_mb=memory.get("MemTotal"),
        available_mb=memory.get("MemAvailable"),
    )


def l4t_release(text: str) -> str | None:
    """ "# R36 (release), REVISION: 4.7, GCID: ..." -> "36.4.7"."""
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def jetpack_of(l4t: str | None) -> str | None:
    """The JetPack of an L4T release."""
    if l4t is None:
        return None
    return JETPACKS.get(l4t) or FAMILIES.get(l4t.partition(".")[0])


def power_mode(root: Path = Path("/")) -> str | None:
    """The power mode's name, or its number where the configuration does not name it.

    Source: /var/lib/nvpmodel/status ("pmode:0002 fmode:quiet") and nvpmodel.conf; on the running system
    `nvpmodel -q`, which only reads, where that file is absent.
    """
    found = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if found is None:
        return _asked_power_mode() if root == Path("/") else None
    number = int(found[1])
    for line in _text(root / "etc/nvpmodel.conf").splitlines():
        if line.lstrip().startswith("< POWER_MODEL"):
            values = dict(re.findall(r"(ID|NAME)=(\S+)", line))
            if values.get("ID") == str(number):
                return values.get("NAME")
    return f"mode {number}"


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Degrees Celsius by thermal zone, without "-thermal": {"cpu": 49.7, "tj": 51.2}."""
    found = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _number(zone / "temp", 1000)
        name = _text(zone / "type").removesuffix("-thermal").removesuffix("-therm")
        if name and value is not None and value > -100:  # a gated zone of older releases reads -256
            found[name] = value
    return found


def throttled(root: Path = Path("/")) -> tuple[str, ...]:
    """Cooling devices in use, except fans: those slow the processors down."""
    found = []
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        name = _text(device / "type")
        if name and "fan" not in name and (_number(device / "cur_state") or 0) > 0:
            found.append(name)
    return tuple(found)


def overcurrent(root: Path = Path("/")) -> dict[str, int]:
    """Over-current and under-voltage events since the start, by counter.

    Source: hwmon `soctherm_oc` of Jetson Linux: oc1 under-voltage, oc2 average and oc3 instantaneous
    over-current.
    """
    found = {}
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(monitor / "name") == "soctherm_oc":
            for counter in sorted(monitor.glob("oc*_event_cnt")):
                value = _number(counter)
                if value is not None:
                    found[counter.name.removesuffix("_event_cnt")] = int(value)
    return found


def meminfo(root: Path = Path("/")) -> dict[str, float]:
    """/proc/meminfo in 10^6 bytes by name."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(kib) * 1024 / 1e6 for name, kib in lines}


def _module(compatible: list[str]) -> str | None:
    """ "nvidia,p3768-0000+p3767-0005" -> "p3767-0005": the module's number follows the carrier's."""
    found = [m for c in compatible if (m := re.search(r"\+(p\d{4}-\d{4})", c))]
    return found[0][1] if found else None


def _gpu_clock(root: Path) -> Path | None:
    """The GPU's devfreq: 17000000.gpu (Orin), gpu-gpc-0 (Thor), 17000000.ga10b (JetPack 5)."""
    names = re.compile(r"gpu-gpc-0|.*\.(gpu|ga10b|gv11b|gp10b)")
    nodes = sorted((root / "sys/class/devfreq").glob("*"))
    return next((node for node in nodes if names.fullmatch(node.name)), None)


def _packages(status: Path) -> dict[str, str]:
    """Versions of installed packages by name, as dpkg records them."""
    found = {}
    for stanza in _text(status).split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.+)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed") and "Version" in fields:
            found[fields["Package"]] = fields["Version"]
    return found


def _cuda(packages: dict[str, str]) -> str | None:
    """The newest CUDA runtime: cuda-cudart-12-6 -> "12.6"."""
    names = [re.fullmatch(r"cuda-cudart-(\d+)-(\d+)", name) for name in packages]
    found = [(int(m[1]), int(m[2])) for m in names if m]
    return "{}.{}".format(*max(found)) if found else None


def _upstream(version: str | None) -> str | None:
    """A package's version without what the packager added: "10.3.0.30-1+cuda12.5" -> "10.3.0.30"."""
    return re.split(r"[-+~]", version)[0] if version else None


def _asked_power_mode() -> str | None:
    program = shutil.which("nvpmodel")
    if program is None:
        return None
    try:
        said = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode: *(\S+)", said.stdout)
    return found[1] if found else None


def _number(path: Path, unit: float = 1) -> float | None:
    """The whole number in a file, of which `unit` make one of what is wanted."""
    try:
        return int(_text(path)) / unit
    except ValueError:
        return None


def _text(path: Path) -> str:
    """The file's text without spaces at its ends; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
