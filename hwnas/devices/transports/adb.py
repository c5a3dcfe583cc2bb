"""An Android phone as a device's transport, over USB or the network, by Android's own `adb` client."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from hwnas.devices import readings
from hwnas.devices.base import Check, DeviceGoneError
from hwnas.devices.transports.base import CONNECT_TIMEOUT_S, COPY_TIMEOUT_S, ConnectionLostError, Finished, Transport
from hwnas.errors import DeviceError

MIN_BATTERY_PCT = 20  # phones save power below it

_NETWORK = re.compile(r"\S+:\d+", re.ASCII)  # host:port
_FOLDER = "/data/local/tmp"  # the one place where adb's user may run programs
_GONE = "the phone went away: look at its cable"
_CONFIRM = "unlock the phone and confirm its dialog `Allow USB debugging?`"
_REMEDIES = {  # for states of `adb devices`
    "offline": "unplug the phone and plug it in again, or call `adb reconnect`",
    "unauthorized": _CONFIRM,
    "authorizing": _CONFIRM,
    "no permissions": "this user may not open its USB device: install Debian's android-sdk-platform-tools-common, or "
    "other udev rules, and join the group plugdev",
}

# What the client says when it cannot reach the phone or its server (adb 29 to 36).
_SAID = re.compile(
    r"^(?:adb|error): (?:error: )?(?:failed to get feature set: |connect failed: )*(?:"
    r"(?P<offline>device (?:still )?offline)|(?P<unauthorized>device (?:still )?(?:unauthorized|authorizing))|"
    r"(?P<permissions>insufficient permissions for device)|"
    r"(?P<gone>device '.*' not found|device not found|no devices(?:/emulators)? found|closed|protocol fault.*|"
    r"connection reset.*)|"
    r"(?P<server>cannot connect to daemon.*|failed to (?:check server version|start daemon).*))",
    re.MULTILINE,
)

# For `state`. A service or a file that is missing, or that may not be read, prints nothing.
_MARK = "---hwnas---"
_STATE = f"""dumpsys battery
echo {_MARK}
dumpsys thermalservice
echo {_MARK}
cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq
echo {_MARK}
cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_max_freq
echo {_MARK}
cat /sys/class/thermal/thermal_zone*/temp"""
_MAX_CELSIUS = 150.0  # a zone with more has no sensor

_ABOUT = {  # the first property that is set
    "phone": ("ro.product.model",),
    "android": ("ro.build.version.release",),
    "soc": ("ro.soc.model", "ro.board.platform"),
    "build": ("ro.build.id",),
}


class Adb(Transport):
    """Runs programs on an Android phone (7 or later), with the `adb` on PATH, or that of the package adbutils.

    The adb server is the user's own, at its usual port or as ADB_SERVER_SOCKET and ANDROID_ADB_SERVER_PORT say; the
    client starts it if need be. A phone whose serial is `host:port` is connected to if need be.

    Args:
        serial: of the phone, as `adb devices` prints it; None for the one phone that is attached and of `model`.
        model: the phone's ro.product.model, in which `*` stands for anything; not looked at where there is a serial.
        folder: where the temporary folder is made there; None for /data/local/tmp.
        common: see `Transport`.

    Attributes:
        address: `adb` and the serial. Without a serial in the device's file it is the model's until the phone is first
            opened: `Device.versions` does that, which comes before anything is locked.
    """

    announces = True

    def __init__(self, serial: str | None, *, model: str | None = None, folder: str | None = None, **common: Any):
        super().__init__(folder=folder or _FOLDER, **common)
        self._serial, self._model = serial, model
        self.address = f"adb {serial or model or 'phone'}"

    def argv(self, command: Sequence[str]) -> list[str]:
        """See `Transport`. The client joins its arguments with blanks, for the phone's shell: there is one, quoted.

        That shell leads a process group. It stays while the program runs (`exit`): what ends when the connection breaks
        is the shell alone, and not the `timeout` that ends the program.
        """
        script = f'echo "hwnas $$"; {shlex.join(command)}; exit'
        return [self._client, "-s", self._serial or "", "shell", "-T", script]

    def holder_argv(self, command: Sequence[str]) -> list[str]:
        """See `Transport`. The phone is looked for first."""
        self._serial = self._find()
        self.address = f"adb {_printable(self._serial)}"
        return self.argv(command)

    def failure(self, status: int, stderr: str) -> str | None:
        """See `Transport`.

        The client ends with 1 when it cannot reach the phone, and with 255 and no word when the connection breaks. A
        program may end so, too, but then the one that holds the phone runs on.
        """
        said = _SAID.search(stderr) if status == 1 else None
        if (said is None and status != 255) or not self._broken():
            return None
        if said is None:
            return _GONE
        if said["offline"]:
            return f"the phone is offline: {_REMEDIES['offline']}"
        if said["unauthorized"]:
            return f"the phone is not authorized: {_REMEDIES['unauthorized']}"
        if said["permissions"]:
            return f"no permissions: {_REMEDIES['no permissions']}"
        return f"adb's server: {said['server']}" if said["server"] else _GONE

    def copy(self, path: Path, there: str) -> None:
        """See `Transport`."""
        done = self._run_client("-s", self._serial or "", "push", str(path.absolute()), there, timeout_s=COPY_TIMEOUT_S)
        if done.status == 0:
            return
        if self._broken():
            self.lost()
            lost = self.failure(done.status, done.stderr) or _GONE
            raise ConnectionLostError(f"{self.address}: the connection broke: {lost}")
        errors = [line for line in done.stderr.splitlines() if line.startswith("adb: ")]  # then it counts the files
        raise DeviceError(Finished(done.status, "", errors[0] if errors else done.stderr).reason)

    def about(self) -> dict[str, str]:
        """The phone's model, system on a chip, and Android.

        Raises:
            DeviceError: the connection broke.
        """
        done = self.run(["getprop"])
        if done.status:
            raise DeviceError(f"{self.address}: getprop: {done.reason}")
        properties = readings.getprop(done.stdout)
        found = {}
        for name, keys in _ABOUT.items():
            values = (_printable(properties.get(key, "")) for key in keys)
            value = next((value for value in values if value and value.lower() != "unknown"), None)
            if value:
                found[name] = value
        return found

    def state(self) -> dict[str, Any]:
        """What the phone tells now.

        Returns:
            Of these: `battery_pct`, `battery_celsius`, `powered`, `charging`, `thermal_status` (0 where nothing is
            throttled), `celsius` (of the hottest sensor), `mhz` (of the fastest core).

        Raises:
            DeviceError: the connection broke.
        """
        output = self.run(["sh", "-c", _STATE]).stdout
        battery, thermal, clocks, limits, zones = (output.split(_MARK) + [""] * 4)[:5]
        found = readings.battery(battery)
        if khz := _numbers(clocks):
            found["mhz"] = max(khz) / 1000
        if khz := _numbers(limits):
            found["mhz_limit"] = max(khz) / 1000
        if celsius := [value for value in (milli / 1000 for milli in _numbers(zones)) if value <= _MAX_CELSIUS]:
            found["celsius"] = max(celsius)
        found |= readings.thermal(thermal)
        found.pop("zones_celsius", None)  # the hottest says enough for every round's record
        return found

    def check(self) -> Iterator[Check]:
        """Whether the phone can be reached, has room, is charged, and cool."""
        yield from (checks := list(super().check()))
        if not all(check.passed for check in checks):
            return
        try:
            state = self.state()
        except DeviceError as error:
            yield Check("state", self.address, str(error))
            return
        if "battery_pct" in state:
            powered = state.get("powered", True)
            low = state["battery_pct"] < MIN_BATTERY_PCT
            remedy = None if powered and not low else "charge the phone: it runs slower to save its battery"
            found = f"{state['battery_pct']:.0f}%, {'plugged in' if powered else 'not charging'}"
            yield Check("battery", found, remedy)
        if "thermal_status" in state:
            remedy = "let the phone cool down: it throttles" if state["thermal_status"] else None
            yield Check("temperature", f"thermal status {state['thermal_status']} of 0 to 6", remedy)

    # ------------------------------------------------------------ the client

    @cached_property
    def _client(self) -> str:
        """The path of adb."""
        found = shutil.which("adb")
        if found:
            return found
        with suppress(ImportError):
            import adbutils

            with suppress(adbutils.AdbError):
                return str(adbutils.adb_path())
        raise DeviceGoneError("there is no adb: install Android's platform-tools, or `pip install 'hwnas[android]'`")

    def _run_client(self, *arguments: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Finished:
        try:
            done = subprocess.run(
                [self._client, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                start_new_session=True,  # also of the server, which it may start
                check=False,
            )
        except subprocess.TimeoutExpired:
            command = next(argument for argument in arguments if argument not in ("-s", self._serial))
            raise DeviceError(f"{self.address}: `adb {command}` did not end within {timeout_s:g} s") from None
        except OSError as error:
            raise DeviceGoneError(f"{self._client} cannot be started: {error.strerror}") from None
        return Finished(done.returncode, done.stdout, done.stderr)

    def _broken(self) -> bool:
        """Whether the program that holds the phone has ended, too; it may end a moment later than another."""
        try:
            return self._holder is None or self._holder.wait(1) is not None
        except subprocess.TimeoutExpired:
            return False

    # ------------------------------------------------------------ choosing the phone

    def _find(self) -> str:
        """The phone's serial.

        Raises:
            DeviceGoneError: no phone can be used, or there are several.
        """
        attached = self._attached()
        if self._serial is None:
            pattern = re.sub("[^a-zA-Z0-9*]", "_", self._model or "*")  # as adb prints it
            usable = [phone for phone in attached if phone.usable and fnmatchcase(phone.model, pattern)]
        else:
            if _NETWORK.fullmatch(self._serial) and not any(phone.usable for phone in self._named(attached)):
                self._connect(self._serial)
                attached = self._attached()
            usable = [phone for phone in self._named(attached) if phone.usable]
        if len(usable) == 1:
            return usable[0].serial
        raise DeviceGoneError(_several(usable) if usable else self._none(attached))

    def _attached(self) -> list[readings.Phone]:
        done = self._run_client("devices", "-l")
        if done.status:
            raise DeviceGoneError(f"adb devices: {done.reason}")
        return readings.adb_devices(done.stdout)

    def _named(self, attached: list[readings.Phone]) -> list[readings.Phone]:
        return [phone for phone in attached if phone.serial == self._serial]

    def _connect(self, serial: str) -> None:
        """Connect to a phone on the network, if it can be reached."""
        # An old connection that broke is in the way: the server takes seconds to find the phone again, or gives it up.
        self._run_client("disconnect", serial)
        self._run_client("connect", serial)

    def _none(self, attached: list[readings.Phone]) -> str:
        """Why no phone can be used."""
        model = f"a phone of model {self._model}" if self._model else "a phone"
        wanted = f"phone {self._serial}" if self._serial else model
        listed = ", ".join(_described(phone) for phone in attached) or "none"
        # A phone that cannot be used does not tell its model, either.
        phones = self._named(attached) if self._serial else [phone for phone in attached if not phone.usable]
        remedies = dict.fromkeys(_REMEDIES[phone.state] for phone in phones if phone.state in _REMEDIES)
        remedy = "; ".join(remedies) or "connect it, and turn on USB debugging in its developer options"
        return f"adb: {wanted} is not ready: attached are {listed}; {remedy}"


def _several(phones: list[readings.Phone]) -> str:
    listed = ", ".join(_described(phone) for phone in phones)
    add = "`hwnas devices add NAME --base DEVICE --serial SERIAL`"
    return f"adb: several phones fit: {listed}; say which with `serial:` in the device's file, or {add}"


def _described(phone: readings.Phone) -> str:
    words = phone.model.replace("_", " ") if phone.usable and phone.model else phone.state
    return f"{_printable(phone.serial)} ({_printable(words)})"


def _numbers(text: str) -> list[int]:
    """The lines that are one."""
    return [int(line) for line in text.split("\n") if re.fullmatch(r"-?[0-9]{1,9}", line.strip())]


def _printable(text: str) -> str:
    """A phone's word, for messages and records: without what a terminal may take for a command."""
    return "".join(character for character in text if character.isprintable()).strip()[:100]
