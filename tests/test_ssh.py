"""Devices over ssh, with a real sshd on the loopback: everything that goes right, and all that can go wrong."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hwnas import api
from hwnas.devices import load_device
from hwnas.devices.base import DeviceGoneError
from hwnas.devices.transports.base import ConnectionLostError
from hwnas.devices.transports.ssh import Ssh
from hwnas.errors import DeviceError, InputError
from hwnas.testing import QUICK, DeviceContract
from tests.sshd import Sshd, programs
from tests.test_transports import HOSTILE, logged, wait_for

NOISE = 'echo "Welcome to the board"; printf "no end of line"; echo "and to stderr" >&2\n'
FOREVER = replace(QUICK, min_duration_s=100, timeout_s=100)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        if server.small is not None:  # else it is the developer's own home
            (server.home / ".bashrc").write_text(NOISE)
        yield server


@pytest.fixture
def own_server(tmp_path):
    (tmp_path / "sshd").mkdir()
    with Sshd(tmp_path / "sshd") as server:
        yield server


@pytest.fixture
def board(server, tmp_path):
    transport = Ssh("board", config=server.config, folder=str(tmp_path))
    yield transport
    transport.close()


def device_file(server, where, **changes):
    content = {
        "transport": "ssh",
        "host": "board",
        "ssh_config": str(server.config),
        "runtime": "onnxruntime",
        "python": f"{sys.executable} -P",
        "timing": {"rounds": 2, "max_rounds": 3, "min_duration_s": 0.002, "warmup_s": 0.0, "max_drift": 10.0},
    }
    where.mkdir(exist_ok=True)
    path = where / "board.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def shared_device(server, tmp_path_factory):
    with load_device(device_file(server, tmp_path_factory.mktemp("devices"))) as device:
        yield device


@pytest.fixture
def device(server, tmp_path):
    with load_device(device_file(server, tmp_path, folder=str(tmp_path))) as device:
        yield device


@pytest.fixture
def network(shared_device, tmp_path):
    return DeviceContract.write(shared_device, tmp_path)


def workers(device):
    """The PIDs of a device's workers there."""
    return programs(sys.executable, device._transport.folder)


