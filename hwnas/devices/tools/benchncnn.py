"""ncnn's `benchncnn`: `.param` files on phones and boards, without Python there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from hwnas.devices.base import RunTimes, Timing
from hwnas.devices.tools.base import Tool
from hwnas.errors import DeviceError

_ROW = re.compile(r"^ *(.*\S)  min = *(\d+\.\d\d)  max = *(\d+\.\d\d)  avg = *(\d+\.\d\d)\s*$", re.MULTILINE)
_RESOLUTION_MS = 0.01  # two decimals
_RUNS_PER_S = 1000
_TROUBLE = re.compile(
    r"^.*(?:\bfailed\b|not exists or registered|too old|tensor shape empty|not supported|not ready|no vulkan device"
    r"|not found|No such file|Permission denied|tensors while model has|inconsistent content).*$",
    re.MULTILINE,
)
_SOFTWARE = ("llvmpipe", "lavapipe", "swiftshader")  # Vulkan on a processor
# The shape that benchncnn wants stands in the file, on the line of the Input layer.
_RUN = r"""
input='^Input .* 0=\([0-9]*\) 1=\([0-9]*\) 2=\([0-9]*\).*'
shape=$(sed -n "s/$input/[\1,\2,\3]/p" "$2")
exec "$1" "$3" "$4" "$5" "$6" 0 "param=$2" "shape=$shape"
"""
_VERSION = 'sha256sum "$1" && { grep -owm1 asimdhp /proc/cpuinfo || :; }'


class Row(NamedTuple):
    """What benchncnn prints of one model.

    Attributes:
        name: the model's, or its file.
        min_ms: the fastest run.
        max_ms: the slowest run.
        avg_ms: their mean.
    """

    name: str
    min_ms: float
    max_ms: float
    avg_ms: float


def rows(output: str) -> list[Row]:
    """The models in what benchncnn printed, in order."""
    return [Row(name, float(low), float(high), float(mean)) for name, low, high, mean in _ROW.findall(output)]


class Program(Tool):
    """`benchncnn` of ncnn 20230816 or later, the first that times a file of one's own.

    It fills the weights with zeros and does not read the `.bin`. It runs the network 8 times untimed, or 10 times on a
    GPU, and has no option for how long to go on: it is asked for `min_duration_s` of runs as if each took 1 ms, at
    least for `repeats`. It prints the least, the greatest and the mean time with two decimals. The latency is the
    mean, and for the spread stands the distance between the extremes, and of the decimals: the inter-quartile range
    is less. So one disturbed run marks a round as unsteady, as it should, for it moved the mean, and networks under
    about 0.05 ms are always unsteady.

    It computes in fp16 wherever it can, and cannot be told otherwise: ARM processors since v8.2 (`asimdhp` in
    /proc/cpuinfo) and most GPUs have precision fp16, others fp32, and the wrong one is refused. It also chooses its
    cores itself, by `powersave`; a device file's `cores` are ignored by it.

    Args:
        precision: see above; `int8` for files that are quantised, on a processor.
        gpu: the number of the GPU; -1 computes on the processor.
        powersave: 0 for all cores, 1 for the small ones, 2 for the big ones.
    """

    runtime: ClassVar[str] = "ncnn"
    accepts: ClassVar[str] = "ncnn"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    program: ClassVar[str] = "/data/local/tmp/benchncnn"
    install: ClassVar[str] = (
        "build it from github.com/Tencent/ncnn with -DNCNN_BUILD_BENCHMARK=ON (for a GPU also -DNCNN_VULKAN=ON), "
        "and copy it there"
    )

    def __init__(self, precision: str, *, gpu: int = -1, powersave: int = 0) -> None:
        super().__init__(precision)
        if type(gpu) is not int or gpu < -1:
            raise ValueError(f"gpu={gpu!r}: must be the number of a GPU, or -1 for the processor")
        if type(powersave) is not int or powersave not in (0, 1, 2):
            raise ValueError(f"powersave={powersave!r}: must be 0, 1 or 2: all cores, the small ones, the big ones")
        if gpu >= 0 and precision == "int8":
            raise ValueError("precision int8: is for the processor; many versions would run it there anyway")
        self._gpu, self._powersave = gpu, powersave

    def command(self, program: str, network: str, timing: Timing, folder: str) -> Sequence[str]:
        """See `Tool`."""
        runs = max(timing.repeats, math.ceil(timing.min_duration_s * _RUNS_PER_S))
        numbers = [str(number) for number in (runs, timing.threads, self._powersave, self._gpu)]
        return ["sh", "-c", _RUN, "sh", program, network, *numbers]

    def parse(self, output: str) -> RunTimes:
        """See `Tool`."""
        if self._gpu >= 0:
            self._check_gpu(output)
        trouble = [line.strip() for line in _TROUBLE.findall(output) if self._gpu >= 0 or "vulkan" not in line]
        if trouble:
            raise DeviceError(trouble[0][:300])
        found = rows(output)
        if not found:
            raise DeviceError("it printed no times")
        if len(found) > 1:
            raise DeviceError(f"it timed {len(found)} models of its own: ncnn 20230816 or later is needed")
        row = found[0]
        if row.avg_ms == 0:  # a graph that it could not read takes no time
            raise DeviceError("it took 0.00 ms: the network did not run, or is too small for benchncnn")
        runs = re.search(r"^loop_count = (\d+)", output, re.MULTILINE)
        facts = {"runs": int(runs[1])} if runs else {}
        spread = (row.max_ms - row.min_ms + _RESOLUTION_MS) / row.avg_ms
        return RunTimes((row.avg_ms,), (False,), facts, spread)

    def _check_gpu(self, output: str) -> None:
        """Whether the GPU was there and computed as asked, by the lines that ncnn prints of each."""
        lines = re.findall(rf"^\[{self._gpu} (.*)$", output, re.MULTILINE)
        if not lines:
            raise DeviceError(f"there is no GPU {self._gpu}, or benchncnn was built without -DNCNN_VULKAN=ON")
        if any(name in lines[0].lower() for name in _SOFTWARE):
            raise DeviceError(f"GPU {self._gpu} is {lines[0].partition(']')[0]}, a processor: use gpu: -1")
        fp16 = re.search(r"fp16-[\w/]+=[01/]*([01])", "\n".join(lines))
        self._check_fp16(fp16 is not None and fp16[1] == "1", f"GPU {self._gpu}")

    def _check_fp16(self, computes: bool, what: str) -> None:
        if computes != (self.precision == "fp16"):
            has, use = ("computes in fp16", "fp16") if computes else ("has no fp16", "fp32")
            raise DeviceError(f"{what} {has} with benchncnn: set precision: {use}")

    def version_command(self, program: str) -> Sequence[str]:
        """See `Tool`."""
        return ["sh", "-c", _VERSION, "sh", program]

    def parse_version(self, output: str) -> Mapping[str, str]:
        """See `Tool`."""
        if self._gpu < 0 and self.precision != "int8":
            self._check_fp16("asimdhp" in output.splitlines()[1:], "the processor")
        return super().parse_version(output)
