"""Phones: the real adb client, a daemon on loopback, and networks that LiteRT really runs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hwnas import api
from hwnas.devices import load_device
from hwnas.devices.base import DeviceGoneError, Timing
from hwnas.devices.transports.adb import Adb
from hwnas.errors import DeviceError
from hwnas.measuring.children import choose_children
from hwnas.measuring.measure import measure
from hwnas.run import Run
from hwnas.store import Store
from hwnas.testing import DeviceContract, tiny_space
from tests.fake_phone import BATTERY, GETPROP, THERMAL, AndroidPhone

pytest.importorskip("ai_edge_litert", reason="runs networks with LiteRT: pip install 'hwnas[litert]'")
if shutil.which("adb") is None:
    pytest.importorskip("adbutils", reason="needs adb: pip install 'hwnas[android]'")

ENVIRONMENT = dict(os.environ)
TIMING = {"warmup_s": 0, "warmup_runs": 3, "repeats": 20, "min_duration_s": 0, "rounds": 1, "max_rounds": 1}
SHORT = Timing(**TIMING)
HOSTILE = "$(touch {0}/pwned);`touch {0}/pwned`'\"&& touch {0}/pwned\n\x1b]0;pwned\x07\x1b[31m"


@pytest.fixture(scope="module", autouse=True)
def adb(tmp_path_factory):
    """Runs the client, on a server of these tests' own."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        patch.delenv("ADB_SERVER_SOCKET", raising=False)
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # for the keys it makes
        free.close()

        def run(*words):
            return subprocess.run([Adb(None)._client, *words], capture_output=True, text=True, check=True).stdout

        run("start-server")
        yield run
        run("kill-server")


@pytest.fixture
def phones(adb, tmp_path):
    """Makes phones, and connects adb's server to them."""
    made = []

    def make(model="Pixel 8", *, connected=True, **options):
        phone = AndroidPhone(tmp_path / f"phone {len(made)}", model, **options)
        made.append(phone)
        if connected:
            adb("connect", phone.serial)
        return phone

    yield make
    for phone in made:
        phone.__exit__()
        subprocess.run([Adb(None)._client, "disconnect", phone.serial], capture_output=True, check=False)


@pytest.fixture
def phone(phones):
    return phones()


def open_adb(phone, serial="given", **options):
    """The transport to a phone, which is closed at the end of a `with`."""
    return closing(Adb(phone.serial if serial == "given" else serial, folder=str(phone.temporary), **options))


def write_device(folder, phone, *, serial=True, **keys):
    """A device's file, pixel.yaml."""
    lines = {"transport": "adb", "tool": "benchmark_model", "program": phone.tool, "folder": phone.temporary, **keys}
    if serial:
        lines["serial"] = phone.serial
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pixel.yaml"
    path.write_text("".join(f"{key}: '{value}'\n" for key, value in lines.items()) + f"timing: {json.dumps(TIMING)}\n")
    return path


@pytest.fixture
def pixel(phone, tmp_path):
    with load_device(write_device(tmp_path, phone)) as device:
        yield device


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def left_on(phone):
    return list(phone.temporary.iterdir())


# -------------------------------------------------------------------- the device


class TestPhone(DeviceContract):
    @pytest.fixture
    def device(self, pixel):
        return pixel


def test_profile_to_predictor(phone, tmp_path):
    run = tmp_path / "run"
    write_device(run / "devices", phone)
    found = api.profile("pixel", run, space="tiny", children=5, kind="prior")
    assert (found.num_children, found.num_failed) == (5, 0)
    small, big = api.predict("pixel", ["smallest", "biggest"], run)
    assert 0 < small["predicted_ms"] < big["predicted_ms"]
    with Run(run).store() as store:
        first, *_ = store.measurements(device="pixel")
    assert first.versions.items() >= {"phone": "Pixel 8", "android": "14", "soc": "Tensor G3"}.items()
    facts = first.rounds[0].facts
    assert (facts["battery_pct"], facts["powered"], facts["thermal_status"], facts["celsius"]) == (83, True, 0, 36.5)
    assert not left_on(phone)


