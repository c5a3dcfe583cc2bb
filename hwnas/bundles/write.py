"""Writing a bundle: the model file is run and compared with its network before anything is at the target."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwnas.bundles.card import PLOT, Front, card, plot
from hwnas.bundles.culprit import culprit
from hwnas.bundles.manifest import (
    CHECK,
    MANIFEST,
    SCHEMA,
    Accuracy,
    File,
    ImagePreprocessing,
    Input,
    Latency,
    Manifest,
    ModelFile,
    Output,
)
from hwnas.bundles.parity import Parity
from hwnas.bundles.scripts import scripts
from hwnas.errors import ExportError, InputError
from hwnas.exporters.base import LOGITS, Artifact, Exporter
from hwnas.files import parts, write_text
from hwnas.layers import IMAGE, total_macs, total_params
from hwnas.machine import versions
from hwnas.network import Network

PACKAGES = ("torch", "numpy", "pillow", "onnx")  # whose versions a bundle tells, beside its exporter's
NUM_CHECKED = 4  # images that go into the bundle, with their logits


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a bundle says about its network, beside what the network and the file tell themselves.

    Attributes: see `Manifest`, and `card.Front`.
    """

    architecture: Mapping[str, Any]
    architecture_text: str
    space: str
    classes: tuple[str, ...]
    preprocessing: ImagePreprocessing
    accuracy: Accuracy
    latency: Latency | None
    limits: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    licences: dict[str, str]
    front: Front | None


def write_bundle(
    child: Network,
    tensors: Mapping[str, NDArray[Any]],
    exporter: Exporter,
    images: NDArray[np.float32],
    target: Path,
    about: Callable[[Artifact], About],
) -> Manifest:
    """Write a child's bundle, a folder or a zip file, after running its file on real images.

    Args:
        child: calibrated, in evaluation mode, on the CPU.
        tensors: what the exporter gets.
        exporter: of the format.
        images: (num_images, in_channels, resolution, resolution), preprocessed.
        target: made, or replaced as a whole if it holds a bundle; a zip file if its name ends so.
        about: the rest of what the manifest says; called once the file has passed.

    Raises:
        ExportError: the file's logits are too far from the child's; nothing is at `target` that was not there before.
        InputError: `target` is something other than a bundle, or cannot be written.
    """
    check_target(target)
    with _writing(target) as work:
        artifact = exporter.write(child.layers, tensors, work / f"model{exporter.suffix}")
        with torch.inference_mode():
            expected = child(torch.from_numpy(images)).numpy()
        found = exporter.infer(artifact.path, images)
        parity = Parity.of(expected, found, exporter.precision, exporter.runtime)
        if not parity.passed:
            name = culprit(child.layers, tensors, child, exporter, images)
            where = "no single layer is wrong" if name is None else f"the first layer that is wrong is {name}"
            raise ExportError(
                f"the {exporter.format} file does not compute what its network computes: {parity}; {where}; nothing "
                "was written"
            )
        np.savez(work / CHECK, images=images[:NUM_CHECKED], logits=found[:NUM_CHECKED])
        told = about(artifact)
        manifest = _manifest(child, exporter, artifact, parity, told)
        for name, text in scripts(manifest, exporter).items():
            write_text(work / name, text)
        if told.front is not None:
            write_text(work / PLOT, plot(told.front))
        write_text(work / "README.md", card(manifest, told.front, " ".join(exporter.packages)))
        known = {file.name: file for file in manifest.files}
        files = tuple(known.get(_name(path, work)) or _file(path, work) for path in _files(work))
        manifest = replace(manifest, files=files)
        write_text(work / MANIFEST, json.dumps(manifest.to_dict(), indent=2) + "\n")
    return manifest


def check_target(target: Path) -> None:
    """Refuse to replace what is no bundle.

    Raises:
        InputError: there is something else.
    """
    if target.suffix == ".zip":
        ours = target.is_file() and zipfile.is_zipfile(target) and _holds_manifest(target)
    else:
        ours = (target / MANIFEST).is_file()
    if not ours and os.path.lexists(target):
        raise InputError(f"{target}: exists and is not a bundle of hwnas: name another with --output")


def _holds_manifest(path: Path) -> bool:
    with zipfile.ZipFile(path) as packed:
        return MANIFEST in packed.namelist()


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """A folder to fill, hidden beside `target`, that becomes `target` when the block ends without an exception.

    Raises:
        InputError: the system refuses: no rights, no room.
    """
    work = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        full = work / target.stem
        full.mkdir()
        yield full
        if target.suffix == ".zip":
            packed = work / target.name
            _pack(full, packed)
            packed.replace(target)
        else:
            if target.exists():
                target.rename(work / "old")
            full.replace(target)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error}): name another with --output"
        ) from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _pack(folder: Path, path: Path) -> None:
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for part in _files(folder):
                packed.write(part, _name(part, folder))
        file.flush()
        os.fsync(file.fileno())


def _files(*paths: Path) -> list[Path]:
    """Files, and those in folders."""
    return sorted(file for path in paths for file in (path, *path.rglob("*")) if file.is_file())


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _file(path: Path, folder: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(name=_name(path, folder), size_bytes=path.stat().st_size, sha256=digest)


def _manifest(child: Network, exporter: Exporter, artifact: Artifact, parity: Parity, told: About) -> Manifest:
    first, last, folder = child.layers[0], child.layers[-1], artifact.path.parent
    files, kept = _files(*parts(artifact.path)), exporter.kept(child.layers)
    if len(told.classes) != last.out_channels:
        raise InputError(
            f"the network has {last.out_channels} classes, but the data has {len(told.classes)}: export with the data "
            "that it was trained on"
        )
    batch, (layout, dtype) = exporter.form.batch, exporter.takes
    channels, side = first.in_channels, first.in_size
    shape = (batch, channels, side, side) if layout == "NCHW" else (batch, side, side, channels)
    written = [_file(path, folder) for path in _files(folder)]
    return Manifest(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        file=ModelFile(
            name=artifact.path.name,
            parts=tuple(_name(path, folder) for path in files),
            format=artifact.format,
            precision=artifact.precision,
            float32_layers=tuple(layer.name for layer in child.layers if layer.name in kept),
            size_bytes=sum(path.stat().st_size for path in files),
        ),
        input=Input(
            name=IMAGE,
            shape=shape,
            layout=layout,
            dtype=dtype,
            values="normalised" if exporter.form.pixels is None else "pixels",
        ),
        output=Output(name=LOGITS, shape=(batch, last.out_channels)),
        preprocessing=told.preprocessing,
        classes=told.classes,
        architecture=dict(told.architecture),
        architecture_text=told.architecture_text,
        space=told.space,
        macs=total_macs(child.layers),
        params=total_params(child.layers),
        accuracy=told.accuracy,
        latency=told.latency,
        limits=told.limits,
        parity=parity,
        training=told.training,
        versions=versions((*PACKAGES, *exporter.packages)),
        licences=told.licences,
        files=tuple(written),
    )
