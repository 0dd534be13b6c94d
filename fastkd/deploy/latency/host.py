"""The machine that a time belongs to, and what makes times on it differ: power, heat, neighbours.

Part of the script for other devices: the standard library only. Whatever cannot be read is None.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Neighbours", "caveats", "machine"]

ROOT = Path("/")
BUSY_CORES = 0.2
"""Cores used by others from which a time is doubted."""


def machine(root: Path = ROOT) -> dict[str, Any]:
    """Processor, cores, governor, turbo, power supply and throttling, for JSON."""
    cpu = root / "sys/devices/system/cpu"
    scaling = cpu / "cpu0/cpufreq"
    return {
        "cpu": _cpu_name(root),
        "cores": _cores(),
        "system": platform.platform(),
        "virtual": _is_virtual(root),
        "governor": _text(scaling / "scaling_governor"),
        "max_mhz": _mhz(scaling / "cpuinfo_max_freq"),
        "turbo": _turbo(cpu),
        "mains": _mains(root / "sys/class/power_supply"),
        "throttled": _throttled(cpu),
    }


def caveats(before: dict[str, Any], after: dict[str, Any], neighbours: float | None) -> list[str]:
    """Sentences that a reader of the times must know.

    before, after: `machine()` around the measurement. neighbours: cores that other programs used.
    """
    found = []
    if before["governor"] is None:
        why = " (a virtual machine)" if before["virtual"] else ""
        found.append(
            f"The frequency governor cannot be read here{why}: power, heat and other guests may "
            "change these times from one hour to the next."
        )
    elif before["governor"] != "performance":
        found.append(
            f"The frequency governor is {before['governor']}, so the frequency may change between "
            "two measurements: set performance for times to compare."
        )
    if before["turbo"]:
        found.append("Turbo is on: under a long load the chip warms up and may get slower.")
    if before["mains"] is False:
        found.append("The machine runs on its battery, which may limit its power.")
    if before["throttled"] is not None and after["throttled"] != before["throttled"]:
        found.append("The processor was throttled by its heat during the measurement.")
    if neighbours is not None and neighbours >= BUSY_CORES:
        found.append(
            f"Other programs used {neighbours:.1f} cores during the measurement: repeat it on a "
            "quiet machine."
        )
    return found


class Neighbours:
    """How much of the processor other programs use while a block runs; blocks add up.

    with neighbours: ...
    """

    def __init__(self, root: Path = ROOT, clock: Callable[[], float] = time.perf_counter) -> None:
        self._stat = root / "proc/stat"
        self._clock = clock
        self._cores: float | None = 0.0
        self._wall_s = 0.0
        self._start: tuple[float, float | None] = (0.0, None)

    def __enter__(self) -> "Neighbours":
        self._start = self._clock(), self._others_s()
        return self

    def __exit__(self, *_: object) -> None:
        start_s, before = self._start
        now = self._others_s()
        if before is None or now is None or self._cores is None:
            self._cores = None
        else:
            self._cores += max(0.0, now - before)
        self._wall_s += self._clock() - start_s

    @property
    def cores(self) -> float | None:
        """On average; None where it is not known."""
        if self._cores is None or self._wall_s < 0.1:  # the counts have steps of 10 ms
            return None
        return self._cores / self._wall_s

    def _others_s(self) -> float | None:
        """Seconds of work on all processors, and taken by other guests, without this process."""
        first = (_text(self._stat) or "").partition("\n")[0].split()
        if not hasattr(os, "sysconf") or first[:1] != ["cpu"]:
            return None
        user, nice, system, _, _, irq, soft_irq, steal = map(int, first[1:9])
        busy = user + nice + system + irq + soft_irq + steal
        own = os.times()
        return busy / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _cpu_name(root: Path) -> str:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "Model") and value.strip():
            return value.strip()
    board = _text(root / "sys/firmware/devicetree/base/model")
    return (board or "").strip("\0 ") or platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_virtual(root: Path) -> bool | None:
    text = _text(root / "proc/cpuinfo")
    return None if text is None else " hypervisor" in text


def _turbo(cpu: Path) -> bool | None:
    if text := _text(cpu / "intel_pstate/no_turbo"):
        return text == "0"
    if text := _text(cpu / "cpufreq/boost"):
        return text == "1"
    return None


def _mains(supplies: Path) -> bool | None:
    """Whether a charger is plugged in; None for a machine without a battery."""
    try:
        kinds = {one: _text(one / "type") for one in supplies.iterdir()}
    except OSError:
        return None
    if "Battery" not in kinds.values():
        return None
    return any(_text(one / "online") == "1" for one, kind in kinds.items() if kind != "Battery")


def _throttled(cpu: Path) -> int | None:
    counts = [
        int(text)
        for file in cpu.glob("cpu*/thermal_throttle/core_throttle_count")
        if (text := _text(file)) and text.isdigit()
    ]
    return sum(counts) if counts else None


def _mhz(file: Path) -> int | None:
    text = _text(file)
    return int(text) // 1000 if text and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return None
