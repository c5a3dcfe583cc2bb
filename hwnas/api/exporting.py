"""`hwnas export` and `hwnas verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hwnas.api.catalogue import open_device
from hwnas.api.costs import read_architecture
from hwnas.api.evaluating import open_evaluator
from hwnas.config import read_json
from hwnas.devices import Device
from hwnas.errors import DeviceError, InputError
from hwnas.measuring.measure import measure
from hwnas.progress import Notice, unheard
from hwnas.run import PORTFOLIO, Run
from hwnas.space import Architecture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hwnas.bundles.card import Front
    from hwnas.bundles.manifest import Accuracy, Latency
    from hwnas.bundles.write import About
    from hwnas.data import Split
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.exporters.base import Artifact, Exporter, Pixels
    from hwnas.searching.result import Result

NUM_RANGED = 512  # calibration images for the ranges of int8, in batches of 64: see docs/export.md
NUM_PROBED = 64  # calibration images for the sensitivity of blocks
LICENCES = {  # of data sets
    "fashion-mnist": "MIT (github.com/zalandoresearch/fashion-mnist)",
}


def export(
    run: str | Path | None = None,
    *,
    format: str | None = None,
    precision: str | None = None,
    max_accuracy_drop: float | None = None,
    result: str | None = None,
    arch: str | Path | Architecture | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    batch: int | Literal["any"] = 1,
    pixels: bool = False,
    num_parity_images: int = 64,
    data: TorchDatasets | None = None,
    notice: Notice = unheard,
) -> tuple[Path, dict[str, Any]]:
    """Write a child as a deployable bundle: a folder or zip file with the model file and all one needs to run it.

    The child is calibrated, its file is run in its own runtime on real images and compared with the child, measured on
    the device, and evaluated on the test images.

    Args:
        run: the run folder.
        format: of the file; by default the one that the device takes, or onnx.
        precision: `fp32`, `fp16`, `int8`; by default that of the files that the device takes, or fp32.
        max_accuracy_drop: of an int8 file against its network on the validation images, 0 to 1: blocks stay in float32
            until it is kept, where the format can mix. None to take what comes.
        result: name of a search result (`cpu-0.2ms`), whose best child is exported; by default the last search's.
        arch: a child of your own in its place: an architecture, `smallest`, `biggest`, or a file.
        device: where to measure the file; by default the search's device, if it takes such files and can be reached.
        output: the bundle: a folder, or a zip file if it ends in `.zip`; by default in the run's `exports`, by the name
            of the result, the format, and what of its form is not usual.
        batch: images that one call of the file takes; `any` for any number, where the format can.
        pixels: whether the file takes pixels (bytes, NHWC, where the format has them) and normalises them itself.
        num_parity_images: test images to compare logits on.
        data: what the run was trained on, if that was a dataset of PyTorch.
        notice: told what a user should know.

    Returns:
        The bundle's path and its manifest.

    Raises:
        InputError: unknown format or precision, one that the device does not take, no search result, an architecture
            outside the space, data of other classes, an unwritable target.
        ExportError: the file does not compute what the child computes, or loses too much accuracy; nothing is written.
        DeviceError: the device cannot be used.
    """
    formats = () if format is None else (format,)
    (made,) = export_all(
        formats,
        run,
        precision=precision,
        max_accuracy_drop=max_accuracy_drop,
        result=result,
        arch=arch,
        device=device,
        output=output,
        batch=batch,
        pixels=pixels,
        num_parity_images=num_parity_images,
        data=data,
        notice=notice,
    )
    return made


def export_all(
    formats: Sequence[str],
    run: str | Path | None = None,
    *,
    precision: str | None = None,
    max_accuracy_drop: float | None = None,
    result: str | None = None,
    arch: str | Path | Architecture | None = None,
    device: str | None = None,
    output: str | Path | None = None,
    batch: int | Literal["any"] = 1,
    pixels: bool = False,
    num_parity_images: int = 64,
    data: TorchDatasets | None = None,
    notice: Notice = unheard,
) -> list[tuple[Path, dict[str, Any]]]:
    """`export` in several formats, one bundle each: the child is calibrated and evaluated once.

    Args:
        formats: different ones; none for what the device takes.
        run: and all others: see `export`. With several formats, `output` is the folder of all bundles.
        precision: of all.
        max_accuracy_drop: of each.
        result: likewise.
        arch: likewise.
        device: it measures those of the files that it takes.
        output: likewise.
        batch: likewise.
        pixels: likewise.
        num_parity_images: likewise.
        data: likewise.
        notice: likewise.

    Raises:
        InputError: see `export`; or a format is there twice.
        ExportError: see `export`; bundles of earlier formats are there.
        DeviceError: see `export`.
    """
    from hwnas.bundles.write import check_target, write_bundle
    from hwnas.exporters.base import Pixels, exporter

    if len({*formats}) != len(formats):
        raise InputError(f"formats {', '.join(formats)}: one is there twice")
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop < 1:
        raise InputError(f"max_accuracy_drop={max_accuracy_drop} is not a share of the images, from 0 to below 1")
    for format in formats:
        exporter(format)
    opened = Run(run)
    found: Result | None = None
    asked = device is not None
    if arch is None:
        name, found = _result(opened, result)
        child_arch, device = found.best.architecture, device or found.device
    else:
        child_arch = opened.space.check(read_architecture(arch, opened.space), any_resolution=True)
        name = arch if arch in ("smallest", "biggest") else child_arch.id
    with ExitStack() as stack:
        target_device = None if device is None else stack.enter_context(open_device(device, opened))
        formats = formats or (("onnx",) if target_device is None else (target_device.accepts,))
        if precision is None:
            taken = target_device is not None and target_device.accepts in formats
            precision = target_device.file_precision if taken and target_device is not None else "fp32"
        # Whether the formats can do that is told before the data is opened, which has the mean and std of pixels.
        num_images, some = None if batch == "any" else batch, Pixels((), ()) if pixels else None
        exporters = [exporter(format, precision, batch=num_images, pixels=some) for format in formats]
        for writer in exporters:
            _check_installed(writer)
        if asked and target_device is not None:
            _check_taken(target_device, exporters)
        kind = {precision: precision != "fp32", f"batch-{batch}": batch != 1, "pixels": pixels}
        suffix = "".join(f"-{word}" for word, told in kind.items() if told)
        targets = [opened.path / "exports" / f"{name}-{format}{suffix}" for format in formats]
        if output is not None:
            several = len(formats) > 1
            targets = [Path(output) / target.name if several else Path(output) for target in targets]
        for target in targets:
            check_target(target)
        job = _Job(opened, child_arch, found, data, precision, max_accuracy_drop, notice)
        images = job.images(job.evaluator.data.test, num_parity_images)
        made = []
        for plain, target in zip(exporters, targets, strict=True):
            writer, accuracy = job.accurate(plain.but(pixels=job.pixels) if pixels else plain)
            bench = target_device
            why = bench and writer.misfit(bench.accepts, bench.file_precision)
            if bench is not None and why is not None:
                notice(f"the {precision} {writer.format} file is not measured: device {bench.name!r} {why}")
                bench = None
            about = job.about(writer, accuracy, bench, must=asked)
            manifest = write_bundle(job.child, job.tensors, writer, images, target, about)
            made.append((target, manifest.to_dict()))
        return made


def verify(bundle: str | Path) -> dict[str, Any]:
    """Check a bundle: its manifest, that every file is the one that was exported, and that it still computes the same.

    Returns:
        `bundle`, `manifest`, `parity` (with the logits it had when it was made) and `sha256` of the manifest, which
        holds those of all files: who has it from you in another way knows that all of the bundle is from you.

    Raises:
        InputError: there is nothing at `bundle`.
        ExportError: it is no bundle, or something in it was changed, or it does not run here.
    """
    from hwnas.bundles.load import load_bundle

    loaded = load_bundle(bundle)
    return {
        "bundle": str(bundle),
        "sha256": loaded.sha256,
        "parity": asdict(loaded.check()),
        "manifest": loaded.manifest.to_dict(),
    }


class _Job:
    """One child to export: what its bundles share is worked out once."""

    def __init__(
        self,
        run: Run,
        arch: Architecture,
        result: Result | None,
        data: TorchDatasets | None,
        precision: str,
        max_accuracy_drop: float | None,
        notice: Notice,
    ) -> None:
        self._run, self._arch, self._result = run, arch, result
        self._precision, self._drop, self._notice = precision, max_accuracy_drop, notice
        self.evaluator = open_evaluator(run, notice, data)
        classes, outputs = len(self.evaluator.data.classes), run.space.num_classes
        if classes != outputs:
            raise InputError(
                f"the network has {outputs} classes, but {self.evaluator.data.name} has {classes}: restore the data "
                "that the run was trained on"
            )
        self._child = self.evaluator.child(arch)
        self.child = deepcopy(self._child).cpu()

    def images(self, split: Split, count: int) -> NDArray[np.float32]:
        """The first images of a split as network input."""
        images: NDArray[np.float32] = self.evaluator.images(split, self._arch.resolution, count).numpy()
        return images

    @cached_property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """What exporters get."""
        tensors = {name: tensor.numpy() for name, tensor in self.child.state_dict().items()}
        if self._precision != "fp32":
            import torch

            from hwnas.bundles.quantise import value_ranges

            images = torch.from_numpy(self.images(self.evaluator.data.calibration, NUM_RANGED))
            tensors |= value_ranges(self.child, images.split(64))
        return tensors

    @cached_property
    def validation(self) -> float:
        """The child's accuracy on the validation images."""
        return self.evaluator.score(self._child, self._arch, self.evaluator.data.validation).accuracy

    @cached_property
    def test(self) -> Accuracy:
        """The child's accuracy on the test images."""
        from hwnas.bundles.manifest import Accuracy

        score = self.evaluator.score(self._child, self._arch, self.evaluator.data.test)
        return Accuracy(split="test", value=score.accuracy, num_images=score.num_images, computed_by="torch")

    @property
    def pixels(self) -> Pixels:
        """How the network's images are normalised."""
        from hwnas.exporters.base import Pixels

        how = self.evaluator.data.preprocessing
        return Pixels(tuple(how.mean), tuple(how.std))

    def accurate(self, writer: Exporter) -> tuple[Exporter, Callable[[Path], Accuracy]]:
        """The exporter, with layers in float32 as needed, and what gives the test accuracy of its file.

        Raises:
            ExportError: in this precision the network loses more accuracy than is allowed.
        """
        if self._precision == "fp32":
            return writer, lambda path: self.test
        if self._drop is not None:
            writer = self._accurate(writer, self._drop)
        return writer, lambda path: self._accuracy(writer, path, self.evaluator.data.test, "test")

    def _accurate(self, writer: Exporter, drop: float) -> Exporter:
        from hwnas.bundles.quantise import within_drop

        probed = self.images(self.evaluator.data.calibration, NUM_PROBED)
        found, accuracy = within_drop(
            self.child,
            self.tensors,
            writer,
            probed,
            lambda exporter, path: self._accuracy(exporter, path, self.evaluator.data.validation, "validation").value,
            self.validation - drop,
        )
        self._notice(
            f"{writer.format}: validation accuracy {accuracy:.2%} in {writer.precision}, {self.validation:.2%} in fp32"
            + (
                f"; {len(found.form.keep)} of {len(self.child.layers)} layers stay in float32"
                if found.form.keep
                else ""
            )
        )
        return found

    def _accuracy(self, writer: Exporter, path: Path, split: Split, name: str) -> Accuracy:
        """Of a file, in its runtime."""
        import torch

        from hwnas.bundles.manifest import Accuracy
        from hwnas.data import batches

        run, correct = writer.runner(path), 0
        for images, labels in batches(split, 64, self._arch.resolution, torch.device("cpu")):
            correct += int((run(images.numpy()).argmax(1) == labels.numpy()).sum())
        return Accuracy(split=name, value=correct / len(split), num_images=len(split), computed_by=writer.runtime)

    def about(
        self, writer: Exporter, accuracy: Callable[[Path], Accuracy], device: Device | None, *, must: bool
    ) -> Callable[[Artifact], About]:
        """What the manifest says of the child and of its file, which is measured on the device: it must, or it may."""
        from hwnas.bundles.manifest import ImagePreprocessing
        from hwnas.bundles.write import About

        data, result = self.evaluator.data, self._result

        def told(artifact: Artifact) -> About:
            latency = None if device is None else self._latency(device, artifact.path, must=must)
            limits = () if result is None else tuple(dict(limit) for limit in result.limits)
            if latency is not None:
                self._compare(latency, limits)
            return About(
                architecture=self._arch.to_dict(),
                architecture_text=self._arch.describe(),
                space=self._run.space.name,
                classes=tuple(data.classes),
                preprocessing=ImagePreprocessing(**asdict(data.preprocessing), resolution=self._arch.resolution),
                accuracy=accuracy(artifact.path),
                latency=latency,
                limits=limits,
                training={"data": data.name, "weights": self.evaluator.supernet.identity()},
                licences={
                    "the programs run.*": "Apache-2.0, from hwnas",
                    f"the data, {data.name}": LICENCES.get(data.name, "not known to hwnas: ask who made it"),
                    "the network": "for you to say: hwnas claims no rights in it",
                },
                front=None if result is None else _front(result),
            )

        return told

    def _latency(self, device: Device, file: Path, *, must: bool) -> Latency | None:
        known = self._predicted(device)
        try:
            return _measure_file(self._run, self._arch, device, file, known)
        except DeviceError as error:
            if must:
                raise
            self._notice(f"the file is not measured: {error}")
            return None if known.predicted_ms is None else known

    def _predicted(self, device: Device) -> Latency:
        """What is known of the latency without reaching the device: by the run's predictor, else by the search."""
        from hwnas.bundles.manifest import Latency

        run, arch = self._run, self._arch
        found = None if self._result is None else self._result.best.latency.get(device.name)
        predicted = None if found is None else (found.predicted, found.std)
        if run.space.has_resolution_of(arch) and run.predictor_path(device.name).is_file():
            mean, std = run.predictor(device.name).predict([arch])
            predicted = float(mean[0]), float(std[0])
        return Latency(
            device=device.name,
            runtime=device.runtime,
            versions={},
            precision=device.precision,
            timing=asdict(device.timing),
            measured_ms=None,
            relative_iqr=None,
            rejection=None,
            predicted_ms=predicted and predicted[0],
            std_ms=predicted and predicted[1],
        )

    def _compare(self, latency: Latency, limits: Sequence[dict[str, Any]]) -> None:
        """Say where the file itself is over a limit of the search."""
        same = {"kind": "latency", "device": latency.device}
        for ms in [limit["value"] for limit in limits if same.items() <= limit.items()]:
            if latency.measured_ms is not None and latency.measured_ms > ms:
                self._notice(f"the file takes {latency.measured_ms:.4g} ms, over the search's limit of {ms:g} ms")


