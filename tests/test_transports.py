"""What all transports share, tried on a machine that is this one; and what Linux tells about itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hwnas.devices.base import DeviceGoneError
from hwnas.devices.transports import base, linux
from hwnas.devices.transports.base import MAX_COPIES, ConnectionLostError, Finished, Transport
from hwnas.devices.transports.host import Host
from hwnas.errors import DeviceError
from hwnas.files import parts

HOSTILE = """$(touch pwned);'".onnx"""


class Near(Transport):
    """Reaches this host as if it were another: files are copied, programs announced, and a profile greets."""

    address = "near"
    announces = True

    def argv(self, command):
        return ["sh", "-c", 'echo welcome; printf hello; echo "hwnas $$"; "$@"; exit', "sh", *command]

    def failure(self, status, stderr):
        return "the cable is out" if status == 99 else None


@pytest.fixture
def near(tmp_path):
    transport = Near(folder=str(tmp_path))
    yield transport
    transport.close()


def logged(path, word):
    return ["sh", "-c", f'echo {word} >>"$0"', str(path)]


def wait_for(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.025)
    pytest.fail("it does not happen")


# -------------------------------------------------------------------- programs


def test_programs_run_as_they_are(near):
    words = ["two words", "$HOME", "`id`", "'", '"', "line\nline", "-n", "*", "\\", "ü", ""]
    done = near.run(["printf", "%s|", *words])
    assert done == Finished(0, "|".join(words) + "|", "")
    assert near.run(["sh", "-c", "echo no >&2; exit 3"]) == Finished(3, "", "no\n")


def test_reason_is_the_last_line():
    assert Finished(1, "out", "one\ntwo\n").reason == "two"
    assert Finished(1, "out\n", " ").reason == "out"
    assert Finished(7, "", "").reason == "it ended with status 7 and said nothing"


@pytest.mark.parametrize("kind", [Near, Host])
def test_what_takes_too_long_is_ended_with_all_it_started(kind, tmp_path):
    transport = kind()
    script = 'sleep 100 & echo $! >"$0"; wait'
    with pytest.raises(DeviceError, match=r"`sh` did not end within 0\.3 s"):
        transport.run(["sh", "-c", script, str(tmp_path / "pid")], timeout_s=0.3)
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
    assert transport.run(["echo", "on"]).stdout == "on\n"
    transport.close()


def test_broken_connection_is_opened_anew(near, tmp_path):
    near.run(["true"])
    before = near.folder
    with pytest.raises(ConnectionLostError, match="near: the connection broke: the cable is out"):
        near.run(["sh", "-c", "exit 99"])
    assert near.folder == ""
    near.run(["true"])
    assert near.folder != before
    assert [path.name for path in tmp_path.glob("hwnas-*")] == [Path(near.folder).name]


# -------------------------------------------------------------------- files


def test_sends_a_file_once(near, tmp_path):
    file = tmp_path / HOSTILE
    file.write_bytes(bytes(range(256)) * 1000)
    there = Path(near.send(file))
    assert there.parent == Path(near.folder)
    assert there.suffix == ".onnx"
    assert there.read_bytes() == file.read_bytes()
    assert near.send(file) == str(there)
    file.write_bytes(b"another one")
    assert Path(near.send(file)).read_bytes() == b"another one"
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_parts_go_along_and_neighbours_do_not(near, tmp_path):
    for name in ("m.param", "m.bin", "m.zzz.param", "m.int8.bin", "mm.bin", "m"):
        (tmp_path / name).write_text(name)
    assert {path.name for path in parts(tmp_path / "m.param")} == {"m.param", "m.bin"}
    there = Path(near.send(tmp_path / "m.param"))
    assert {path.suffix: path.read_text() for path in there.parent.iterdir()} == {".param": "m.param", ".bin": "m.bin"}
    (tmp_path / "m.bin").write_text("other weights")
    assert Path(near.send(tmp_path / "m.param")).with_suffix(".bin").read_text() == "other weights"
    assert Path(near.send(tmp_path / "m")).read_text() == "m"


def test_keeps_the_files_last_used(near, tmp_path):
    files = [tmp_path / f"{number}.onnx" for number in range(MAX_COPIES + 3)]
    for file in files:
        file.write_text(file.name)
    first = near.send(files[0])
    for file in files[1:]:
        near.send(file)
        assert near.send(files[0]) == first
    assert len(list(Path(near.folder).iterdir())) == MAX_COPIES
    assert Path(near.send(files[1])).read_text() == "1.onnx"


