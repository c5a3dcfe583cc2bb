"""What a Linux machine tells about itself, for the transports that reach one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from hwnas.devices.readings import tegrastats
from hwnas.devices.transports.base import Transport

# Prints a line `name: value` for each thing that there is.
_ABOUT = (
    'printf "processor:"; grep -m 1 -iE "^(model name|hardware|cpu part)" /proc/cpuinfo; echo; '
    'printf "board: "; cat /proc/device-tree/model; echo; '
    'printf "kernel: "; uname -r; '
    'printf "l4t: "; head -n 1 /etc/nv_tegra_release; echo'
)

# Prints `file:line` for each line of the files that can be read.
_STATE = (
    'grep -s "" /proc/loadavg /sys/class/thermal/thermal_zone*/type /sys/class/thermal/thermal_zone*/temp '
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_[cm]*_freq /sys/class/devfreq/*/cur_freq; "
    # A Jetson's own tool, which prints a line each 0.1 s, knows its power, too.
    "if command -v tegrastats >/dev/null; then timeout 2 tegrastats --interval 100 | head -n 1; fi"
)
# Runs a program; meanwhile a Jetson's tegrastats writes a line each 0.1 s to the file that is named first.
_METERED = 'tegrastats --interval 100 >"$0" 2>&1 & meter=$!; "$@"; status=$?; kill "$meter"; exit "$status"'
_GPU = re.compile(r"gpu|mali|\bg[a-z]\d\d[a-z]\b", re.IGNORECASE)  # 17000000.ga10b, 57000000.gpu, ff9a0000.mali


def about(transport: Transport) -> dict[str, str]:
    """What decides a machine's times: `processor`, `board`, `kernel`, and `l4t`, the release of Jetson's Linux.

    Raises:
        DeviceError: it cannot be asked.
    """
    done = transport.run(["sh", "-c", _ABOUT])
    found = {}
    for line in done.stdout.replace("\0", "").splitlines():
        name, _, value = line.partition(":")
        if name == "processor":
            value = value.partition(":")[2]  # `processor:model name : Cortex-A78`
        if name in ("processor", "board", "kernel", "l4t") and value.strip():
            found[name] = value.strip()
    return found


def state(transport: Transport) -> dict[str, Any]:
    """A machine's state now: `load`, `celsius`, `mhz` (the fastest core), `mhz_limit`, `gpu_mhz`, `power_mw` (Jetson).

    What it does not tell is absent.

    Raises:
        DeviceError: it cannot be asked.
    """
    done = transport.run(["sh", "-c", _STATE])
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    # Jetson's PMIC-Die always tells 100 C.
    unreal = {file.rpartition("/")[0] for file, text in lines.items() if file.endswith("/type") and "PMIC" in text}
    celsius = {file: text for file, text in lines.items() if file.endswith("/temp")}
    readings = {
        "load": _numbers([text.split(" ")[0] for file, text in lines.items() if file == "/proc/loadavg"], 1),
        "celsius": _numbers([text for file, text in celsius.items() if file.rpartition("/")[0] not in unreal], 1e3),
        "mhz": _numbers([text for file, text in lines.items() if file.endswith("/scaling_cur_freq")], 1e3),
        "mhz_limit": _numbers([text for file, text in lines.items() if file.endswith("/scaling_max_freq")], 1e3),
        "gpu_mhz": _numbers(
            [text for file, text in lines.items() if file.endswith("/cur_freq") and _GPU.search(file.split("/")[-2])],
            1e6,
        ),
    }
    jetson = {
        name: value
        for line in done.stdout.splitlines()
        if not line.startswith("/")
        for name, value in tegrastats(line).items()
        if name in ("celsius", "mhz", "gpu_mhz", "power_mw")
    }
    return jetson | {name: max(values) for name, values in readings.items() if values}


def metered(command: Sequence[str], log: str) -> list[str]:
    """A command for a Jetson that also writes to the file `log` what `run_power_mw` reads."""
    return ["sh", "-c", _METERED, log, *command]


def run_power_mw(log: str) -> float | None:
    """The power of a Jetson's whole module while a program ran a network; None if it is not told.

    The median of the upper half of what was told each 0.1 s: a program that times a network first loads it, which takes
    less power.
    """
    told = sorted(found["power_mw"] for line in log.splitlines() if "power_mw" in (found := tegrastats(line)))
    return float(median(told[len(told) // 2 :])) if told else None


def _numbers(texts: Sequence[str], unit: float) -> list[float]:
    """The texts that are numbers, in a unit."""
    return [float(text) / unit for text in texts if re.fullmatch(r"-?\d{1,12}(\.\d{1,6})?", text.strip())]
