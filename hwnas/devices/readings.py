"""What machines say of themselves, as records: tegrastats on a Jetson, adb and an Android phone's services.

Every function is pure, and none raises: what is garbage, or of a later format, gives fewer values. Keys carry their
units; `mhz` and `celsius` mean what they do in `RunTimes.facts`, the fastest core's clock and the hottest zone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hwnas.devices.worker import WHOLE_MODULE

# Bounded, so that no text makes a number that Python refuses to read.
_INT, _FLOAT = r"\d{1,9}", r"\d{1,9}(?:\.\d{1,9})?"
_ZONE = re.compile(rf"(?<!\S)([A-Za-z]\w*)@(-?{_FLOAT})C\b", re.ASCII)
_RAIL = re.compile(rf"(?<!\S)([A-Z]\w+) ({_INT})(?:mW)?/{_INT}", re.ASCII)
_OFF_CELSIUS = -256.0  # of a zone whose hardware is switched off

_PHONE_STATES = (
    "device", "offline", "unauthorized", "authorizing", "connecting", "bootloader", "recovery", "rescue", "sideload",
    "host", "detached", "no permissions", "unknown",
)  # fmt: skip
_PHONE = re.compile(rf"(\S.*?) ({'|'.join(_PHONE_STATES)})(?![\w.-])(.*)")
_PROPERTY = re.compile(r"\[([^\]]+)\]: \[(.*)\]")
_TEMPERATURE = re.compile(
    rf"Temperature\{{mValue=(-?{_FLOAT}), mType=({_INT}), mName=([^}}]{{1,99}}?), mStatus=", re.ASCII
)
_NO_TEMPERATURE = {6, 7, 8}  # BCL_VOLTAGE, BCL_CURRENT, BCL_PERCENTAGE of android.hardware.thermal.TemperatureType


def tegrastats(line: str) -> dict[str, Any]:
    """One line of `tegrastats`, of JetPack 4 to 7.

    Returns:
        What of this is there: `mhz` (of the fastest core that is on), `gpu_mhz` (of the fastest of its clusters),
        `gpu_pct` (load), `celsius` (of the hottest zone), `zones_celsius` (of each, names in lower case), `power_mw`
        (now, of the whole module), `ram_mb` (used) and `ram_total_mb`. The zone `PMIC`, which is not measured but a
        constant, is left out.
    """
    found: dict[str, Any] = {}
    if ram := re.search(rf"\bRAM ({_INT})/({_INT})MB", line, re.ASCII):
        found |= {"ram_mb": int(ram[1]), "ram_total_mb": int(ram[2])}
    if cpu := re.search(r"\bCPU \[([^\]]{0,2000})\]", line):
        clocks = re.findall(rf"%@({_INT})\b", cpu[1], re.ASCII)
        if clocks:
            found["mhz"] = max(map(int, clocks))
    if gpu := re.search(rf"\bGR3D_FREQ (?:({_INT})%)?(?:@\[?([\d,]+))?", line, re.ASCII):
        if gpu[1]:
            found["gpu_pct"] = int(gpu[1])
        clocks = re.findall(rf"\b{_INT}\b", gpu[2] or "", re.ASCII)
        if clocks:
            found["gpu_mhz"] = max(map(int, clocks))
    zones = {name.lower(): float(celsius) for name, celsius in _ZONE.findall(line)}
    zones = {name: celsius for name, celsius in zones.items() if name != "pmic" and celsius != _OFF_CELSIUS}
    if zones:
        found |= {"celsius": max(zones.values()), "zones_celsius": zones}
    rails = {name: int(milliwatt) for name, milliwatt in _RAIL.findall(line)}
    for names in WHOLE_MODULE:
        if rails.keys() >= set(names):
            return found | {"power_mw": sum(rails[name] for name in names)}
    return found


@dataclass(frozen=True, slots=True)
class Phone:
    """A line of `adb devices -l`.

    Attributes:
        serial: what `adb -s` takes: of the phone, or `address:port`, or an mDNS name.
        state: `device` is one that can be used; `unauthorized`, `offline`, `no permissions`, ...
        model: with underscores for blanks, `Pixel_8_Pro`; empty where adb does not say, as the next two.
        product: the product's code name.
        device: the hardware's code name.
    """

    serial: str
    state: str
    model: str = ""
    product: str = ""
    device: str = ""

    @property
    def usable(self) -> bool:
        """Whether programs can be run there."""
        return self.state == "device"


def adb_devices(text: str) -> list[Phone]:
    """What `adb devices -l` printed, in its order, without what it says of its daemon."""
    phones = []
    _, _, lines = text.partition("List of devices attached")
    for line in lines.splitlines():
        if match := _PHONE.fullmatch(" ".join(line.split())):
            serial, state, rest = match.groups()
            words = dict(word.split(":", 1) for word in rest.split() if ":" in word)
            phones.append(Phone(serial, state, *(words.get(key, "") for key in ("model", "product", "device"))))
    return phones


def getprop(text: str) -> dict[str, str]:
    """What `getprop` printed: names and values. A value of several lines is left out."""
    matches = (_PROPERTY.fullmatch(line.strip()) for line in text.splitlines())
    return {match[1]: match[2] for match in matches if match}


def battery(text: str) -> dict[str, Any]:
    """What `dumpsys battery` printed.

    Returns:
        What of this is there: `battery_pct`, `battery_celsius`, `powered` (by any plug or pad), `charging`.
    """
    # The first of each name: makers add sections of their own below Android's.
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    numbers = {name: int(value) for name, value in values.items() if re.fullmatch(f"-?{_INT}", value, re.ASCII)}
    found: dict[str, Any] = {}
    if "level" in numbers and numbers.get("scale", 100) > 0:
        found["battery_pct"] = 100 * numbers["level"] / numbers.get("scale", 100)
    if "temperature" in numbers:
        found["battery_celsius"] = numbers["temperature"] / 10
    powered = [value == "true" for name, value in values.items() if name.endswith(" powered")]
    if powered:
        found["powered"] = any(powered)
    if "status" in numbers:
        found["charging"] = numbers["status"] == 2  # BatteryManager.BATTERY_STATUS_CHARGING
    return found


def thermal(text: str) -> dict[str, Any]:
    """What `dumpsys thermalservice` printed, on Android 10 and later.

    Returns:
        What of this is there: `thermal_status`, from 0 (none) over 3 (severe) to 6 (shutdown), as
        `PowerManager.THERMAL_STATUS_*`; `celsius` (of the hottest sensor) and `zones_celsius` (of each, by its name;
        those that the hardware reports now, not what Android keeps of earlier ones, where there are both).
    """
    found: dict[str, Any] = {}
    if status := re.search(r"^\s*Thermal Status: ([0-6])\s*$", text, re.MULTILINE):
        found["thermal_status"] = int(status[1])
    _, _, now = text.partition("Current temperatures from HAL")
    for part in (now, text):
        zones = {
            name: float(value) for value, kind, name in _TEMPERATURE.findall(part) if int(kind) not in _NO_TEMPERATURE
        }
        if zones:
            return found | {"celsius": max(zones.values()), "zones_celsius": zones}
    return found
