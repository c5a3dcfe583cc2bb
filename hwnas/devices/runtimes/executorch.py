"""ExecuTorch's Python bindings: XNNPACK on a processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BACKEND = "XnnpackBackend"
FLOAT = 6  # torch's ScalarType of float32


class Runtime:
    """Networks in .pte files that XNNPACK runs as a whole.

    Args:
        precision: `fp32`, or `int8` for files that are quantised: the file says what XNNPACK computes in.
    """

    accepts = "executorch"
    precisions = ("fp32", "int8")
    install = "hwnas[executorch], or executorch and torch, which its bindings need"

    def __init__(self, precision: str) -> None:
        self._threads = 0

    def versions(self) -> dict[str, str]:
        """Of the runtime."""
        from executorch.extension.pybindings import portable_lib  # noqa: F401 - without torch it fails here
        from executorch.version import __version__

        return {"executorch": str(__version__)}

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        import torch
        from executorch.exir._serialize._program import deserialize_pte_binary
        from executorch.extension.pybindings import portable_lib

        with open(path, "rb") as file:  # noqa: PTH123 - a str path
            data = file.read()
        if data[4:6] != b"ET":  # the flatbuffer's identifier: ET12
            raise ValueError("the file is no ExecuTorch program")
        plans = deserialize_pte_binary(data).program.execution_plan
        # Its own portable kernels are 140 times slower (MobileNetV3-large, x86-64).
        others = {operator.name for plan in plans for operator in plan.operators}
        others |= {delegate.id for plan in plans for delegate in plan.delegates} - {BACKEND}
        if others or not any(plan.delegates for plan in plans):
            found = ", ".join(sorted(others)) or "no delegate"
            raise ValueError(f"the file has {found}: it has to run as a whole in {BACKEND}")
        self._set_threads(portable_lib, threads)
        program = portable_lib._load_program(path)
        name = program.get_method_name(0)
        meta = program.method_meta(name)
        images = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
        if len(images) != 1 or images[0].dtype() != FLOAT:
            raise ValueError(f"the file's inputs are {images}, not one of float32")
        image = np.random.default_rng(0).standard_normal(images[0].sizes(), dtype=np.float32)
        inputs = [torch.from_numpy(image)]
        method = program.load_method(name)
        method.set_inputs(inputs)

        def run(read_in_place: object = inputs) -> object:  # where the program plans no memory for them
            return method.execute()

        return run

    def _set_threads(self, portable_lib: Any, threads: int) -> None:
        """Make the process's one thread pool that large; a loaded network keeps a pointer to the pool it met."""
        if self._threads not in (0, threads):
            raise ValueError(f"threads={threads}: networks were loaded with {self._threads}, and share one pool")
        self._threads = threads
        portable_lib._unsafe_reset_threadpool(threads)
        found = portable_lib._threadpool_get_thread_count()
        if found != threads:
            raise RuntimeError(f"executorch's thread pool has {found} threads, not {threads}")
