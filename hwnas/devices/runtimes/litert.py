"""LiteRT (TensorFlow Lite): on the processor, through XNNPACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_FORCE_FP16 = 4  # TFLITE_XNNPACK_DELEGATE_FLAG_FORCE_FP16


class Runtime:
    """Networks in TFLite files, on a processor.

    Args:
        precision: `fp32`; `int8` for files that are quantised; `fp16` on processors that compute in it (ARMv8.2, x86
            with AVX512-FP16).
    """

    accepts = "tflite"
    precisions = ("fp32", "fp16", "int8")
    install = "hwnas[litert] or ai-edge-litert"

    def __init__(self, precision: str) -> None:
        self._precision = precision

    def versions(self) -> dict[str, str]:
        """Of the runtime."""
        import importlib.metadata

        import ai_edge_litert  # noqa: F401

        return {"litert": importlib.metadata.version("ai-edge-litert")}

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(path, num_threads=threads)
        interpreter.allocate_tensors()
        # Operators that XNNPACK lacks run in LiteRT's own kernels, as they would in an app. None with it is a defect.
        if not any(operator["op_name"] == "DELEGATE" for operator in interpreter._get_ops_details()):
            raise RuntimeError("XNNPACK took no part of the network: is this LiteRT built with it?")
        tensor = interpreter.get_input_details()[0]
        if tensor["dtype"] is not np.float32:
            raise ValueError(f"{tensor['name']} is {np.dtype(tensor['dtype'])}, not float32")
        image = np.random.default_rng(0).standard_normal(tensor["shape"], dtype=np.float32)
        interpreter.set_tensor(tensor["index"], image)
        run: Callable[[], object] = interpreter.invoke
        if self._precision != "fp16":
            return run
        run()
        logits = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        return _load_fp16(path, threads, image, logits)


def _load_fp16(path: str, threads: int, image: Any, logits: Any) -> Callable[[], object]:
    """Like `load`; `logits` are those in fp32, to tell whether fp16 is what it claims to be."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.cpu_options import CpuOptions
    from ai_edge_litert.options import Options

    options = Options(cpu_options=CpuOptions(num_threads=threads, xnnpack_flags=_FORCE_FP16))
    try:
        model = CompiledModel.from_file(path, options=options)
    except RuntimeError as error:
        raise RuntimeError(f"precision fp16: XNNPACK refuses it on this processor: {error}") from None
    inputs, outputs = model.create_input_buffers(0), model.create_output_buffers(0)
    inputs[0].write(image)

    def run() -> None:
        model.run_by_index(0, inputs, outputs)

    run()
    rounded = outputs[0].read(logits.size, np.float32)
    if not model.is_fully_accelerated() or np.array_equal(rounded, logits.reshape(-1)):
        raise RuntimeError("precision fp16: XNNPACK computes in fp32 on this processor: use precision fp32")
    return run