def test_unplugged_in_the_middle(pixel, phone, tmp_path):
    space = tiny_space()
    archs = choose_children(space, 3, np.random.default_rng(0), num_candidates=200)

    def unplug_while_it_measures(done, *_):
        if done == 1:
            known = len(phone.processes)
            running = lambda: any("benchmark_model" in process.args[-1] for process in phone.processes[known:])  # noqa: E731
            threading.Thread(target=lambda: (wait_until(running), phone.unplug())).start()

    with Store(tmp_path / "hwnas.db") as store:
        with pytest.raises(DeviceGoneError, match=rf"phone {phone.serial} is not ready: attached are none"):
            measure(archs, space, pixel, SHORT, store, report=unplug_while_it_measures)
        *kept, broken = store.measurements(device="pixel")
        assert [m.arch for m in kept] == archs[:1]
        assert all(m.error is None for m in kept)
        assert re.search(r"adb [\d.:]+: .*the phone went away: look at its cable", broken.error)
        wait_until(lambda: not left_on(phone))
        phone.plug()
        found = measure(archs, space, pixel, SHORT, store)
        assert all(m.error is None for m in found)
        assert [m.rounds for m in found[:1]] == [m.rounds for m in kept]


def test_a_network_that_fails_fails_alone(pixel, phone, tmp_path):
    space = tiny_space()
    garbage = tmp_path / "garbage.tflite"
    garbage.write_bytes(b"no network")
    small, big, middle = archs = choose_children(space, 3, np.random.default_rng(0), num_candidates=200)
    phone.env["MEMORY_BYTES"] = str(DeviceContract.write(pixel, tmp_path, largest=True).stat().st_size - 1)
    with Store(tmp_path / "hwnas.db") as store:
        first, killed, last = measure(archs, space, pixel, SHORT, store, files={small: garbage})
    assert "pixel" in first.error
    assert "ended by SIGKILL (out of memory" in killed.error
    assert last.latency_ms > 0
    assert (big, middle) == (killed.arch, last.arch)


def test_full_disk(phones, tmp_path):
    phone = phones(capacity=10_000)
    with load_device(write_device(tmp_path, phone)) as device:
        network = DeviceContract.write(device, tmp_path)
        assert network.stat().st_size > phone.capacity
        with pytest.raises(DeviceGoneError, match=r"smallest.tflite could not be copied to .*No space left on device"):
            device.run(network, SHORT)
        assert not list(phone.temporary.glob("*/*"))


# -------------------------------------------------------------------- which phone


def test_which_of_two(phones):
    eight, nine = phones("Pixel 8"), phones("Pixel 9 Pro")
    for given in ({"serial": nine.serial}, {"serial": None, "model": "Pixel 9*"}):
        with open_adb(nine, **given) as transport:
            assert transport.about()["phone"] == "Pixel 9 Pro"
            assert transport.address == f"adb {nine.serial}"
    both = rf"several phones fit: .*{eight.serial} \(Pixel 8\).*; say which with `serial:`.*hwnas devices add"
    for model in (None, "*", "P*l *"):
        with open_adb(eight, None, model=model) as transport, pytest.raises(DeviceGoneError, match=both):
            transport.run(["true"])
    for model in ("SM-N97*", "Pixel", "Pixel 9", "pixel 8", "Pixel ?"):
        neither = rf"adb: a phone of model {re.escape(model)} is not ready: attached are .*\(Pixel 9 Pro\)"
        with open_adb(eight, None, model=model) as transport, pytest.raises(DeviceGoneError, match=neither):
            transport.run(["true"])


def test_the_one_phone_has_one_lock(phone, tmp_path):
    with (
        load_device(write_device(tmp_path / "serial", phone)) as by_serial,
        load_device(write_device(tmp_path / "model", phone, serial=False, model="Pixel 8")) as by_model,
    ):
        assert by_serial.versions() == by_model.versions()
        assert by_serial.address == by_model.address == f"adb {phone.serial}"


def test_two_phones_at_once(phones, tmp_path):
    both = [phones("Pixel 8"), phones("Pixel 9")]
    devices = [load_device(write_device(tmp_path / str(number), phone)) for number, phone in enumerate(both)]
    network = DeviceContract.write(devices[0], tmp_path)

    def run(device):
        with device:
            return device.versions()["phone"], [device.run(network, SHORT).latency_ms for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, devices))
    assert [name for name, _ in found] == ["Pixel 8", "Pixel 9"]
    assert all(ms > 0 for _, times in found for ms in times)
    assert [sum("--graph" in process.args[-1] for process in phone.processes) for phone in both] == [2, 2]
    assert not any(map(left_on, both))


def test_network_phone_is_connected(phones):
    with open_adb(phones(connected=False)) as transport:
        assert transport.about()["phone"] == "Pixel 8"


def test_unauthorized(phones):
    phone = phones(authorized=False)
    refused = pytest.raises(DeviceGoneError, match=rf"{phone.serial} \(unauthorized\); unlock the phone and confirm")
    with open_adb(phone) as transport, refused:
        transport.run(["true"])