def used_s(pid):
    """Processor time of a process."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


# -------------------------------------------------------------------- what goes right


class TestSsh(DeviceContract):
    @pytest.fixture
    def device(self, shared_device):
        return shared_device


def test_checks_the_device(shared_device):
    checks = list(shared_device.check())
    assert [check.step for check in checks] == ["reached", "room", "onnxruntime"]
    assert all(check.passed for check in checks)
    assert checks[0].found == "ssh board"


def test_profiles_and_predicts(server, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    device_file(server, run / "devices")
    found = api.profile("board", run, space="tiny", children=6)
    assert (found.num_children, found.num_failed) == (6, 0)
    smallest, biggest = (row["predicted_ms"] for row in api.predict("board", ["smallest", "biggest"], run))
    assert 0 < smallest < biggest


def test_programs_run_as_they_are(board):
    words = ["two words", "$HOME", "`id`", "'", '"', "line\nline", "-n", "*", "\\'", "ü", "!", ""]
    assert board.run(["printf", "%s|", *words]).stdout == "|".join(words) + "|"
    assert board.run(["sh", "-c", "exit 3"]).status == 3
    assert board.run(["sh", "-c", "echo $LC_ALL"]).stdout == "C\n"
    assert board.run(["cat"]).stdout == ""


def test_greetings_of_the_profile_are_there(server):
    if server.small is None:
        pytest.skip("the profile there is the developer's own")
    argv = ["ssh", "-F", server.config, "-o", "RemoteCommand=none", "-T", "board", "true"]
    argv[1:1] = ["-o", "ControlMaster=no", "-o", "NoHostAuthenticationForLocalhost=no"]
    assert "no end of line" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_statuses_of_the_program_are_not_of_the_connection(board):
    board.run(["true"])
    folder = board.folder
    assert board.run(["sh", "-c", "echo 'Connection refused' >&2; exit 255"]).status == 255
    assert board.run(["sh", "-c", "kill -KILL $$"]).status == 128 + signal.SIGKILL
    assert board.folder == folder


def test_one_connection_whatever_happens(own_server, tmp_path):
    board = Ssh("board", config=own_server.config)
    for _ in range(5):
        board.run(["true"])
    assert own_server.log.count("Accepted publickey") == 1
    socket = Path(board._socket)
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    socket.unlink()
    with pytest.raises(ConnectionLostError, match="the connection broke"):
        board.run(["true"])
    assert own_server.log.count("Accepted publickey") == 1
    board.run(["true"])
    assert own_server.log.count("Accepted publickey") == 2
    board.close()
    assert not socket.parent.exists()
    assert not list((Path.home() / ".ssh").glob("never-*"))  # the socket that the config asks for


def test_two_machines_at_once(server, own_server):
    said = {}

    def work(name, where):
        board = Ssh("board", config=where.config)
        said[name] = [board.run(["echo", f"{name} {number}"]).stdout for number in range(5)]
        board.close()

    threads = [threading.Thread(target=work, args=item) for item in {"a": server, "b": own_server}.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {name: [f"{name} {number}\n" for number in range(5)] for name in ("a", "b")}


def test_tells_what_it_is(board):
    assert board.about()["kernel"] == os.uname().release
    assert board.state()["load"] >= 0


# -------------------------------------------------------------------- names from outside


def test_hostile_names_end_up_nowhere(server, board, shared_device, network, tmp_path):
    hostile = network.rename(tmp_path / HOSTILE)
    assert shared_device.run(hostile, QUICK).latency_ms > 0
    (tmp_path / HOSTILE).with_suffix(".$(touch pwned)").write_bytes(b"part")
    assert board.run(["cat", board.send(hostile)]).status == 0
    for folder in (tmp_path, server.home, Path.cwd()):
        assert not list(folder.glob("**/pwned"))


@pytest.mark.parametrize(
    "name", ["$(touch pwned)", "-oProxyCommand=touch pwned", "a;b", "a b", "a\nb", "`a`", "a'", ""]
)
def test_hostile_hosts_are_refused(name):
    with pytest.raises(InputError, match="is no name of a host"):
        Ssh(name)


# -------------------------------------------------------------------- what breaks


def test_cut_in_the_middle_of_a_run(server, device, network, tmp_path):
    device.run(network, QUICK)
    old = Path(device._transport.folder)
    (pid,) = workers(device)
    begun_s = used_s(pid) + 0.2
    thread = threading.Thread(target=lambda: (wait_for(lambda: used_s(pid) > begun_s), server.cut()))
    thread.start()
    with pytest.raises(ConnectionLostError, match=r"device 'board': the connection broke: .*closed by remote host"):
        device.run(network, FOREVER)
    thread.join()
    assert device.run(network, QUICK).latency_ms > 0
    wait_for(lambda: not old.exists())
    device.close()
    assert not list(tmp_path.glob("hwnas-*"))


def test_cut_between_two_runs(server, device, network):
    device.run(network, QUICK)
    holder = device._transport._holder
    server.cut()
    holder.wait(10)
    assert device.run(network, QUICK).latency_ms > 0


def test_connection_that_hangs_is_replaced_after_it_is_undone(server, tmp_path):
    log = tmp_path / "log"
    board = Ssh(
        "board", config=server.config, folder=str(tmp_path), prepare=[logged(log, "a")], undo=[logged(log, "z")]
    )
    others = server.sessions()
    board.run(["true"])
    hung = [pid for pid in server.sessions() if pid not in others]
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)  # as if the network was down: the holder there learns nothing
    os.killpg(board._holder.pid, signal.SIGKILL)
    board._holder.wait()
    board.run(["true"])
    assert log.read_text().split() == ["a", "z", "a"]
    for pid in hung:
        os.kill(pid, signal.SIGKILL)
    board.close()
    assert log.read_text().split() == ["a", "z", "a", "z"]
    assert list(tmp_path.glob("hwnas-*")) == []


def test_killed_worker_is_replaced(device, network):
    device.run(network, QUICK)
    (pid,) = workers(device)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"device 'board': onnxruntime was ended by SIGKILL \(out of memory"):
        device.run(network, QUICK)
    assert device.run(network, QUICK).latency_ms > 0


def test_hanging_network_is_ended_there(device, network):
    device.run(network, QUICK)
    folder = device._transport.folder
    (pid,) = workers(device)
    os.kill(pid, signal.SIGSTOP)  # it ends neither with its input nor by its own limit
    with pytest.raises(DeviceError, match=r"did not answer within 0\.3 s, and was ended"):
        device.run(network, replace(QUICK, timeout_s=0.3))
    wait_for(lambda: not workers(device))
    assert device.run(network, QUICK).latency_ms > 0
    assert device._transport.folder == folder


@pytest.mark.parametrize("words", [[], ["timeout", "100"]])
def test_hanging_program_is_ended_there(words, board):
    seconds = f"100.{os.getpid()}"
    with pytest.raises(DeviceError, match=r"ssh board: `\w+` did not end within 0\.5 s"):
        board.run([*words, "sleep", seconds], timeout_s=0.5)
    wait_for(lambda: not programs("sleep", seconds))
    assert board.run(["echo", "on"]).stdout == "on\n"


def test_full_disk(server, tmp_path):
    if server.small is None:
        pytest.skip("a small disk there needs user namespaces (unshare --user --mount)")
    with load_device(device_file(server, tmp_path, folder=str(server.small))) as device:
        network = DeviceContract.write(device, tmp_path)
        assert device.run(network, QUICK).latency_ms > 0
        (tmp_path / "big.onnx").write_bytes(bytes(2_000_000))
        with pytest.raises(
            DeviceGoneError, match=rf"ssh board: big\.onnx could not be copied to {server.small}/.*: No space left on"
        ):
            device.run(tmp_path / "big.onnx", QUICK)
        network = network.rename(tmp_path / "anew.onnx")
        assert device.run(network, QUICK).latency_ms > 0  # the half file was removed
        remedies = {check.step: check.remedy for check in device.check()}
        assert remedies["room"] == f"make room in {server.small} there: 200 MB are enough"


def test_killed_process_leaves_nothing(server, tmp_path):
    (tmp_path / "there").mkdir()
    log = tmp_path / "log"
    script = f"""
