"""ncnn: on the processor, or on a GPU through Vulkan."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Of layers with weights: a precision that a processor has no kernels for is left out in silence, layer by layer.
SUPPORT = {"fp16": "support_fp16_storage", "bf16": "support_bf16_storage"}
WEIGHTED = ("Convolution", "ConvolutionDepthWise", "InnerProduct")
VULKAN_CPU = 3  # GpuInfo.type of a processor that plays a GPU: lavapipe, SwiftShader


class Runtime:
    """Networks in `.param` files with the weights beside them in a `.bin`.

    Args:
        precision: `fp32`; `fp16` on GPUs and on ARM processors since v8.2; `bf16`, in which values are stored, on
            ARM processors (for x86 ncnn has no such depthwise convolution); `int8` for files that are quantised.
        gpu: compute on the first GPU, through Vulkan.
    """

    accepts = "ncnn"
    precisions = ("fp32", "fp16", "bf16", "int8")
    install = "hwnas[ncnn] or ncnn"

    def __init__(self, precision: str, gpu: bool = False) -> None:
        if not isinstance(gpu, bool):
            raise ValueError(f"gpu={gpu!r}: must be true or false")
        if gpu and precision == "bf16":
            raise ValueError("precision bf16: is for processors; use fp16 or fp32 with gpu: true")
        self._precision, self._gpu = precision, gpu

    def versions(self) -> dict[str, str]:
        """Of the runtime, and the GPU's name and driver."""
        import ncnn

        versions = {"ncnn": str(ncnn.__version__)}
        if self._gpu:
            info = _gpu_info(ncnn)
            versions["gpu"] = f"{info.device_name()}, driver {info.driver_version()}"
        return versions

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        import ncnn

        text = Path(path).read_text(encoding="ascii")
        shape = re.search(r"^Input .* 0=(\d+) 1=(\d+) 2=(\d+)", text, re.MULTILINE)
        if shape is None:
            raise ValueError("its Input layer has no shape, `0=width 1=height 2=channels`")
        int8 = re.search(rf"^(?:{'|'.join(WEIGHTED)}) .* 8=[1-9]", text, re.MULTILINE) is not None
        if int8 != (self._precision == "int8"):
            raise ValueError(f"a file {'of int8' if int8 else 'that is not quantised'}, precision {self._precision}")
        net = ncnn.Net()
        net.opt.num_threads = threads
        # Not ncnn.set_cpu_powersave: it would move us off the cores that we are kept on.
        fp16, bf16 = self._precision == "fp16", self._precision == "bf16"
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = fp16
        net.opt.use_bf16_packed = net.opt.use_bf16_storage = bf16
        if self._gpu:
            _gpu_info(ncnn)
            net.opt.use_vulkan_compute = True
        if net.load_param(path):
            raise RuntimeError("ncnn cannot read its graph")
        self._check(net)
        if net.load_model(str(Path(path).with_suffix(".bin"))):
            raise RuntimeError("ncnn cannot read its weights")
        width, height, channels = map(int, shape.groups())
        values = np.random.default_rng(0).standard_normal((channels, height, width), dtype=np.float32)
        image = ncnn.Mat(values).clone()  # of its own memory
        (source,), (output,) = net.input_indexes(), net.output_indexes()

        def run() -> object:
            extractor = net.create_extractor()
            extractor.input(source, image)
            failed, logits = extractor.extract(output)
            if failed:
                raise RuntimeError(f"ncnn failed with {failed}")
            return logits

        run()
        return run

    def _check(self, net: Any) -> None:
        """Whether every layer runs as asked."""
        for layer in net.layers():
            if self._gpu and not layer.support_vulkan:
                raise RuntimeError(f"layer {layer.name} ({layer.type}) would run on the processor, not on the GPU")
            flag = SUPPORT.get(self._precision)
            if flag and not self._gpu and layer.type in WEIGHTED and not getattr(layer, flag):
                raise RuntimeError(f"ncnn has no {self._precision} for {layer.type} on this processor: use fp32")


def _gpu_info(ncnn: Any) -> Any:
    """The first GPU.

    Raises:
        RuntimeError: there is none.
    """
    if ncnn.get_gpu_count() == 0:
        raise RuntimeError("no Vulkan device: install the GPU's driver and libvulkan1, or leave out gpu: true")
    info = ncnn.get_gpu_info(0)
    if info.type() == VULKAN_CPU:
        raise RuntimeError(f"the first Vulkan device is {info.device_name()}, which is no GPU: leave out gpu: true")
    return info
