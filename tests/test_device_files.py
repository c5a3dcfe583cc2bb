"""Device files, the catalogue, `hwnas devices`, and profiling several at a time."""

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

import hwnas
from hwnas import api
from hwnas.cli import main
from hwnas.devices import device_files, load_device, load_spec, user_folder
from hwnas.devices.base import Check, Timing
from hwnas.devices.worker_device import WorkerDevice
from hwnas.errors import DeviceError, InputError
from hwnas.measurement import Measurement
from hwnas.measuring.diagnose import diagnose
from hwnas.testing import QUICK, DeviceContract, FakeDevice, tiny_space

CATALOGUE = Path(str(hwnas.__file__)).parent / "devices" / "catalog"
QUICKLY = {"rounds": 2, "max_rounds": 2, "min_duration_s": 0.001, "warmup_s": 0.0, "max_drift": 10.0, "max_error": 10.0}


def write(folder: Path, name: str, **content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_cli(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


# -------------------------------------------------------------------- files


def test_device_files(tmp_path):
    write(tmp_path, "board", transport="host", runtime="onnxruntime", timing={"threads": 2, "rounds": 3})
    assert {"board", "cpu"} <= set(device_files(tmp_path))
    board = load_device("board", tmp_path)
    assert (board.name, board.timing) == ("board", Timing(threads=2, rounds=3))
    assert load_device(tmp_path / "board.yaml").name == "board"
    assert load_device("cpu", tmp_path / "missing").name == "cpu"


def test_cores_of_a_device_file(tmp_path):
    core = max(os.sched_getaffinity(0))
    write(tmp_path, "pinned", base="cpu", cores=[core])
    with load_device("pinned", tmp_path) as device:
        network = DeviceContract.write(device, tmp_path)
        assert device.run(network, QUICK).facts["cores"] == [core]


def test_a_file_builds_on_another(tmp_path):
    write(tmp_path, "two", base="cpu", timing={"threads": 2}, description="mine")
    name, spec = load_spec("two", tmp_path)
    assert (name, spec.runtime, spec.timing, spec.description) == ("two", "onnxruntime", Timing(threads=2), "mine")
    write(tmp_path, "cpu", base="cpu", precision="int8")  # hides the catalogue's, and builds on it
    assert load_spec("cpu", tmp_path)[1].precision == "int8"
    assert load_spec("cpu", tmp_path)[1].runtime == "onnxruntime"


def test_bases_that_lead_nowhere(tmp_path):
    write(tmp_path, "a", base="b")
    write(tmp_path, "b", base="a")
    with pytest.raises(InputError, match=r"b\.yaml:1: base: a builds on itself"):
        load_spec("a", tmp_path)
    write(tmp_path, "c", base="none")
    with pytest.raises(InputError, match="unknown device 'none'"):
        load_spec("c", tmp_path)
    write(tmp_path, "d", base=["cpu"])
    with pytest.raises(InputError, match=r"d\.yaml:1: base: must be the name of a device, not \['cpu'\]"):
        load_spec("d", tmp_path)


def test_unknown_device(tmp_path):
    with pytest.raises(InputError, match=r"unknown device 'cpus': not one of .*; did you mean 'cpu'\?"):
        load_device("cpus")
    with pytest.raises(InputError, match=r"unknown device 'fridge': not one of .*; add yours with `hwnas devices add`"):
        load_device("fridge")
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        load_device(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transport: host\nruntime: onnx\n", r"runtime 'onnx' is not one of .*onnxruntime"),
        ("transport: host\ntool: perf\n", r"tool 'perf' is not one of .*benchmark_model"),
        ("transport: host\n", r"a device has either a runtime, which Python drives, or a tool"),
        ("transport: host\nruntime: onnxruntime\ntool: trtexec\n", r"either a runtime.* or a tool"),
        ("transport: host\nruntime: onnxruntime\nthreads: 2\n", r":3: threads: is not a known key"),
        ("transport: host\nruntime: onnxruntime\ntiming:\n  rounds: 0\n", r":3: timing: rounds=0: must be at least 1"),
        ("transport: host\nruntime: onnxruntime\nhost: jetson\n", r"host: transport host has no such key"),
        ("transport: ssh\nruntime: onnxruntime\nserial: A1\n", r"serial: transport ssh has no such key"),
        ("transport: host\nruntime: onnxruntime\nprogram: /bin/x\n", r"program: is only for devices with a tool"),
        ("transport: adb\ntool: benchmark_model\npython: python3\n", r"python: is only for devices with a runtime"),
        ("transport: host\nruntime: litert\nprecision: bf16\n", r"precision 'bf16': litert knows fp32"),
        ("transport: ssh\nruntime: onnxruntime\nhost: -oProxyCommand=x\n", r"host='-oProxyCommand=x': must not start"),
        ("transport: adb\ntool: benchmark_model\nserial: -e\n", r"serial='-e': must not start with -"),
    ],
)
def test_mistakes_in_a_device_file(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=f"bad.yaml.*{message}"):
        load_device("bad", tmp_path)


# -------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize("path", sorted(CATALOGUE.glob("*.yaml")), ids=lambda path: path.stem)
def test_catalogue(path):
    name, spec = load_spec(path)
    device = spec.open(name)  # reaches for nothing
    assert device.name == path.stem
    assert device.accepts == spec.accepts
    assert spec.description
    assert bool(spec.prepare) == bool(spec.undo)
    assert all(shlex.split(command) for command in (*spec.prepare, *spec.undo))
    if spec.transport != "host":
        assert spec.install


def test_catalogue_has_what_people_deploy_to():
    cpus = {"cpu", "cpu-litert", "cpu-openvino", "cpu-executorch", "cpu-ncnn"}
    jetsons = {"jetson", "jetson-nano", "jetson-tx2", "jetson-xavier", "jetson-orin-nano", "jetson-agx-orin"}
    phones = {"pixel", "pixel-3", "pixel-4", "pixel-6", "pixel-8", "galaxy-note10"}
    boards = {"raspberry-pi-4", "raspberry-pi-5", "nvidia-gpu"}
    assert cpus | jetsons | phones | boards | {f"{phone}-gpu" for phone in phones - {"pixel"}} <= set(device_files())
    for family, default in (("jetson", "jetson-orin-nano"), ("pixel", "pixel-8")):
        assert yaml.safe_load((CATALOGUE / f"{family}.yaml").read_text())["base"] == default


# -------------------------------------------------------------------- hwnas devices


def test_list_and_show(capsys):
    code, out, _ = run_cli(capsys, "devices")
    assert code == 0
    assert "jetson-orin-nano" in out
    code, out, _ = run_cli(capsys, "devices", "--json")
    listed = {device["name"]: device for device in json.loads(out)["devices"]}
    assert listed["pixel-8"]["transport"] == "adb"
    assert listed["pixel-8"]["runtime"] == "litert (benchmark_model)"
    code, out, _ = run_cli(capsys, "devices", "show", "jetson")
    assert code == 0
    assert "transport: ssh" in out
    assert "to install there:" in out
    code, _, err = run_cli(capsys, "devices", "show", "jetsn")
    assert code == 2
    assert "did you mean 'jetson'?" in err


def test_add_check_and_remove(capsys, tmp_path):
    code, out, _ = run_cli(capsys, "devices", "add", "mine", "--base", "cpu", "-o", "timing.threads=2")
    assert code == 0
    assert out.splitlines()[-1] == "next: hwnas devices check mine"
    assert load_device("mine").timing.threads == 2
    code, _, err = run_cli(capsys, "devices", "add", "mine", "--base", "cpu")
    assert code == 2
    assert "is there already: remove it with `hwnas devices remove mine`" in err
    assert run_cli(capsys, "devices", "add", "mine", "--base", "cpu", "-o", "timing.threads=1", "--overwrite")[0] == 0
    assert load_device("mine").timing.threads == 1
    code, out, _ = run_cli(capsys, "devices", "check", "mine", "--seconds", "0.1", "--json")
    steps = [step["step"] for step in json.loads(out)["steps"]]
    assert steps == ["reached", "room", "onnxruntime", "file", "state", "measurement"]
    assert run_cli(capsys, "devices", "remove", "mine")[0] == 0
    code, _, err = run_cli(capsys, "devices", "remove", "mine")
    assert code == 2
    assert "not one that you added" in err


def test_add_a_board(capsys):
    words = ["devices", "add", "orin", "--base", "jetson-orin-nano", "--host", "me@10.0.0.7", "--port", "2222"]
    assert run_cli(capsys, *words)[0] == 0
    _, spec = load_spec("orin")
    assert (spec.host, spec.port, spec.runtime) == ("me@10.0.0.7", 2222, "tensorrt")


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "-x", "a b", "$(touch x)", ".hidden"])
def test_names_that_are_paths(name):
    with pytest.raises(InputError, match="letters, digits, dots, dashes and underscores only"):
        api.add_device(name, "cpu")
    with pytest.raises(InputError, match="letters, digits"):
        api.remove_device(name)


