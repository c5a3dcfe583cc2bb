"""onnxruntime: on the processor, or through its CUDA and TensorRT execution providers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress

import numpy as np

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Runtime:
    """Networks in ONNX files, on a processor or a GPU.

    Args:
        precision: `fp32`; `int8` for files that are quantised, on the processor; `fp16` with the TensorRT provider.
        provider: one of `PROVIDERS`.
    """

    accepts = "onnx"
    precisions = ("fp32", "fp16", "int8")
    install = "hwnas or onnxruntime (for the GPU: onnxruntime-gpu)"

    def __init__(self, precision: str, provider: str = "cpu") -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"provider={provider!r}: must be one of {', '.join(PROVIDERS)}")
        if precision == "fp16" and provider != "tensorrt":
            raise ValueError("precision fp16 needs provider tensorrt: onnxruntime's others run networks as written")
        if precision == "int8" and provider != "cpu":
            raise ValueError("precision int8 needs provider cpu: for integers on NVIDIA's GPUs take runtime tensorrt")
        self._provider = provider
        self._options = {"trt_fp16_enable": "True"} if precision == "fp16" else {}

    def versions(self) -> dict[str, str]:
        """Of the runtime, and the GPU's name and its driver's version."""
        import onnxruntime

        self._require_provider()
        versions = {"onnxruntime": str(onnxruntime.__version__)}
        if self._provider != "cpu":
            with suppress(OSError, subprocess.SubprocessError):  # Jetsons have none
                ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
                answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout
                versions["device"] = answer.splitlines()[0].strip()
        return versions

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        import onnxruntime

        self._require_provider()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        provider = PROVIDERS[self._provider]
        if self._provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, self._options)])
        if session.get_providers()[0] != provider:  # onnxruntime only warns
            raise RuntimeError(f"the network would run on {session.get_providers()[0]}, not {provider}")
        rng = np.random.default_rng(0)
        # Bound buffers: making the arrays of `session.run` takes 5 us, a tenth of a tiny network; and those on a GPU
        # keep transfers out of the times. `run_with_iobinding` returns when the GPU has finished.
        memory = "cpu" if self._provider == "cpu" else "cuda"
        binding = session.io_binding()
        for tensor, bind in [
            *((tensor, binding.bind_ortvalue_input) for tensor in session.get_inputs()),
            *((tensor, binding.bind_ortvalue_output) for tensor in session.get_outputs()),
        ]:
            if tensor.type != "tensor(float)" or not all(isinstance(size, int) for size in tensor.shape):
                raise ValueError(f"{tensor.name} is {tensor.type} {tensor.shape}, not float32 of a fixed shape")
            value = rng.standard_normal(tensor.shape, dtype=np.float32)
            bind(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(value, memory))
        return lambda: session.run_with_iobinding(binding)

    def _require_provider(self) -> None:
        import onnxruntime

        wanted, found = PROVIDERS[self._provider], onnxruntime.get_available_providers()
        if wanted not in found:
            raise RuntimeError(
                f"onnxruntime {onnxruntime.__version__} has no {wanted}, only {', '.join(found)}: "
                "install onnxruntime-gpu in its place"
            )
