"""onnxruntime: on the processor, or through its CUDA and TensorRT execution providers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Runtime:
    """Networks in ONNX files, on a processor or a GPU.

    Args:
        precision: `fp32`; `int8` for files that are quantised; `fp16` with the TensorRT provider.
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
        self._provider = provider
        self._options = {"trt_fp16_enable": "True"} if precision == "fp16" else {}

    def versions(self) -> dict[str, str]:
        """Of the runtime."""
        import onnxruntime

        return {"onnxruntime": str(onnxruntime.__version__)}

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        import onnxruntime

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
        # Bound buffers: making the arrays of `session.run` takes 5 us, a tenth of a tiny network.
        binding = session.io_binding()
        for tensor, bind in [
            *((tensor, binding.bind_ortvalue_input) for tensor in session.get_inputs()),
            *((tensor, binding.bind_ortvalue_output) for tensor in session.get_outputs()),
        ]:
            if tensor.type != "tensor(float)" or not all(isinstance(size, int) for size in tensor.shape):
                raise ValueError(f"{tensor.name} is {tensor.type} {tensor.shape}, not float32 of a fixed shape")
            value = rng.standard_normal(tensor.shape, dtype=np.float32)
            bind(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        return lambda: session.run_with_iobinding(binding)
