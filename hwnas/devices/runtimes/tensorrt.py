"""TensorRT, by its Python package: on Jetsons and machines with an NVIDIA GPU.

Memory, streams and graphs come from the CUDA driver's library: wherever a GPU works it is there, under one name, on
JetPack and beside pip's packages alike, and TensorRT itself uses it. cuda-python would be one more package, under other
module names in each of its versions, and pip hides libcudart in a folder of its own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

SPIN = 1  # CU_CTX_SCHED_SPIN: waiting for the GPU does not put the thread to sleep
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Runtime:
    """Networks in ONNX files, built into engines for this GPU, launched as CUDA graphs, input and output on the GPU.

    From TensorRT 8.5 on. Building takes seconds a network; networks share the times of kernels that were tried.

    Args:
        precision: `fp32`; `fp16` up to TensorRT 10: later ones, and that for RTX, run networks in the types of the
            file; `int8` for files that are quantised, what is not quantised may run in fp16 there.
        rtx: take `tensorrt_rtx`, TensorRT for RTX GPUs.
    """

    accepts = "onnx"
    int8 = "int8-symmetric"
    precisions = ("fp32", "fp16", "int8")
    install = "tensorrt (on a Jetson, from JetPack: python3-libnvinfer)"

    def __init__(self, precision: str, rtx: bool = False) -> None:
        self._precision, self._module = precision, "tensorrt_rtx" if rtx else "tensorrt"
        self._times = b""  # of kernels
        self._driver: _Driver | None = None

    def versions(self) -> dict[str, str]:
        """Of the runtime and the driver, and the GPU's name."""
        tensorrt = import_module(self._module)
        return {self._module: tensorrt.__version__, **self._open().versions()}

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on zeros."""
        tensorrt = import_module(self._module)
        driver = self._open()
        engine, self._times = build(tensorrt, Path(path).read_bytes(), self._precision, self._times)
        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        runtime = tensorrt.Runtime(logger)
        network = runtime.deserialize_cuda_engine(engine)
        if network is None:
            raise RuntimeError("TensorRT cannot load the engine that it built")
        context = network.create_execution_context()
        memory = []
        for name in (network.get_tensor_name(index) for index in range(network.num_io_tensors)):
            size = network.get_tensor_dtype(name).itemsize
            for length in network.get_tensor_shape(name):
                size *= length
            memory.append(driver.zeros(size))
            context.set_tensor_address(name, memory[-1])
        return driver.graph(context.execute_async_v3, memory)

    def _open(self) -> _Driver:
        if self._driver is None:
            self._driver = _Driver()
        return self._driver


def build(tensorrt: Any, onnx: bytes, precision: str, times: bytes = b"") -> tuple[Any, bytes]:
    """An engine for this machine's GPU, as bytes, and the times of kernels; needs no GPU with `tensorrt_rtx`.

    Args:
        tensorrt: the module, `tensorrt` or `tensorrt_rtx`.
        onnx: the network's file.
        precision: one of `Runtime.precisions`.
        times: of kernels, from the last network.

    Raises:
        RuntimeError: TensorRT does not take the network; with its own words.
    """
    logger = _logger(tensorrt)
    builder = tensorrt.Builder(logger)
    # Up to 10, networks are fp32 and the builder lowers their precision; later ones are typed by their file.
    weakly_typed = hasattr(tensorrt.BuilderFlag, "FP16")
    flags = tensorrt.NetworkDefinitionCreationFlag
    explicit = 1 << int(flags.EXPLICIT_BATCH) if weakly_typed and hasattr(flags, "EXPLICIT_BATCH") else 0
    network = builder.create_network(explicit)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT {tensorrt.__version__} cannot read the network: {' '.join(said.split())}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # fp32 means fp32
    if precision == "fp16" and not weakly_typed:
        raise RuntimeError(
            f"precision fp16: TensorRT {tensorrt.__version__} runs networks in the types of the file, which are fp32"
        )
    if weakly_typed and precision in ("fp16", "int8"):
        config.set_flag(tensorrt.BuilderFlag.FP16)
    if weakly_typed and precision == "int8":
        config.set_flag(tensorrt.BuilderFlag.INT8)
    keeps_times = tensorrt.__name__ == "tensorrt"  # that for RTX chooses kernels when it runs
    if keeps_times:
        config.set_timing_cache(config.create_timing_cache(times), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        said = " ".join((logger.errors or ["without a word"])[0].split())
        raise RuntimeError(f"TensorRT {tensorrt.__version__} cannot build the network: {said}")
    return engine, bytes(config.get_timing_cache().serialize()) if keeps_times else b""


def _logger(tensorrt: Any) -> Any:
    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.INTERNAL_ERROR, tensorrt.ILogger.ERROR):
                self.errors.append(message)

    return Logger()


class _Driver:
    """What of the CUDA driver is needed here (https://docs.nvidia.com/cuda/cuda-driver-api)."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise RuntimeError("this machine has no CUDA driver (libcuda.so.1)") from None
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxSetFlags_v2", self._device, SPIN)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)  # the one that TensorRT works in
        self._call("cuCtxSetCurrent", context)
        self._stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(self._stream), 1)  # CU_STREAM_NON_BLOCKING

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"{function}: {(name.value or b'').decode() or status}")

    def versions(self) -> dict[str, str]:
        """The newest CUDA that the driver knows, and the GPU's name."""
        version, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self._call("cuDeviceGetName", name, len(name), self._device)
        return {"cuda": f"{version.value // 1000}.{version.value % 1000 // 10}", "device": name.value.decode()}

    def zeros(self, num_bytes: int) -> int:
        """The address of memory on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._call("cuMemsetD8_v2", address, 0, ctypes.c_size_t(num_bytes))
        return address.value

    def graph(self, enqueue: Callable[[int], bool], memory: list[int]) -> Callable[[], None]:
        """A function that launches what `enqueue` puts on a stream, and waits for its end.

        `memory`, which is used there, is freed with it, and so is what `enqueue` belongs to.
        """

        def launch_once() -> None:
            if not enqueue(self._stream.value or 0):
                raise RuntimeError("TensorRT cannot launch the network")

        launch_once()  # what is done only once must not be captured
        self._call("cuStreamSynchronize", self._stream)
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, RELAXED)
        launch_once()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)
        launch, wait, stream = self._library.cuGraphLaunch, self._library.cuStreamSynchronize, self._stream

        def run() -> None:
            if launch(ready, stream) or wait(stream):
                raise RuntimeError("the GPU failed")

        weakref.finalize(run, self._release, ready, memory, enqueue).atexit = False
        return run

    def _release(self, graph: ctypes.c_void_p, memory: list[int], enqueue: object) -> None:
        self._call("cuGraphExecDestroy", graph)
        for address in memory:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