def test_what_cannot_be_sent(near, tmp_path):
    with pytest.raises(DeviceError, match=r"none\.onnx: No such file"):
        near.send(tmp_path / "none.onnx")
    with pytest.raises(DeviceError, match="Is a directory"):
        near.send(tmp_path)


def test_half_a_copy_is_none(near, tmp_path, monkeypatch):
    near.run(["true"])
    cat = tmp_path / "cat"
    for script, message in (
        ("head -c 4; exit 0", "4 of 8 bytes arrived"),
        ("head -c 4; echo 'cat: write error: Interrupted' >&2; exit 1", "Interrupted"),
        ("head -c 4; exit 99", "the cable is out"),
    ):
        file = tmp_path / f"{len(message)}.onnx"
        file.write_bytes(b"12345678")
        cat.write_text(f"#!/bin/sh\n{script}\n")
        cat.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            if "99" in script:
                patch.setattr(Near, "failure", lambda self, status, stderr: "the cable is out" if status else None)
            with pytest.raises(DeviceError, match=message):
                near.send(file)
        assert Path(near.send(file)).read_bytes() == b"12345678"


def test_full_disk_is_the_machines_fault(near, tmp_path, monkeypatch):
    file = tmp_path / "quota.onnx"
    file.write_bytes(b"1")
    for said in ("cat: write error: No space left on device", "sh: cannot create x: Disk quota exceeded"):
        monkeypatch.setattr(Near, "run", lambda *_, said=said, **__: Finished(1, "", said))
        with pytest.raises(DeviceGoneError, match=said):
            near.send(file)
    monkeypatch.setattr(Near, "run", lambda *_, **__: Finished(1, "", "cat: write error: Input/output error"))
    with pytest.raises(DeviceError) as caught:
        near.send(file)
    assert not isinstance(caught.value, DeviceGoneError)


# -------------------------------------------------------------------- the folder, preparing, undoing


@pytest.mark.parametrize("hostile", ["with space", "$(touch pwned)", "-dash", "quo'te\""])
def test_folder_is_private_and_goes_at_close(hostile, tmp_path, monkeypatch):
    parent = tmp_path / hostile
    parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", hostile)
    near = Near()
    near.run(["true"])
    folder = Path(near.folder)
    assert folder.parent == parent
    assert folder.stat().st_mode & 0o777 == 0o700
    near.close()
    assert not folder.exists()
    assert not list(tmp_path.rglob("pwned"))


def test_folder_that_cannot_be(tmp_path):
    with pytest.raises(DeviceGoneError, match=r"near: .*cd: .*none"):
        Near(folder=str(tmp_path / "none")).run(["true"])
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(DeviceGoneError, match=r"near: cannot be used: .*/a$"):
        Near(folder=str(tmp_path / "a\nb")).run(["true"])


def test_prepared_once_and_undone_once_in_order(tmp_path):
    log = tmp_path / "log"
    near = Near(
        prepare=[logged(log, "a"), logged(log, "b")], undo=[["exit", "1"], logged(log, "y"), ["if"], logged(log, "z")]
    )
    for _ in range(2):
        near.run(["true"])
        near.run(["true"])
        assert log.read_text().split() == ["a", "b"]
        near.close()
        near.close()
        assert log.read_text().split() == ["a", "b", "y", "z"]
        log.unlink()


def test_failed_preparation_is_undone(tmp_path):
    log = tmp_path / "log"
    fails = ["sh", "-c", "echo begun; echo 'no such mode' >&2; exit 4"]
    near = Near(folder=str(tmp_path), prepare=[logged(log, "a"), fails, logged(log, "b")], undo=[logged(log, "z")])
    for times in (1, 2):
        with pytest.raises(DeviceGoneError, match=r"near: preparing it, `sh -c .*`, failed: no such mode"):
            near.run(["true"])
        assert log.read_text().split() == ["a", "z"] * times
    assert list(tmp_path.iterdir()) == [log]


