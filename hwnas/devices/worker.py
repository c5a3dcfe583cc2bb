"""The program that times network files on a device: `python worker.py runtimes/openvino.py '{"precision": "fp32"}'`.

It is sent to other machines as it is, with the runtime's file beside it, so both import the standard library, numpy and
the runtime's packages, never hwnas. A process of its own keeps the measurement free of its parent's threads, and a
crash of the runtime away from the parent. The second argument has the arguments of the runtime's class.

It reads one JSON object a line from stdin and answers with one line on stdout, `{"ok": ...}` or `{"error": "why"}`;
whatever else the runtime prints goes to stderr. It ends when stdin does, or when a request takes over its `limit_s`.
`warmup_s` is for a network that has to be loaded first.

    {"op": "versions"}                      -> {"openvino": "2026.4.1", "processor": "..."}
    {"op": "run", "path": ..., "threads": 1, "cores": null, "warmup_runs": 3, "warmup_s": 0.02, "repeats": 10,
     "min_duration_s": 0.05, "limit_s": 60} -> {"times_ns": [...], "preempted": [0, 1, ...], "facts": {...}}
"""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from hwnas.devices.runtimes.base import Runtime

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

NUM_OPEN = 2  # networks kept loaded: the child and the reference that are timed in turns


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def least_busy(allowed: set[int], count: int, sample_s: float = 0.1) -> list[int]:
    """The cores that do least at the moment; what runs freely then keeps off the one that we pin ourselves to."""
    before = busy_ticks()
    time.sleep(sample_s)
    after = busy_ticks()
    return sorted(sorted(allowed), key=lambda core: after.get(core, 0) - before.get(core, 0))[:count]


def busy_ticks() -> dict[int, int]:
    """How long each core has been busy since the machine started, in ticks of the system's clock."""
    ticks = {}
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
            ticks[int(name[3:])] = user + nice + system + irq + softirq + steal
    return ticks


def time_runs(
    run: Callable[[], object], threads: int, warmup_runs: int, repeats: int, min_duration_s: float
) -> tuple[list[int], list[int]]:
    """Wall time of each run, ns, and whether the system took the processor away during it."""
    clock = time.perf_counter_ns

    def switches() -> int:
        if resource is None:
            return 0
        one_thread = threads == 1 and hasattr(resource, "RUSAGE_THREAD")  # Linux
        return resource.getrusage(resource.RUSAGE_THREAD if one_thread else resource.RUSAGE_SELF).ru_nivcsw

    for _ in range(warmup_runs):
        run()
    times: list[int] = []
    preempted: list[int] = []
    last = switches()
    end = clock() + int(min_duration_s * 1e9)
    while len(times) < repeats or clock() < end:
        before = clock()
        run()
        times.append(clock() - before)
        now = switches()
        preempted.append(int(now != last))
        last = now
    return times, preempted