@pytest.mark.parametrize(
    ("listed", "serial", "message"),
    [
        ("", None, r"a phone is not ready: attached are none; connect it, and turn on USB debugging"),
        ("", "R5CT", r"phone R5CT is not ready: attached are none; connect it"),
        ("R5CT offline usb:1-1 transport_id:3", "R5CT", r"R5CT \(offline\); unplug the phone and plug it in again"),
        ("R5CT unauthorized usb:2-1 transport_id:3", None, r"R5CT \(unauthorized\); unlock the phone and confirm"),
        ("R5CT no permissions (user in plugdev group); see [http://x] usb:1-1", "R5CT", r"udev rules.*plugdev"),
        ("R5CT device model:Pixel_8\nZY22 offline", "ZY22", r"R5CT \(Pixel 8\), ZY22 \(offline\); unplug"),
    ],
)
def test_no_phone_is_ready(listed, serial, message, tmp_path, monkeypatch):
    client = tmp_path / "adb"
    client.write_text(f"#!/bin/sh\ncat <<'end'\nList of devices attached\n{listed}\nend\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DeviceGoneError, match=message):
        Adb(serial).run(["true"])


def test_without_adb(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "adbutils", None)
    with pytest.raises(DeviceGoneError, match=r"there is no adb: install .*platform-tools, or .*hwnas\[android\]"):
        Adb("R5CT").run(["true"])


# -------------------------------------------------------------------- the transport


def test_words_arrive_as_they_are(phone, tmp_path):
    hostile = HOSTILE.format(tmp_path)
    with open_adb(phone) as transport:
        done = transport.run(["sh", "-c", 'printf %s "$1"; printf %s "$2" >&2; exit 3', "sh", hostile, "a  b*"])
        assert (done.status, done.stdout, done.stderr) == (3, hostile, "a  b*")
        with (tmp_path / "input").open("w+b") as file:
            file.write(bytes(range(256)) * 1000)
            file.seek(0)
            assert transport.run(["wc", "-c"], stdin=file).stdout.strip() == "256000"
    assert not (tmp_path / "pwned").exists()


def test_a_hostile_name(pixel, phone, tmp_path):
    network = DeviceContract.write(pixel, tmp_path)
    hostile = network.rename(tmp_path / "$(touch pwned);'\".tflite")
    assert pixel.run(hostile, SHORT).latency_ms > 0
    assert not [folder for folder in (tmp_path, Path.cwd(), Path("/")) if (folder / "pwned").exists()]


def test_a_hostile_phone(phone, tmp_path):
    word = "\x1b[31m" + HOSTILE.format(tmp_path).replace("\n", "")
    phone.say("getprop", GETPROP.format(model=word))
    phone.say("battery", BATTERY.replace("83", word) + word)
    phone.say("thermalservice", "Thermal Status: " + word)
    with open_adb(phone) as transport:
        about = transport.about()
        assert about["phone"].startswith("[31m$(touch")
        assert all(value.isprintable() for value in about.values())
        state = transport.state()
        assert state["battery_celsius"] == 28.7
        assert not state.keys() & {"battery_pct", "thermal_status"}
        assert all(check.passed for check in transport.check())
    assert not (tmp_path / "pwned").exists()


def test_programs_may_end_like_the_client(phone):
    with open_adb(phone) as transport:
        transport.run(["true"])
        folder = transport.folder
        assert transport.run(["sh", "-c", "exit 255"]).status == 255
        assert transport.run(["sh", "-c", "echo 'adb: device offline' >&2; exit 1"]).status == 1
        assert transport.folder == folder


def test_a_program_that_hangs_is_ended(phone, tmp_path):
    with open_adb(phone) as transport:
        transport.run(["true"])
        hang = ["sh", "-c", 'sleep 600 & echo $! >"$1"; wait', "sh", str(tmp_path / "pid")]
        with pytest.raises(DeviceError, match=r"`sh` did not end within 0\.5 s"):
            transport.run(hang, timeout_s=0.5)
        pid = (tmp_path / "pid").read_text().strip()
        wait_until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
        assert transport.run(["echo", "again"]).stdout == "again\n"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("error: device 'R5CT' not found", "the phone went away"),
        ("adb: error: failed to get feature set: device offline", "the phone is offline: unplug"),
        (
            "adb: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set",
            "the phone is not authorized: unlock",
        ),
        ("adb: no devices/emulators found", "the phone went away"),
        ("error: closed", "the phone went away"),
        ("error: protocol fault (couldn't read status): Connection reset by peer", "the phone went away"),
        ("adb: insufficient permissions for device: missing udev rules?", "no permissions: .*udev rules"),
        ("adb: cannot connect to daemon at tcp:5037: Connection refused", "adb's server: cannot connect to daemon"),
    ],
)
def test_what_the_client_says(said, line):
    assert re.match(line, Adb("R5CT").failure(1, f"{said}\n"))
    assert Adb("R5CT").failure(0, said) is None