import os
from pathlib import Path
from hwnas.devices.transports.ssh import Ssh
from tests.test_transports import logged
there, log = "{tmp_path}/there", "{log}"
prepare, undo = [logged(log, "a"), logged(log, "b")], [logged(log, "y"), logged(log, "z")]
board = Ssh("board", config=Path("{server.config}"), folder=there, prepare=prepare, undo=undo)
board.run(["true"])
print(Path(board._socket).parent, oct(Path(board.folder).stat().st_mode), flush=True)
os.kill(os.getpid(), 9)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    here, mode = done.stdout.split()
    assert mode == oct(0o40700)
    wait_for(lambda: not list((tmp_path / "there").iterdir()) and not Path(here).exists())
    assert log.read_text().split() == ["a", "b", "y", "z"]


# -------------------------------------------------------------------- what cannot be reached


def changed_key(server, tmp_path):
    server.stop()
    server.new_host_key()
    server.start()


def unknown_key(server, tmp_path):
    server.known_hosts.write_text("")


def wrong_user_key(server, tmp_path):
    (tmp_path / "sshd" / "authorized_keys").write_text("")


def server_down(server, tmp_path):
    server.stop()


def few_sessions(server, tmp_path):
    server.stop()
    server.configure("MaxSessions 1")
    server.start()


def no_shell(server, tmp_path):
    keys = tmp_path / "sshd" / "authorized_keys"
    keys.write_text(f'command="echo This account is not available; exit 1" {keys.read_text()}')


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (changed_key, r"THE HOST KEY OF \[127\.0\.0\.1\]:\d+ HAS CHANGED to SHA256:.*ssh-keygen -f \S+ -R '\[127"),
        (unknown_key, r"the host key of board is not known: connect once with `ssh -F \S+ board`, and check it"),
        (wrong_user_key, r"Permission denied \(publickey\): .* add a key with `ssh-copy-id -F \S+ board`"),
        (server_down, r"ssh board: connect to host 127\.0\.0\.1 .*Connection refused: .*no sshd listens there"),
        (no_shell, r"ssh board: This account is not available$"),
        (few_sessions, r"refused by peer: set `MaxSessions 10` in its sshd_config"),
    ],
)
def test_what_is_in_the_way_is_told(mishap, message, own_server, tmp_path):
    mishap(own_server, tmp_path)
    known = own_server.known_hosts.read_text()
    with load_device(device_file(own_server, tmp_path)) as device:
        with pytest.raises(DeviceGoneError, match=message) as caught:
            device.versions()
        assert "\n" not in str(caught.value)
    assert own_server.known_hosts.read_text() == known


def test_comes_back_after_a_restart(own_server, tmp_path):
    board = Ssh("board", config=own_server.config)
    board.run(["true"])
    own_server.stop()
    with pytest.raises(DeviceError):
        board.run(["true"])
    own_server.start()
    assert board.run(["echo", "on"]).stdout == "on\n"
    changed_key(own_server, tmp_path)
    with pytest.raises(DeviceGoneError, match="HAS CHANGED"):
        board.run(["true"])
    own_server.know()
    assert board.run(["echo", "on"]).stdout == "on\n"
    board.close()


def test_missing_things(server, tmp_path, monkeypatch):
    with pytest.raises(DeviceGoneError, match=r"Can't open user config file .*none"):
        Ssh("board", config=tmp_path / "none").run(["true"])
    with pytest.raises(DeviceGoneError, match=r"Could not resolve hostname no\.such\.invalid"):
        Ssh("no.such.invalid", config=server.config).run(["true"])
    missing = pytest.raises(DeviceGoneError, match=r"/no/such/python: not found; is onnxruntime installed there\?")
    with load_device(device_file(server, tmp_path, python="/no/such/python")) as device, missing:
        device.versions()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceGoneError, match=r"there is no ssh here: install OpenSSH's client"):
        Ssh("board", config=server.config).run(["true"])
