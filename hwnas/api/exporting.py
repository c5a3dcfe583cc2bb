"""`hwnas export`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas.api.catalogue import open_device
from hwnas.api.costs import read_architecture
from hwnas.api.evaluating import open_evaluator
from hwnas.config import read_json
from hwnas.devices import Device
from hwnas.errors import DeviceError, InputError
from hwnas.measuring.measure import measure
from hwnas.progress import Notice, unheard
from hwnas.run import Run
from hwnas.space import Architecture
from hwnas.store import Store

if TYPE_CHECKING:
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.exporters.base import Artifact
    from hwnas.searching.result import Result


def export(
    run: str | Path | None = None,
    *,
    format: str = "onnx",
    result: str | None = None,
    arch: str | Path | Architecture | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    num_parity_images: int = 64,
    data: TorchDatasets | None = None,
    notice: Notice = unheard,
) -> tuple[Path, dict[str, Any]]:
    """Write a child as a deployable bundle: a folder with the model file and `manifest.json`.

    The child is calibrated, its file is run in its own runtime on real images and compared with the child, measured on
    the device, and evaluated on the test images.

    Args:
        run: the run folder.
        format: of the file.
        result: name of a search result (`cpu-0.2ms`), whose best child is exported; by default the last search's.
        arch: a child of your own in its place: an architecture, `smallest`, `biggest`, or a file.
        device: where to measure the file; by default the search's device.
        output: the bundle's folder; by default `exports/<name>` in the run.
        num_parity_images: test images to compare logits on.
        data: what the run was trained on, if that was a dataset of PyTorch.
        notice: told what a user should know.

    Returns:
        The folder and the manifest.

    Raises:
        InputError: unknown format, no search result, an architecture outside the space, an unwritable target.
        ExportError: the file does not compute what the child computes; nothing is written.
        DeviceError: the device cannot be used.
    """
    from hwnas.bundle import write_bundle
    from hwnas.exporters.base import exporter

    opened = Run(run)
    writer = exporter(format)
    if arch is None:
        name, found = _result(opened, result)
        child_arch, device = found.best.architecture, device or found.device
    else:
        found, child_arch = None, opened.space.check(read_architecture(arch, opened.space), any_resolution=True)
        name = arch if arch in ("smallest", "biggest") else child_arch.id
    target = Path(output) if output is not None else opened.folder("exports") / f"{name}-{format}"
    evaluator = open_evaluator(opened, notice, data)
    images_of, space = evaluator.data, opened.space
    child = evaluator.child(child_arch)
    with ExitStack() as stack:
        bench: Callable[[Path], dict[str, Any]] | None = None
        if device is not None:
            bench_device = stack.enter_context(open_device(device, opened))
            if bench_device.accepts != format:
                raise InputError(
                    f"device {device!r} runs {bench_device.accepts} files, but the exporter writes {format}: "
                    f"use --format {bench_device.accepts}"
                )
            store = stack.enter_context(opened.store())
            bench = partial(_measure_file, opened, child_arch, bench_device, store)

        def about(artifact: Artifact) -> dict[str, Any]:
            latency = None if bench is None else bench(artifact.path)
            limits = [] if found is None else [dict(limit) for limit in found.limits]
            if latency is not None:
                same = {"kind": "latency", "device": latency["device"]}
                for ms in [limit["value"] for limit in limits if same.items() <= limit.items()]:
                    if latency["measured_ms"] > ms:
                        notice(f"the file takes {latency['measured_ms']:.4g} ms, over the search's limit of {ms:g} ms")
            test = evaluator.score(child, child_arch, images_of.test)
            return {
                "architecture": child_arch.to_dict(),
                "architecture_text": child_arch.describe(),
                "space": space.name,
                "preprocessing": {
                    **asdict(images_of.preprocessing),
                    "resolution": child_arch.resolution,
                    "resize": "bicubic",
                },
                "classes": list(images_of.classes),
                "accuracy": {"split": "test", "value": test.accuracy, "num_images": test.num_images},
                "latency": latency,
                "limits": limits,
                "training": {"data": images_of.name, "weights": evaluator.supernet.identity()},
            }

        images = evaluator.images(images_of.test, child_arch.resolution, num_parity_images)
        path, _ = write_bundle(child, writer, images, target, about)
    return path, read_json(path / "manifest.json")


def _measure_file(run: Run, arch: Architecture, device: Device, store: Store, file: Path) -> dict[str, Any]:
    """A child's own file measured on a device, for its manifest."""
    (measured,) = measure([arch], run.space, device, device.timing, store, role="export", files={arch: file})
    if measured.error is not None:
        raise DeviceError(f"the file could not be measured on {measured.device}: {measured.error}")
    document: dict[str, Any] = {
        "device": measured.device,
        "runtime": measured.runtime,
        "versions": dict(measured.versions),
        "precision": measured.precision,
        "timing": asdict(measured.timing),
        "measured_ms": measured.latency_ms,
        "relative_iqr": measured.relative_iqr,
        "rejection": measured.rejection,
        "predicted_ms": None,
        "std_ms": None,
    }
    if arch.resolution in run.space.resolution and run.predictor_path(device.name).is_file():
        mean, std = run.predictor(device.name).predict([arch])
        document |= {"predicted_ms": float(mean[0]), "std_ms": float(std[0])}
    return document


def _result(run: Run, name: str | None) -> tuple[str, Result]:
    from hwnas.searching.result import Result

    paths = [path for path in (run.path / "results").glob("*.json") if not path.name.startswith("portfolio-")]
    paths.sort(key=lambda path: path.stat().st_mtime)
    if not paths:
        raise InputError(f"no finished search in {run.path}: run `hwnas search --device cpu --latency-ms ...` first")
    path = paths[-1] if name is None else run.result_path(name)
    if path not in paths:
        raise InputError(f"no result {name!r} in {run.path}: not one of {', '.join(p.stem for p in paths)}")
    return path.stem, Result.from_dict(read_json(path))
