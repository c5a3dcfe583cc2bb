"""The deployable folder: a model file that was run and compared with its network, and a manifest."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwnas import __version__
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import LOGITS, Artifact, Exporter
from hwnas.files import parts, write_text
from hwnas.layers import IMAGE, total_macs, total_params
from hwnas.network import Network

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_ABS_DIFF = 1e-3  # of fp32 logits, against the network's own


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a file's logits are from its network's.

    Attributes:
        num_images: real images compared.
        max_abs_diff: largest difference of a logit.
        top1_agreement: share of images with the same highest logit, 0 to 1.
        max_allowed: of `max_abs_diff`.
    """

    num_images: int
    max_abs_diff: float
    top1_agreement: float
    max_allowed: float = MAX_ABS_DIFF

    @property
    def passed(self) -> bool:
        """Whether the file may be shipped."""
        return self.max_abs_diff < self.max_allowed and self.top1_agreement == 1.0  # false for NaN

    @classmethod
    def of(cls, expected: Tensor, found: np.ndarray[Any, np.dtype[np.float32]]) -> Parity:
        """Compare logits, both (num_images, num_classes)."""
        reference = expected.numpy()
        return cls(
            len(reference),
            float(np.abs(reference - found).max()),
            float((reference.argmax(1) == found.argmax(1)).mean()),
        )


def write_bundle(
    child: Network,
    exporter: Exporter,
    images: Tensor,
    target: Path,
    about: Callable[[Artifact], Mapping[str, Any]],
) -> tuple[Path, Parity]:
    """Write the child's file and its manifest into the folder `target`, after running it on real images.

    Args:
        child: calibrated, in evaluation mode.
        exporter: of the format.
        images: (num_images, in_channels, resolution, resolution), preprocessed.
        target: made, or replaced as a whole if it holds a bundle.
        about: what else the manifest says; called once the file has passed.

    Raises:
        ExportError: the file's logits differ from the child's; nothing is at `target` that was not there before.
        InputError: `target` is something other than a bundle, or cannot be written.
    """
    if target.exists() and not (target / MANIFEST).is_file():
        raise InputError(f"{target}: exists and is not a bundle of hwnas: name another with --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}): name another with --output") from None
    try:
        tensors = {name: tensor.cpu().numpy() for name, tensor in child.state_dict().items()}
        artifact = exporter.write(child.layers, tensors, work / f"model{exporter.suffix}")
        with torch.no_grad():
            expected = child(images)
        parity = Parity.of(expected, exporter.infer(artifact.path, images.numpy()))
        if not parity.passed:
            raise ExportError(
                f"the {exporter.format} file does not compute what its network computes: logits differ by up to "
                f"{parity.max_abs_diff:.3g} (allowed {parity.max_allowed:g}), the top class agrees on "
                f"{parity.top1_agreement:.1%} of {parity.num_images} images; nothing was written"
            )
        manifest = _manifest(child, exporter, artifact, parity, about(artifact))
        write_text(work / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        work.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}): name another with --output") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target, parity


def _manifest(
    child: Network, exporter: Exporter, artifact: Artifact, parity: Parity, about: Mapping[str, Any]
) -> dict[str, Any]:
    first = child.layers[0]
    shape = {"N": 1, "C": first.in_channels, "H": first.in_size, "W": first.in_size}
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "file": {
            "name": artifact.path.name,
            "format": artifact.format,
            "precision": artifact.precision,
            "size_bytes": sum(part.stat().st_size for part in parts(artifact.path)),
            "sha256": artifact.sha256,
            "parts": [part.name for part in parts(artifact.path)],
        },
        "input": {
            "name": IMAGE,
            "shape": [shape[axis] for axis in exporter.layout],
            "layout": exporter.layout,
            "dtype": "float32",
        },
        "output": {"name": LOGITS, "shape": [1, child.layers[-1].out_channels], "dtype": "float32"},
        "macs": total_macs(child.layers),
        "params": total_params(child.layers),
        "parity": {**asdict(parity), "passed": parity.passed},
        **about,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What made a bundle."""
    found = {"hwnas": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "onnx", "onnxruntime", "ai-edge-litert", "executorch", "ncnn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
