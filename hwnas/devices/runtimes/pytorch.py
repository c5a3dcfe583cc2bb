"""PyTorch: the networks as a framework runs them. It says what a runtime is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEVICES = ("cpu", "cuda")


class Runtime:
    """Networks in ONNX files, executed operator by operator.

    Args:
        precision: of weights and activations.
        device: `cpu` or `cuda`.
        compiled: by `torch.compile`, which needs a C++ compiler there and a minute or more a network: allow for it in
            `timing: {timeout_s: ...}`.
    """

    accepts = "onnx"
    precisions = tuple(PRECISIONS)
    install = "torch and onnx"

    def __init__(self, precision: str, device: str = "cpu", compiled: bool = False) -> None:
        if device not in DEVICES:
            raise ValueError(f"device={device!r}: must be one of {', '.join(DEVICES)}")
        self._dtype, self._device, self._compiled = PRECISIONS[precision], device, compiled

    def versions(self) -> dict[str, str]:
        """Of torch, and the GPU's name."""
        import onnx  # noqa: F401 - which `load` needs
        import torch

        versions = {"torch": str(torch.__version__)}
        if self._device == "cuda":
            self._require_cuda()
            versions["device"] = torch.cuda.get_device_name()
        return versions

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """A function that runs the network once on random input."""
        import onnx
        import torch

        if self._device == "cuda":
            self._require_cuda()
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        graph = onnx.load(path).graph
        dtype = getattr(torch, self._dtype)
        model = network(graph).to(self._device, dtype).eval()
        layout = torch.channels_last  # faster for convolutions on a processor, and for Tensor Cores
        model = model.to(memory_format=layout)
        if self._compiled:
            model = torch.compile(model, fullgraph=True)
        shape = [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device, dtype)
        image = image.to(memory_format=layout)

        def run() -> object:
            with torch.inference_mode():
                logits = model(image)
            if self._device == "cuda":
                torch.cuda.synchronize()
            return logits

        return run

    def _require_cuda(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device on this machine")


def network(graph: Any) -> Any:
    """A torch module that computes an ONNX graph of the operators that hwnas writes.

    Raises:
        ValueError: there is another operator in it.
    """
    import torch
    from onnx import helper, numpy_helper
    from torch.nn import functional

    weights = {weight.name: torch.tensor(numpy_helper.to_array(weight)) for weight in graph.initializer}
    nodes, source, target = list(graph.node), graph.input[0].name, graph.output[0].name
    gates = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Sigmoid"}
    swishes = {
        node.output[0]: node.input[1]
        for node in nodes
        if node.op_type == "Mul" and gates.get(node.input[1]) == node.input[0]
    }

    def operator(node: Any) -> Callable[..., Any]:
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv":
            stride, padding, groups = options["strides"], options["pads"][:2], options["group"]
            return lambda x, weight, bias=None: functional.conv2d(x, weight, bias, stride, padding, groups=groups)
        if node.op_type == "AveragePool":
            kernel = options["kernel_shape"]
            return lambda x: functional.avg_pool2d(x, kernel, ceil_mode=True, count_include_pad=False)
        if node.output[0] in swishes:
            return functional.silu
        simple: dict[str, Callable[..., Any]] = {
            "Add": torch.add,
            "Flatten": lambda x: x.flatten(1),
            "Gemm": functional.linear,
            "GlobalAveragePool": lambda x: functional.adaptive_avg_pool2d(x, 1),
            "HardSigmoid": functional.hardsigmoid,
            "HardSwish": functional.hardswish,
            "Mul": torch.mul,
            "Relu": functional.relu,
            "Sigmoid": torch.sigmoid,
        }
        if node.op_type not in simple:
            hint = ": quantised files are not for PyTorch" if "Quantize" in node.op_type else ""
            raise ValueError(f"operator {node.op_type}{hint}; the PyTorch runtime knows what hwnas writes in fp32")
        return simple[node.op_type]

    last_use = {name: index for index, node in enumerate(nodes) for name in node.input}
    steps = []
    for index, node in enumerate(nodes):
        if node.output[0] in swishes.values():
            continue  # the sigmoid of a swish
        inputs = [name for name in node.input if name not in swishes.values()]
        done = [name for name in inputs if last_use[name] == index and name not in weights]
        steps.append((operator(node), inputs, node.output[0], done))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = {name: f"weight{number}" for number, name in enumerate(weights)}
            for name, value in weights.items():
                self.register_buffer(self.names[name], value)

        def forward(self, image: Any) -> Any:
            values = {source: image}
            for function, inputs, output, done in steps:
                arguments = [getattr(self, self.names[name]) if name in self.names else values[name] for name in inputs]
                values[output] = function(*arguments)
                for name in done:
                    del values[name]  # its memory goes to the next values
            return values[target]

    return Network()