def test_add_leaves_nothing_after_a_mistake(capsys):
    code, _, err = run_cli(capsys, "devices", "add", "mine", "--base", "cpu", "--host", "board")
    assert code == 2
    assert err.strip() == "hwnas: mine:1: host: transport host has no such key"
    words = ["devices", "add", "mine", "--base", "cpu", "-o", "timing=3", "-o", "timing.repeats=4"]
    code, _, err = run_cli(capsys, *words)
    assert code == 2
    assert err.strip() == "hwnas: timing.repeats: timing is a single value, it has no 'repeats'"
    assert not list(user_folder().glob("*"))


def test_check_names_the_remedy(capsys, tmp_path):
    board = write(tmp_path, "board", base="cpu", python="/no/such/python")
    code, out, err = run_cli(capsys, "devices", "check", board)
    assert code == 4
    assert "pass  reached: host" in out
    assert "FAIL  onnxruntime: host: /no/such/python cannot be started: No such file or directory" in out
    assert "install there: hwnas" in out
    assert err.startswith("hwnas: device")


def test_check_goes_on_after_what_can_be_lived_with(monkeypatch):
    class Hot(FakeDevice):
        def check(self):
            yield Check("temperature", "thermal status 1", "let it cool down")
            yield from super().check()

    steps = list(diagnose(Hot(), tiny_space(), duration_s=0))
    assert [step.step for step in steps] == ["temperature", "fake", "file", "measurement"]


