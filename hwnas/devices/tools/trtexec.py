"""trtexec, TensorRT's own program: in every TensorRT package, and on every Jetson."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hwnas.devices.base import RunTimes, Timing
from hwnas.devices.tools.base import Tool, spread_of_percentile
from hwnas.errors import DeviceError

VERSIONS = (8, 9, 10, 11)  # from 8.4 on
_BANNER = re.compile(r"&&&& (\w+) TensorRT\.trtexec(?:.*?\[TensorRT v([\d.]+)\])?")
_SUMMARY = re.compile(r"^.*?\] GPU Compute Time: (.*)$", re.MULTILINE)
_PERCENTILE = re.compile(r"percentile\(([\d.]+)%\) = (\S+) ms")
_UNSTABLE = re.compile(r"GPU compute time is unstable, with coefficient of variance = ([\d.]+)%")
_ERROR = re.compile(r"\[E\] (.*\S)")
_IGNORED = "The specified --useCudaGraph flag has been ignored"


class Program(Tool):
    """TensorRT on an NVIDIA GPU, by trtexec: it builds an engine once a network, and loads it in each round.

    What is timed is the GPU's work alone, launched as a CUDA graph. In int8, what is not quantised may run in fp16, up
    to version 10.

    Args:
        precision: one of `precisions`.
        version: of TensorRT, the first number: its options differ. From 11 on it runs networks in the types that the
            file has, which leaves out fp16.
    """

    runtime = "tensorrt"
    accepts = "onnx"
    int8 = "int8-symmetric"
    precisions = ("fp32", "fp16", "int8")
    program = "/usr/src/tensorrt/bin/trtexec"
    install = "it is in TensorRT's packages (libnvinfer-bin), and in JetPack: sudo apt install libnvinfer-bin"

    def __init__(self, precision: str, version: int = 10, **options: Any) -> None:
        super().__init__(precision, **options)
        if version not in VERSIONS:
            raise ValueError(f"version={version!r}: must be one of {', '.join(map(str, VERSIONS))}")
        if version >= 11 and precision == "fp16":
            raise ValueError("precision fp16: TensorRT 11 runs networks in the types of the file, which are fp32")
        self._version = version

    def build_command(self, program: str, network: str, built: str, folder: str) -> Sequence[str]:
        """See `Tool`: with a cache of kernels' times that networks share, and as short a run as it can be."""
        types = {"fp32": ["--noTF32"], "fp16": ["--noTF32", "--fp16"], "int8": ["--noTF32", "--int8", "--fp16"]}
        return [
            program,
            f"--onnx={network}",
            f"--saveEngine={built}",
            f"--timingCacheFile={folder}/timing.cache",
            *(types[self.precision] if self._version < 11 else ["--noTF32"]),
            "--warmUp=0",  # --skipInference has another name in 8.4
            "--duration=0",
            "--iterations=1",
        ]

    def command(self, program: str, network: str, timing: Timing, folder: str) -> Sequence[str]:
        """See `Tool`."""
        return [
            program,
            f"--loadEngine={network}",
            f"--warmUp={1000 * timing.warmup_s:g}",
            f"--duration={timing.min_duration_s:g}",
            f"--iterations={timing.repeats}",
            "--percentile=75",  # 8.4 takes but one
            # The defaults from 11 on.
            *(["--useCudaGraph", "--useSpinWait", "--noDataTransfers"] if self._version < 11 else []),
        ]

    def parse(self, output: str) -> RunTimes:
        """See `Tool`: the median of `GPU Compute Time`.

        The spread is that of the percentile next to the third quartile, else that of the coefficient of variance (IQR =
        1.349 standard deviations of a normal distribution), which trtexec prints only if it is large and which a
        single slow run can make large.
        """
        banners = _BANNER.findall(output)
        error = _ERROR.search(output)
        if error:
            raise DeviceError(error[1])
        if not any(state == "PASSED" for state, _ in banners):
            last = output.strip().rpartition("\n")[2] or "it printed nothing"
            raise DeviceError(f"trtexec did not end with PASSED: {last}")
        if _IGNORED in output:
            raise DeviceError("the network cannot run as a CUDA graph")
        summary = _SUMMARY.search(output)
        if summary is None:
            raise DeviceError("trtexec printed no GPU Compute Time")
        values = dict(re.findall(r"(\w+) = (\S+) ms", summary[1]))
        try:
            median = float(values["median"] if "median" in values else values["mean"])
            percentiles = sorted((float(p) / 100, float(ms)) for p, ms in _PERCENTILE.findall(summary[1]))
        except (KeyError, ValueError):
            raise DeviceError(f"trtexec printed a GPU Compute Time that cannot be read: {summary[1]}") from None
        if not median > 0:
            raise DeviceError(f"trtexec printed a GPU Compute Time of {median:g} ms")
        facts: dict[str, Any] = {}
        if banners[-1][1]:
            facts["tensorrt"] = _version(banners[-1][1])
        unstable = _UNSTABLE.search(output)
        spread = None
        if unstable:
            facts["coefficient_of_variance"] = float(unstable[1]) / 100
            spread = 1.349 * facts["coefficient_of_variance"]
        upper = [(share, ms) for share, ms in percentiles if 0.75 <= share < 1]
        if upper:
            spread = spread_of_percentile(median, *upper[0])
        return RunTimes((median,), (False,), facts, spread)

    def version_command(self, program: str) -> Sequence[str]:
        """See `Tool`: all versions begin with a line that says which they are."""
        return [program, "--help"]

    def parse_version(self, output: str) -> Mapping[str, str]:
        """See `Tool`."""
        found = [digits for _, digits in _BANNER.findall(output) if digits]
        if not found:
            raise DeviceError("it does not say its version, as trtexec does")
        version = _version(found[0])
        if int(version.partition(".")[0]) != self._version:
            raise DeviceError(f"it is of TensorRT {version}: set `options: {{version: {version.partition('.')[0]}}}`")
        return {"tensorrt": version}


def _version(digits: str) -> str:
    """`8403` is 8.4.3, `101302` is 10.13.2."""
    if "." in digits:
        return digits
    number = int(digits)
    major = number // 1000 if number < 10_000 else number // 10_000
    return f"{major}.{number // 100 % (10 if number < 10_000 else 100)}.{number % 100}"