def test_interrupted_preparation_is_undone(tmp_path, monkeypatch):
    log = tmp_path / "log"
    near = Near(folder=str(tmp_path), prepare=[logged(log, "a")], undo=[logged(log, "z")])
    real = base._line

    def interrupt(process, timeout_s, **options):
        line = real(process, timeout_s, **options)
        if line == "prepared":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(base, "_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        near.run(["true"])
    assert near.folder == ""
    assert log.read_text().split() == ["a", "z"]
    assert list(tmp_path.iterdir()) == [log]


def test_programs_of_the_preparation_can_be_ended_by_signals(tmp_path):
    with_preparation = Near(prepare=[["sh", "-c", f"grep SigIgn /proc/self/status >{tmp_path}/ignored"]])
    with_preparation.run(["true"])
    with_preparation.close()
    ignored = int((tmp_path / "ignored").read_text().split()[1], base=16)
    numbers = [signal.SIGTERM]  # a shell may have started us with others ignored, which nobody can change back
    numbers += [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    assert [number for number in numbers if ignored >> (number - 1) & 1] == []


def test_killed_process_leaves_nothing(tmp_path):
    script = """
import os, sys
from tests.test_transports import Near, logged
near = Near(folder=sys.argv[1], prepare=[logged(sys.argv[2], "a")], undo=[logged(sys.argv[2], "z")])
near.run(["true"])
os.kill(os.getpid(), 9)
"""
    (tmp_path / "there").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "there", tmp_path / "log"],
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not list((tmp_path / "there").iterdir()))
    assert (tmp_path / "log").read_text().split() == ["a", "z"]


def test_check(near, tmp_path):
    reached, room = near.check()
    assert reached.passed
    assert "MB free" in room.found
    (failed,) = Near(folder=str(tmp_path / "none")).check()
    assert not failed.passed
    assert "none" in str(failed.remedy)


# -------------------------------------------------------------------- what Linux tells


class Told(Host):
    """A machine that prints what it is told to."""

    def __init__(self, text):
        super().__init__()
        self._text = text

    def run(self, command, **_):
        return Finished(2, self._text, "grep: /sys/class/none: No such file or directory\n")


JETSON = """processor:model name\t: ARMv8 Processor rev 1 (v8l)

board: NVIDIA Jetson AGX Orin Developer Kit\0
kernel: 5.15.148-tegra
l4t: # R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64

"""

JETSON_STATE = """/proc/loadavg:0.58 0.40 0.29 2/581 91934
/sys/class/thermal/thermal_zone0/type:cpu-thermal
/sys/class/thermal/thermal_zone1/type:PMIC-Die
/sys/class/thermal/thermal_zone2/type:gpu-thermal
/sys/class/thermal/thermal_zone0/temp:48562
/sys/class/thermal/thermal_zone1/temp:100000
/sys/class/thermal/thermal_zone2/temp:-256000
/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq:729600
/sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq:2201600
/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq:1984000
/sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq:2208000
/sys/class/devfreq/15340000.vic/cur_freq:115200000
/sys/class/devfreq/17000000.ga10b/cur_freq:306000000
"""


def test_what_a_jetson_is():
    assert Told(JETSON).about() == {
        "processor": "ARMv8 Processor rev 1 (v8l)",
        "board": "NVIDIA Jetson AGX Orin Developer Kit",
        "kernel": "5.15.148-tegra",
        "l4t": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
    }
    assert Told(JETSON_STATE).state() == {
        "load": 0.58,
        "celsius": 48.562,
        "mhz": 2201.6,
        "mhz_limit": 2208,
        "gpu_mhz": 306,
    }


def test_a_jetson_tells_its_power(near, tmp_path):
    tool = tmp_path / "tegrastats"
    tool.write_text(
        "#!/bin/sh\n"
        'while echo "RAM 1/2MB (lfb 1x4MB) CPU [1%@729,off] GR3D_FREQ 0% cpu@48.468C VDD_IN 4761mW/4778mW"; do\n'
        "    sleep 0.1\ndone\n"
    )
    tool.chmod(0o755)
    assert "power_mw" not in near.state()
    done = near.run(["sh", "-c", f'PATH="{tmp_path}:$PATH"; {linux._STATE}'])
    assert Told(done.stdout).state()["power_mw"] == 4761


@pytest.mark.parametrize("text", ["", "nonsense", "/proc/loadavg:\n/x/temp:nan\n/y/temp:\n:\n", "board:\nprocessor::"])
def test_what_is_not_told_is_absent(text):
    assert Told(text).about() == {}
    assert Told(text).state() == {}


def test_this_machine_tells(near):
    host = Host()
    assert host.about()["kernel"] == os.uname().release
    assert host.state()["load"] >= 0
    assert host.about() == linux.about(near)
    host.close()