def facts(cores: list[int]) -> dict[str, Any]:
    """The machine's state, as far as it tells."""
    found: dict[str, Any] = {"cores": cores}
    try:  # what all programs have used so far, and this one
        machine_s = sum(busy_ticks().values()) / os.sysconf("SC_CLK_TCK")
        found["used_s"] = {"clock": time.perf_counter(), "machine": machine_s, "own": time.process_time()}
    except (OSError, ValueError):
        pass
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    readings = {
        "mhz": [f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in cores],
        "mhz_limit": [f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_max_freq" for core in cores],
        "celsius": [str(zone / "temp") for zone in Path("/sys/class/thermal").glob("thermal_zone*") if _real(zone)],
    }
    for name, files in readings.items():
        values = []
        for file in files:
            try:
                values.append(int(Path(file).read_text(encoding="ascii")) / 1000)
            except (OSError, ValueError):
                continue
        if values:
            found[name] = max(values)
    return found


def energy_uj(folder: Path = Path("/sys/class/powercap")) -> dict[str, tuple[int, int]]:
    """What each processor package has used so far, and where its counter starts again, microjoules; by its zone.

    RAPL, https://docs.kernel.org/power/powercap/powercap.html, of Intel's and AMD's processors. Since Linux 5.10 only
    root may read it: `sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj` lets others.
    """
    found = {}
    for zone in folder.glob("intel-rapl:*"):
        try:
            if (zone / "name").read_text(encoding="ascii").startswith("package"):  # not what is part of one, or psys
                used, most = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
                found[zone.name] = used, most
        except (OSError, ValueError):
            continue
    return found


def used_uj(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> int:
    """What all packages used between two answers of `energy_uj`; a counter may have started again once."""
    used = 0
    for zone in before.keys() & after.keys():
        difference = after[zone][0] - before[zone][0]
        used += difference if difference >= 0 else difference + after[zone][1]
    return used


# The rails that make up a Jetson's power: one for all of it, or AGX Orin's, where 5V0 is only what CPU and GPU leave.
WHOLE_MODULE = (("VDD_IN",), ("POM_5V_IN",), ("VIN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))


def power_mw(folder: Path = Path("/sys/class/hwmon")) -> float | None:
    """What a Jetson's whole module takes now, as its INA3221 sensors average it; None elsewhere.

    https://docs.kernel.org/hwmon/ina3221.html: `in1_label` names a rail, `in1_input` is mV, `curr1_input` mA.
    """
    rails = {}
    for label in folder.glob("hwmon*/in[123]_label"):
        number = label.name[2]
        try:
            if (label.parent / "name").read_text(encoding="ascii").strip() == "ina3221":
                mv, ma = (
                    int((label.parent / name).read_text()) for name in (f"in{number}_input", f"curr{number}_input")
                )
                rails[label.read_text(encoding="ascii").strip()] = mv * ma / 1000
        except (OSError, ValueError):
            continue
    for names in WHOLE_MODULE:
        if rails.keys() >= set(names):
            return sum(rails[name] for name in names)
    return None


def _real(zone: Path) -> bool:
    """Whether a thermal zone has a sensor: Jetson's PMIC-Die always tells 100 C."""
    try:
        return "PMIC" not in (zone / "type").read_text(encoding="ascii")
    except (OSError, ValueError):
        return True


class Worker:
    """Answers requests for one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._open: OrderedDict[tuple[Any, ...], Callable[[], object]] = OrderedDict()
        self._allowed: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._pinned: dict[str, list[int]] = {}

    def versions(self) -> dict[str, str]:
        """See the request of this name."""
        return {**self._runtime.versions(), "processor": processor()}

    def run(self, path: str, threads: int, cores: list[int] | None, warmup_s: float, **timing: Any) -> dict[str, Any]:
        """See the request of this name."""
        stat = os.stat(path)  # noqa: PTH116 - a str path
        key = (path, stat.st_mtime_ns, stat.st_size, threads, str(cores))
        pinned = self._pin(cores, threads)
        if key not in self._open:
            while len(self._open) >= NUM_OPEN:
                self._open.popitem(last=False)
            self._open[key] = self._runtime.load(path, threads)
            end = time.perf_counter() + warmup_s
            while time.perf_counter() < end:
                self._open[key]()
        self._open.move_to_end(key)
        before = energy_uj()
        times, preempted = time_runs(self._open[key], threads, **timing)
        power, used = power_mw(), used_uj(before, energy_uj())
        found = facts(pinned)
        if power is not None:
            found["run_power_mw"] = power
        if used:
            found["energy_mj"] = used / 1000 / (timing["warmup_runs"] + len(times))
        return {"times_ns": times, "preempted": preempted, "facts": found}

    def _pin(self, cores: list[int] | None, threads: int) -> list[int]:
        """Keep this process, and the runtime's threads that it will start, on some cores."""
        if not self._allowed:
            return []
        wanted = f"{cores} {threads}"
        if wanted not in self._pinned:
            self._pinned[wanted] = sorted(cores or least_busy(self._allowed, threads))
        os.sched_setaffinity(0, self._pinned[wanted])
        return self._pinned[wanted]


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer until there are no more requests."""
    for line in requests:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):  # ends the process also where the runtime hangs
            signal.setitimer(signal.ITIMER_REAL, request.pop("limit_s", 0))
        try:
            answer = {"ok": getattr(worker, request.pop("op"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load_class(path: str) -> type[Runtime]:
    """The class `Runtime` of a file."""
    spec = spec_from_file_location("hwnas_runtime", path)  # a name that hides no package
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: type[Runtime] = module.Runtime
    return kind


def main() -> None:
    """Serve the runtime named on the command line."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the runtime prints
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path != here]  # files here may have names of packages
    gc.disable()
    serve(Worker(load_class(sys.argv[1])(**json.loads(sys.argv[2]))), sys.stdin, wire)


if __name__ == "__main__":
    main()
