"""ExecuTorch's `executor_runner`: `.pte` files on phones and boards, without Python there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar

from hwnas.devices.base import RunTimes, Timing
from hwnas.devices.tools.base import Tool
from hwnas.errors import DeviceError

_THREADS = re.compile(r"\] Resetting threadpool with num threads = (\d+)$", re.MULTILINE)
_RUN = re.compile(r"\] Iteration \d+ of \d+: ([\d.]+) ms$", re.MULTILINE)  # since 1.3
_TOTAL = re.compile(r"\] Model executed successfully (\d+) time\(s\) in ([\d.]+) ms\.$", re.MULTILINE)  # since 0.6
_TRACED = "ETDump written to file"
# `E 00:00:00.000123 executorch:method.cpp:87] ...`, F where it aborts; gflags' own begin with ERROR.
_TROUBLE = re.compile(r"^(?:[EF] [\d:.]+ executorch:[^\]]*\]|ERROR:) *(.+)$", re.MULTILINE)
_RUNS_PER_S = 1000


class Program(Tool):
    """`executor_runner` of ExecuTorch 0.6 or later, built with XNNPACK.

    It times every run by itself, but has no option for how long to go on, nor for warming up: it is asked for
    `min_duration_s` of runs as if each took 1 ms, at least for `repeats`, and for as many before them, which do not
    count. Versions before 1.3 tell only the sum: then the latency is the mean of all runs, the first and slowest
    included, how they spread is unknown (0 in `RunTimes`), and the facts hold how many `runs` that were.

    It logs nothing in a release build unless told so, and to logcat with Android's preset; see `install`. It does not
    tell whether a file runs in XNNPACK: those that `ExecutorchExporter` writes do, or fail where it is not built in.
    """

    runtime: ClassVar[str] = "executorch"
    accepts: ClassVar[str] = "executorch"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")
    program: ClassVar[str] = "/data/local/tmp/executor_runner"
    install: ClassVar[str] = (
        "build it from github.com/pytorch/executorch with -DCMAKE_BUILD_TYPE=Release -DEXECUTORCH_BUILD_XNNPACK=ON "
        "-DEXECUTORCH_BUILD_EXECUTOR_RUNNER=ON -DEXECUTORCH_ENABLE_LOGGING=ON -DEXECUTORCH_PAL_DEFAULT=posix, "
        "and copy it there"
    )

    def command(self, program: str, network: str, timing: Timing, folder: str) -> Sequence[str]:
        """See `Tool`."""
        runs = max(timing.repeats, timing.warmup_runs, math.ceil(timing.min_duration_s * _RUNS_PER_S))
        return [
            program,
            f"--model_path={network}",
            f"--num_executions={2 * runs}",
            f"--cpu_threads={timing.threads}",
        ]

    def parse(self, output: str) -> RunTimes:
        """See `Tool`."""
        total = _TOTAL.search(output)
        if total is None:
            said = _TROUBLE.findall(output)
            raise DeviceError(said[-1][:300] if said else f"it logged no times; {self.install}")
        if _TRACED in output:
            raise DeviceError("it traces each operator, which takes time: -DEXECUTORCH_ENABLE_EVENT_TRACER=OFF")
        threads = _THREADS.search(output)
        facts = {} if threads is None else {"threads": int(threads[1])}
        num_runs = int(total[1])
        times = [float(ms) for ms in _RUN.findall(output)]
        if len(times) != num_runs:
            times = [float(total[2]) / num_runs]
            facts["runs"] = num_runs
        counted = times[len(times) // 2 :]
        return RunTimes(tuple(counted), (False,) * len(counted), facts)