def _check_installed(writer: Exporter) -> None:
    """Say so before the work is done, not after."""
    for package in writer.packages if writer.extra else ():
        try:
            version(package)
        except PackageNotFoundError:
            raise InputError(f"format {writer.format} needs {package}: {writer.install}") from None


def _check_taken(device: Device, exporters: Sequence[Exporter]) -> None:
    """A device that was asked for has to take one of the files."""
    reasons = [writer.misfit(device.accepts, device.file_precision) for writer in exporters]
    if None not in reasons:
        raise InputError(f"device {device.name!r} {reasons[0]}")


def _measure_file(run: Run, arch: Architecture, device: Device, file: Path, predicted: Latency) -> Latency:
    """A child's own file measured on a device, for its manifest, beside what was predicted.

    Raises:
        DeviceError: it cannot be.
    """
    with run.store() as store:
        (measured,) = measure([arch], run.space, device, device.timing, store, role="export", files={arch: file})
    if measured.error is not None:
        raise DeviceError(f"the file could not be measured on {measured.device}: {measured.error}")
    return replace(
        predicted,
        versions=dict(measured.versions),
        measured_ms=measured.latency_ms,
        relative_iqr=measured.relative_iqr,
        rejection=measured.rejection,
    )


def _front(result: Result) -> Front | None:
    """The search's front with the child in it, by latency on the search's device, or by multiply-adds."""
    from hwnas.bundles.card import Front

    device = result.device
    children = [child for child in result.front if child.architecture != result.best.architecture]
    children.append(result.best)
    if device is not None and all(device in child.latency for child in children):
        costs, name = [child.latency[device].value for child in children], f"ms on {device}"
    else:
        costs, name = [child.macs / 1e6 for child in children], "million multiply-adds"
    return Front(
        costs=tuple(costs),
        accuracies=tuple(child.accuracy for child in children),
        this=len(children) - 1,
        cost_name=name,
    )


def last_results(run: str | Path | None = None) -> list[str]:
    """The names of what the last search found: a result for each device, or its only one.

    Raises:
        InputError: no search is finished.
    """
    last = _finished(Run(run))[-1]
    return list(read_json(last)["answers"]) if last.name.startswith(PORTFOLIO) else [last.stem]


def _finished(run: Run) -> list[Path]:
    """What searches have left, the last one last."""
    paths = run.results()
    if not paths:
        raise InputError(f"no finished search in {run.path}: run `hwnas search --device cpu --latency-ms ...` first")
    return paths


def _result(run: Run, name: str | None) -> tuple[str, Result]:
    from hwnas.searching.result import Result

    paths = [path for path in _finished(run) if not path.name.startswith(PORTFOLIO)]
    path = paths[-1] if name is None else run.result_path(name)
    if path not in paths:
        raise InputError(f"no result {name!r} in {run.path}: not one of {', '.join(p.stem for p in paths)}")
    return path.stem, Result.from_dict(read_json(path))
