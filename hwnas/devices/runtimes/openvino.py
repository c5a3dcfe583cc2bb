"""OpenVINO: on Intel's and ARM's processors, and Intel's GPUs and NPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

DEVICES = ("CPU", "GPU", "NPU")
HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}  # of what is not quantised
CAPABILITIES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
RAN_AS = {"fp32": {"f32"}, "fp16": {"f16"}, "bf16": {"bf16"}, "int8": {"i8", "u8"}}


class Runtime:
    """Networks in ONNX files, one at a time, for latency.

    Args:
        precision: `fp32`, `fp16` or `bf16`, where the processor has instructions for them; `int8` for files that are
            quantised.
        device: one of `DEVICES`.
    """

    accepts = "onnx"
    int8 = "int8-symmetric"
    precisions = ("fp32", "fp16", "bf16", "int8")
    install = "hwnas[openvino] or openvino"

    def __init__(self, precision: str, device: str = "CPU") -> None:
        if device not in DEVICES:
            raise ValueError(f"device={device!r}: must be one of {', '.join(DEVICES)}")
        self._precision, self._device = precision, device

    def versions(self) -> dict[str, str]:
        """Of the runtime, and the GPU's or the NPU's name."""
        import openvino

        versions = {"openvino": openvino.__version__.partition("-")[0]}
        if self._device != "CPU":
            versions["device"] = str(self._core().get_property(self._device, "FULL_DEVICE_NAME"))
        return versions

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        import openvino

        core = self._core()
        if CAPABILITIES[self._precision] not in core.get_property(self._device, "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeError(f"this {self._device} has no {self._precision} in OpenVINO")
        hint = HINTS[self._precision]  # without it, a processor with AMX runs fp32 networks in bf16
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        if self._device == "CPU":
            # The worker's process is on its cores already: OpenVINO shall not choose others.
            options.update(INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1, ENABLE_CPU_PINNING=False)
        compiled = core.compile_model(core.read_model(path), self._device, options)
        self._check(compiled, threads)
        request = compiled.create_infer_request()
        rng = np.random.default_rng(0)
        for port in compiled.inputs:
            request.set_tensor(port, openvino.Tensor(rng.standard_normal(list(port.shape), dtype=np.float32)))
        return lambda: request.infer(share_outputs=True)

    def _core(self) -> Any:
        import openvino

        core = openvino.Core()
        found = sorted({name.partition(".")[0] for name in core.available_devices})
        if self._device not in found:
            raise RuntimeError(f"OpenVINO finds no {self._device} on this machine, only {', '.join(found)}")
        return core

    def _check(self, compiled: Any, threads: int) -> None:
        """Refuse what would not run as asked."""
        wanted = HINTS[self._precision]
        given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if given != wanted:
            raise RuntimeError(f"OpenVINO would run the network in {given}, not {wanted}")
        if self._device != "CPU":
            return
        num_threads = compiled.get_property("INFERENCE_NUM_THREADS")
        if num_threads != threads:
            raise RuntimeError(f"OpenVINO would run the network on {num_threads} threads, not {threads}")
        kernels = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        # `runtimePrecision` is that of the weights' file; kernels with u8 results said `I8` on an AMD EPYC
        ran = {
            kernel["primitiveType"].astype(str).rpartition("_")[2].lower()
            for kernel in kernels
            if kernel["layerType"].astype(str) == "Convolution"
        }
        if not ran <= RAN_AS[self._precision]:
            raise RuntimeError(f"OpenVINO would run convolutions in {', '.join(sorted(ran))}, not {self._precision}")
