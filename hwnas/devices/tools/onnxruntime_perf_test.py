"""onnxruntime_perf_test, onnxruntime's own program: built with it from source, for machines without Python."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from hwnas.devices.base import RunTimes, Timing
from hwnas.devices.tools.base import Tool, spread_of_percentile
from hwnas.errors import DeviceError

_AVERAGE = re.compile(r"Average inference time cost(?: total)?: (\S+) ms")
_PERCENTILE = re.compile(r"^P(\d+) Latency: (\S+) s", re.MULTILINE)
_FAILURE = re.compile(r".*(?:\bfail|\berror\b|exception|invalid|unable).*", re.IGNORECASE)


class Program(Tool):
    """onnxruntime on a processor, by onnxruntime_perf_test.

    It runs for whole seconds, one at least, whatever `repeats` says.
    """

    runtime = "onnxruntime"
    accepts = "onnx"
    precisions = ("fp32", "int8")
    program = "onnxruntime_perf_test"
    install = "build onnxruntime from source there, and name it: `program: /path/to/onnxruntime_perf_test`"

    def command(self, program: str, network: str, timing: Timing, folder: str) -> Sequence[str]:
        """See `Tool`."""
        return [
            program,
            "-I",  # makes up its input,
            *("-S", "0"),  # always the same
            *("-e", "cpu"),
            *("-o", "99"),  # all optimisations: older versions do not by themselves
            *("-m", "duration", "-t", str(max(1, math.ceil(timing.min_duration_s)))),
            *("-x", str(timing.threads), "-y", "1"),
            "-Z",  # threads do not spin between runs
            "-s",  # prints percentiles
            network,
        ]

    def parse(self, output: str) -> RunTimes:
        """See `Tool`: the median, or the mean where it prints no percentiles."""
        average = _AVERAGE.search(output)
        try:
            percentiles = {digits: 1e3 * float(seconds) for digits, seconds in _PERCENTILE.findall(output)}
            latency_ms = percentiles["50"] if "50" in percentiles else float(average[1]) if average else 0.0
        except ValueError:
            raise DeviceError("onnxruntime_perf_test printed times that are not numbers") from None
        if average is None or not latency_ms > 0:
            failure = _FAILURE.search(output)
            raise DeviceError(failure[0].strip() if failure else "onnxruntime_perf_test printed no times")
        spread = None
        if "50" in percentiles and "90" in percentiles:
            spread = spread_of_percentile(latency_ms, 0.9, percentiles["90"])
        return RunTimes((latency_ms,), (False,), {}, spread)