def test_the_server_was_killed(phone, adb):
    with open_adb(phone) as transport:
        transport.run(["true"])
        first = transport.folder
        adb("kill-server")
        wait_until(lambda: transport._holder.poll() is not None and not Path(first).exists())
        assert transport.run(["echo", "again"]).stdout == "again\n"
        assert transport.folder != first


# -------------------------------------------------------------------- what is left on the phone


def test_folder_is_private_and_goes(phone, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    with open_adb(phone) as transport:
        there = Path(transport.send(tmp_path / "file.txt"))
        assert there.read_text() == "x"
        assert there.parent.parent == phone.temporary
        assert there.parent.stat().st_mode & 0o777 == 0o700
    assert not left_on(phone)


def test_folder_goes_when_we_are_killed(phone):
    script = (
        "import os, sys; from hwnas.devices.transports.adb import Adb\n"
        "phone = Adb(sys.argv[1], folder=sys.argv[2]); phone.send(__import__('pathlib').Path(sys.argv[3]))\n"
        "print(len(os.listdir(phone.folder)), flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script, phone.serial, str(phone.temporary), __file__]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n")
    wait_until(lambda: not left_on(phone))


def test_unplugged_while_copying(phone, tmp_path):
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(100_000_000))
    with open_adb(phone) as transport:
        transport.run(["true"])
        copying = lambda: any(file.stat().st_size for file in phone.temporary.glob("*/*"))  # noqa: E731
        unplug = threading.Thread(target=lambda: (wait_until(copying), phone.unplug()))
        unplug.start()
        with pytest.raises(DeviceError, match="the phone went away"):
            transport.send(big)
        unplug.join()
        wait_until(lambda: not left_on(phone))
        phone.plug()
        assert Path(transport.send(tmp_path / "big.bin")).stat().st_size == len(big.read_bytes())


# -------------------------------------------------------------------- the check


def test_check(phone):
    with open_adb(phone) as transport:
        found = {check.step: check for check in transport.check()}
    assert [*found] == ["reached", "room", "battery", "temperature"]
    assert all(check.passed for check in found.values())
    assert found["battery"].found == "83%, plugged in"


@pytest.mark.parametrize(
    ("service", "text", "step", "found", "remedy"),
    [
        ("battery", BATTERY.replace("83", "12"), "battery", "12%, plugged in", "charge the phone"),
        ("battery", BATTERY.replace("true", "false"), "battery", "83%, not charging", "charge the phone"),
        ("thermalservice", THERMAL.replace("Status: 0", "Status: 3"), "temperature", "status 3", "cool down"),
    ],
)
def test_check_finds(service, text, step, found, remedy, phone):
    phone.say(service, text)
    with open_adb(phone) as transport:
        (check,) = [check for check in transport.check() if not check.passed]
    assert check.step == step
    assert found in check.found
    assert remedy in check.remedy


def test_a_phone_that_says_nothing(phone):
    for service in ("getprop", "battery", "thermalservice"):
        phone.say(service, "Can't find service\n")
    with open_adb(phone) as transport:
        assert transport.about() == {}
        assert not transport.state().keys() & {"battery_pct", "thermal_status", "powered"}
        assert [check.step for check in transport.check()] == ["reached", "room"]


# -------------------------------------------------------------------- a real phone


@pytest.mark.phone
def test_a_real_phone(monkeypatch, tmp_path):
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_PORT", "HOME"):  # the user's own server has the phone
        if name in ENVIRONMENT:
            monkeypatch.setenv(name, ENVIRONMENT[name])
        else:
            monkeypatch.delenv(name, raising=False)
    (tmp_path / "file.bin").write_bytes(bytes(range(256)) * 10_000)
    with closing(Adb(os.environ["HWNAS_TEST_PHONE"])) as transport:
        assert transport.about().keys() == {"phone", "android", "soc", "build"}
        assert transport.state().keys() >= {"battery_pct", "battery_celsius", "powered", "celsius", "mhz"}
        assert [check.step for check in transport.check()][:3] == ["reached", "room", "battery"]
        assert transport.run(["sh", "-c", 'printf %s "$1"; exit 255', "sh", HOSTILE]).stdout == HOSTILE
        there, folder = transport.send(tmp_path / "file.bin"), transport.folder
        assert transport.run(["stat", "-c", "%a", folder]).stdout == "700\n"
        assert transport.run(["wc", "-c", there]).stdout.split()[0] == "2560000"
        transport.close()
        assert transport.run(["ls", folder]).status != 0
