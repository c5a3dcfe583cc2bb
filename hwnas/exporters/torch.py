"""PyTorch's own format (.pt2), by torch.export: for servers that run torch, and for AOTInductor."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from hwnas.exporters.base import Artifact, Exporter, Input, Run, folded, half, tensor, write_pieces
from hwnas.layers import Layer

# What torch.export.save writes for our networks. Whatever else torch.export.load finds in a file, it may unpickle.
_MEMBERS = re.compile(
    r"[^/]+/(data/weights/weight_\d+|data/(weights|constants)/model_\w+_config\.json|data/sample_inputs/model\.pt|"
    r"models/model\.json|archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|"
    r"\.storage_alignment|version)"
)


class TorchExporter(Exporter):
    """Writes exported programs, with batch norm folded into the convolutions.

    The input is float32 (batch, in_channels, resolution, resolution), or pixels, uint8 (batch, resolution, resolution,
    in_channels). fp16 files hold and compute in half precision between such an input and float32 logits: they are for
    GPUs, and slow on processors without half-precision arithmetic.
    """

    format: ClassVar[str] = "torch"
    suffix: ClassVar[str] = ".pt2"
    pixel_input: ClassVar[Input | None] = Input("NHWC", "uint8")
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    batches: ClassVar[Literal["one", "fixed", "any"]] = "any"
    runtime: ClassVar[str] = "torch"
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def _write(self, layers: Sequence[Layer], tensors: Mapping[str, NDArray[Any]], path: Path) -> Artifact:
        """See `Exporter`."""
        import torch

        from hwnas.network import Network

        plain, state = [], {}
        for layer in layers:
            bias: NDArray[Any] | None = None
            if layer.kind == "conv":
                state[f"{layer.name}.conv.weight"], bias = folded(layer, tensors)
                if bias is not None:
                    state[f"{layer.name}.conv.bias"] = bias
            else:
                state |= {name: tensor(tensors, name, shape) for name, shape in layer.tensors.items()}
            plain.append(replace(layer, norm=False, bias=bias is not None) if layer.kind == "conv" else layer)
        network = Network(plain).eval().requires_grad_(False)
        is_half = self.precision == "fp16"
        dtype = torch.float16 if is_half else torch.float32
        numbers = {name: half(name, value) if is_half else np.float32(value) for name, value in state.items()}
        network.to(dtype).load_state_dict({name: torch.from_numpy(value) for name, value in numbers.items()})
        pixels = self.form.pixels is not None

        class Program(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                images = images.permute(0, 3, 1, 2) if pixels else images
                return self.network(images.to(dtype)).float()  # type: ignore[no-any-return]

        channels, size = layers[0].in_channels, layers[0].in_size
        # Torch takes a dimension of 1 for a constant, also where it may be any: the example has 2 images.
        shape = (self.form.batch or 2, *((size, size, channels) if pixels else (channels, size, size)))
        images = torch.zeros(shape, dtype=getattr(torch, self.takes.dtype))
        batch = {0: torch.export.Dim("batch", min=1)} if self.form.batch is None else None
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its own code
            program = torch.export.export(Program().eval(), (images,), dynamic_shapes=(batch,))
            torch.export.save(program, content)
        return Artifact(path, self.format, self.precision, write_pieces(path, [content.getvalue()]))

    @staticmethod
    def load(path: Path) -> Run:
        """See `Exporter`."""
        import torch

        network = torch.export.load(path).module()
        return lambda image: network(torch.from_numpy(image)).numpy()

    def _open(self, path: Path) -> Run:
        """See `Exporter`; refuses files that `torch.export.load` would unpickle, which could run any program."""
        _check(path)
        return self.load(path)


def _check(path: Path) -> None:
    """Look through a file without executing anything of it.

    Raises:
        ValueError: it holds something that we do not write.
        Exception: it is damaged, or has a pickle of more than tensors.
    """
    import torch

    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
        strange = [name for name in names if not _MEMBERS.fullmatch(name)]
        if strange or len({*names}) != len(names) or not any(name.endswith("/archive_format") for name in names):
            raise ValueError(f"it was not written by hwnas: {', '.join(strange[:3]) or 'its parts are not those'}")
        for name in names:
            if name.endswith(".pt"):
                torch.load(io.BytesIO(packed.read(name)), weights_only=True)
            if name.endswith("_config.json"):
                entries = json.loads(packed.read(name))["config"]
                if any(entry["use_pickle"] for entry in entries.values()):
                    raise ValueError(f"{name} asks for unpickling")