def test_a_device_cannot_write_to_the_terminal(capsys, monkeypatch):
    said = "\x1b]0;owned\x07 [red]no[/] \x9b2J"

    def run(self, path, timing):
        raise DeviceError(f"device 'cpu': {said}")

    monkeypatch.setattr(WorkerDevice, "run", run)
    code, out, err = run_cli(capsys, "devices", "check", "cpu", "--seconds", "0")
    assert code == 4
    assert "[red]no[/]" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err)
    code, out, err = run_cli(capsys, "profile", "--device", "cpu", "--space", "tiny", "--children", "5")
    assert code == 4
    assert "3 children in a row failed" in err
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err)


# -------------------------------------------------------------------- several devices


def test_profiles_several_at_a_time(capsys, tmp_path):
    devices = tmp_path / "run" / "devices"
    write(devices, "one", base="cpu", timing=QUICKLY)
    write(devices, "two", base="cpu", timing=QUICKLY)
    write(devices, "broken", base="cpu", python="/no/such/python")
    words = ["profile", "--space", "tiny", "--children", "5", "--json"]
    code, out, err = run_cli(capsys, *words, "--device", "one", "--device", "broken", "--device", "two")
    assert code == 4
    assert [made["device"] for made in json.loads(out)["profiles"]] == ["one", "two"]
    assert "/no/such/python" in err.splitlines()[-1]
    for name in ("one", "two"):
        assert len(hwnas.predict(name, ["smallest", "biggest"])) == 2
    with hwnas.Run().store() as store:
        assert len(store.measurements(device="one")) == len(store.measurements(device="two")) == 5


def test_profile_tells_of_other_programs(capsys, tmp_path, monkeypatch):
    write(tmp_path / "run" / "devices", "one", base="cpu", timing=QUICKLY)
    words = ["profile", "--space", "tiny", "--children", "5", "--device", "one"]
    monkeypatch.setattr(Measurement, "others_busy", 1.26)
    _, _, err = run_cli(capsys, *words)
    assert "one: other programs kept 1.3 processors busy meanwhile" in err
    monkeypatch.setattr(Measurement, "others_busy", 0.1)
    monkeypatch.setattr(Measurement, "unstable", True)
    assert "one: was disturbed while most children were measured" in run_cli(capsys, *words)[2]
    monkeypatch.setattr(Measurement, "unstable", False)
    _, out, err = run_cli(capsys, *words, "--json")
    assert "other programs" not in err
    assert "was disturbed while" not in err
    assert json.loads(out)["others_busy"] == 0.1


def test_a_device_named_twice(tmp_path):
    with pytest.raises(InputError, match="cpu, cpu: a device is named twice"):
        hwnas.profile_all(["cpu", "cpu"], space="tiny")


def test_profile_raises_what_the_device_failed_with(tmp_path):
    write(tmp_path / "run" / "devices", "broken", base="cpu", python="/no/such/python")
    with pytest.raises(DeviceError, match="/no/such/python cannot be started"):
        hwnas.profile("broken", space="tiny")


def test_interrupt_ends_every_thread(tmp_path):
    devices = tmp_path / "run" / "devices"
    for name in ("one", "two"):
        write(devices, name, base="cpu", timing=QUICKLY)
    done = {"one": 0, "two": 0}

    def report(name):
        def told(count, total, note=""):
            done[name] = count
            if name == "one" and count == 2:
                raise KeyboardInterrupt

        return told

    with pytest.raises(KeyboardInterrupt):
        hwnas.profile_all(["one", "two"], space="tiny", children=60, reports=[report("one"), report("two")])
    assert done["one"] == 2
    assert done["two"] < 30
    with hwnas.Run().store() as store:
        assert len(store.measurements(device="one")) == 2
