"""LiteRT's own program for timing, on phones and boards.

The flags and the output are those of tflite/tools/benchmark (TensorFlow 2.1 to LiteRT 2.3) and of
litert/tools/benchmark_litert_model, in https://github.com/google-ai-edge/LiteRT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hwnas.devices.base import RunTimes, Timing
from hwnas.devices.tools.base import Tool
from hwnas.errors import DeviceError

# The summary of a series of runs, in microseconds. The profiler's summaries of single operators look the same.
_SERIES = re.compile(r"(?<!\(microseconds\): )(?<!\(bytes\): )\bcount=(\d+)((?: \w+=\S+)*)")
_END = re.compile(r"Inference timings in us|BENCHMARK RESULTS")
_MEAN_V2 = re.compile(r"Inference \(avg\): +(\S+) ms \((\d+) runs\)")
_STD_V2 = re.compile(r"Inference \(std\): +(\S+)")
_ERROR = re.compile(r"ERROR: (?!Falling back to OpenGL)[^\n]*\S")  # OpenCL's other side is still the GPU
_FAILED = re.compile(
    r"[^\n]*(?:benchmarking failed|failed to (?:apply|compile|delegate|invoke|prepare)|run failed"
    r"|restored original execution plan|will not be executed by the delegate|disallowed cpu fallback"
    r"|is unsupported on this platform|unconsumed cmdline flags)[^\n]*",
    re.IGNORECASE,
)
_PARTLY = re.compile(r"[^\n]*(?:operations will run on the GPU|will be partially executed)[^\n]*")
_WHOLLY = "the model graph will be completely executed"

_IQR = 1.349  # of a normal distribution, in standard deviations
_P5_TO_P95 = 2 * 1.645


class Program(Tool):
    """`benchmark_model`.

    On the processor the network runs through XNNPACK, as far as that knows its operators; fp16 and the GPU have to
    take all of it.

    Args:
        precision: `fp32`; `int8` for files that are quantised; `fp16` on processors that compute in it, and on GPUs.
        gpu: run on the GPU.
        v2: the program is LiteRT 2's `benchmark_litert_model`.
    """

    runtime = "litert"
    accepts = "tflite"
    precisions = ("fp32", "fp16", "int8")
    program = "/data/local/tmp/benchmark_model"
    install = (
        "get benchmark_model from https://ai.google.dev/edge/litert/models/measurement, put it there and chmod +x it"
    )

    def __init__(self, precision: str, *, gpu: bool = False, v2: bool = False, **options: Any) -> None:
        super().__init__(precision, **options)
        for name, value in (("gpu", gpu), ("v2", v2)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: must be true or false")
        if gpu and precision == "int8":
            raise ValueError("precision int8 with gpu: GPUs compute int8 files in floating point; use fp16 or fp32")
        if v2 and precision == "fp16" and not gpu:
            raise ValueError("precision fp16 with v2: that program has it only on the GPU: add gpu: true, or use fp32")
        self._gpu, self._v2 = gpu, v2

    def command(self, program: str, network: str, timing: Timing, folder: str) -> Sequence[str]:
        """See `Tool`."""
        return [
            program,
            f"--graph={network}",
            f"--num_threads={timing.threads}",
            f"--warmup_runs={timing.warmup_runs}",
            f"--warmup_min_secs={timing.warmup_s:g}",
            f"--num_runs={timing.repeats}",
            f"--min_secs={timing.min_duration_s:g}",
            f"--max_secs={timing.timeout_s:g}",
            *self._where(),
        ]

    def _where(self) -> list[str]:
        """The flags that say what computes, and how."""
        if self._gpu and self._v2:
            flags = ["--use_gpu=true", "--use_cpu=false", f"--gpu-precision={self.precision}"]
        elif self._gpu:
            flags = ["--use_gpu=true", f"--gpu_precision_loss_allowed={str(self.precision == 'fp16').lower()}"]
        elif self._v2:
            return []
        else:
            flags = ["--use_xnnpack=true"]  # without this one it ignores the next
            if self.precision == "fp16":
                flags.append("--xnnpack_force_fp16=true")
        return [*flags, "--require_full_delegation=true"] if self._whole else flags

    @property
    def _whole(self) -> bool:
        """Whether a network that runs there only in part is a failure."""
        return self._gpu or self.precision == "fp16"

    def parse(self, output: str) -> RunTimes:
        """See `Tool`."""
        self._refuse(output)
        end = _END.search(output)
        series = list(_SERIES.finditer(output, 0, end.start() if end else len(output)))
        if series and (end or len(series) > 1):  # alone it may be the warm-up
            count = int(series[-1][1])
            values = {name: _number(text) for name, text in re.findall(r"(\w+)=(\S+)", series[-1][2])}
            latency = values.get("median", values.get("avg", values.get("curr", 0.0))) / 1e3
            std = values["std"] / 1e3 if "std" in values else None
            if std is None and "p95" in values:
                std = (values["p95"] - values["p5"]) / _P5_TO_P95 / 1e3
        else:
            mean, deviation = _MEAN_V2.search(output), _STD_V2.search(output)
            if mean is None:
                raise DeviceError(f"it printed no times: {_last_line(output)}")
            count, latency = int(mean[2]), _number(mean[1])
            std = None if deviation is None else _number(deviation[1])
        if count == 0 or not latency > 0:
            raise DeviceError(f"it printed {latency:g} ms over {count} runs")
        spread = None if std is None or count == 1 else _IQR * std / latency
        return RunTimes((latency,), (False,), {"runs": count}, spread)

    def _refuse(self, output: str) -> None:
        """Raise where the network did not run, or not as asked."""
        failed = _FAILED.search(output) or (_PARTLY.search(output) if self._whole else None)
        if failed:
            error = _ERROR.search(output) or failed
            raise DeviceError(error[0].strip()[:300])
        if self._whole and not self._v2 and _WHOLLY not in output:
            raise DeviceError("it does not say that the delegate runs all of the network: get a newer benchmark_model")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DeviceError(f"it printed {text!r} for a number") from None


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"
