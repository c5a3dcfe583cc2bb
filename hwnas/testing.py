"""For tests: a fake device, and what every device and every exporter must do (contracts).

A contract is a class of tests. Fill it in with a fixture of your implementation:

    class TestMyDevice(DeviceContract):
        @pytest.fixture
        def device(self):
            with MyDevice() as device:
                yield device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from hwnas.devices.base import Device, RunTimes, Timing
from hwnas.errors import DeviceError, ExportError, InputError
from hwnas.exporters.base import Exporter, Pixels, exporter, random_tensors, write_random
from hwnas.files import parts
from hwnas.layers import IMAGE, Kind, Layer, lower, total_macs
from hwnas.space import Activation, SearchSpace

if TYPE_CHECKING:
    from torch import Tensor

    from hwnas.network import Network

QUICK = Timing(warmup_s=0, min_duration_s=0, rounds=2, max_rounds=4, timeout_s=20)


def tiny_space() -> SearchSpace:
    """The tiny space for grey images of ten classes."""
    return SearchSpace.load("tiny", in_channels=1, num_classes=10)


# -------------------------------------------------------------------- a fake device


def fake_latency_ms(layers: Sequence[Layer]) -> float:
    """A plausible latency: 2 us a layer, 10 G multiply-adds a second."""
    return 0.002 * len(layers) + total_macs(layers) / 1e7


class FakeDevice(Device):
    """A device without hardware, whose times are a function of the network.

    It reads real ONNX files, so that it can stand in for a device everywhere.

    Args:
        latency_ms: of a network's layers (see `read_layers`); it raises the `DeviceError` of networks that fail.
        slowdown: a factor for each round, by its number from 0: drift, other work, throttling.
        spread: standard deviation of single runs, relative.
        preempt: share of the runs that are preempted, and take ten times as long.
        fault: the `DeviceError` that a round ends with, by its number; None where it runs.
        facts: what the device tells of its state in each round, by its number.
        seed: of the noise.

    Attributes:
        ran: the files of all rounds so far.
    """

    runtime, accepts = "fake", "onnx"

    def __init__(
        self,
        latency_ms: Callable[[Sequence[Layer]], float] = fake_latency_ms,
        *,
        slowdown: Callable[[int], float] = lambda number: 1.0,
        spread: float = 0.01,
        preempt: float = 0.0,
        fault: Callable[[int], DeviceError | None] = lambda number: None,
        facts: Callable[[int], Mapping[str, Any]] = lambda number: {},
        name: str = "fake",
        seed: int = 0,
    ) -> None:
        self.name, self.timing = name, QUICK
        self.ran: list[Path] = []
        self._latency_ms, self._slowdown, self._spread, self._preempt = latency_ms, slowdown, spread, preempt
        self._fault, self._facts = fault, facts
        self._rng = np.random.default_rng(seed)
        self._layers: dict[Path, tuple[Layer, ...]] = {}

    def versions(self) -> dict[str, str]:
        """See `Device`."""
        return {"fake": "1"}

    def run(self, path: Path, timing: Timing) -> RunTimes:
        """See `Device`."""
        if path not in self._layers:
            self._layers[path] = read_layers(path)
        number = len(self.ran)
        self.ran.append(path)
        fault = self._fault(number)
        if fault is not None:
            raise fault
        latency_ms = self._latency_ms(self._layers[path]) * self._slowdown(number)
        count = max(timing.repeats, min(20, int(timing.min_duration_s * 1e3 / latency_ms)))
        times = latency_ms * np.exp(self._rng.normal(0, self._spread, size=count))
        preempted = self._rng.random(count) < self._preempt
        times = np.where(preempted, 10, 1) * times
        return RunTimes(tuple(times.tolist()), tuple(preempted.tolist()), self._facts(number))


_ACTIVATIONS: dict[str, Activation] = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "h-sigmoid",
    "HardSwish": "h-swish",
}
_KINDS: dict[str, Kind] = {
    "AveragePool": "avg_pool",
    "GlobalAveragePool": "global_pool",
    "Add": "add",
    "Mul": "scale",
}


def read_layers(path: Path) -> tuple[Layer, ...]:
    """The layers of an ONNX file that `OnnxExporter` wrote; what it folded away (`norm`, `residual`) is gone.

    Raises:
        DeviceError: the file is not ONNX.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:
        raise DeviceError(f"{path.name} is not ONNX: {error}") from None
    weights = {weight.name: weight for weight in graph.initializer}
    first = graph.input[0].type.tensor_type.shape.dim
    shapes = {IMAGE: (first[1].dim_value, first[2].dim_value)}  # channels and side by value
    layers: dict[str, Layer] = {}
    writer = {IMAGE: IMAGE}  # the layer that makes a value
    for node in graph.node:
        output, source = node.output[0], node.input[0]
        options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        activation = _ACTIVATIONS.get(node.op_type)
        if node.op_type == "Mul" and node.input[1] == f"{output}.gate":
            activation = "swish"
        if node.op_type == "Flatten" or activation:
            if activation and output != f"{writer[source]}.gate":
                name = writer[source]
                layers[name] = replace(layers[name], activation=activation)
            writer[output], shapes[output] = writer[source], shapes[source]
            continue
        weighted = node.op_type in ("Conv", "Gemm")
        name = node.input[1].removesuffix(".weight") if weighted else output
        channels, size = shapes[source]
        if weighted:
            layers[name] = Layer(
                name=name,
                kind="conv" if node.op_type == "Conv" else "linear",
                inputs=(writer[source],),
                in_channels=channels,
                out_channels=weights[node.input[1]].dims[0],
                in_size=size,
                kernel=options.get("kernel_shape", [1])[0],
                stride=options.get("strides", [1])[0],
                groups=options.get("group", 1),
                bias=len(node.input) > 2,
            )
        else:
            layers[name] = Layer(
                name=name,
                kind=_KINDS[node.op_type],
                inputs=tuple(writer[value] for value in node.input),
                in_channels=channels,
                out_channels=channels,
                in_size=size,
                kernel=options.get("kernel_shape", [1])[0],
                stride=options.get("strides", [1])[0],
            )
        writer[output] = name
        shapes[output] = (layers[name].out_channels, layers[name].out_size)
    return tuple(layers.values())


# -------------------------------------------------------------------- networks to compare with


def random_images(layers: Sequence[Layer], count: int, seed: int) -> NDArray[np.float32]:
    """Normal noise for a network's input, (count, in_channels, resolution, resolution).

    Half its variance is that of pixels, half that of a grid of 4 x 4 fields, which is not lost in pooling.
    """
    rng, size = np.random.default_rng(seed), layers[0].in_size
    shape = (count, layers[0].in_channels)
    fields = rng.standard_normal((*shape, 4, 4), dtype=np.float32)
    field = np.arange(size) * 4 // size
    images = rng.standard_normal((*shape, size, size), dtype=np.float32)
    images += fields[:, :, field[:, None], field]
    return images / np.float32(np.sqrt(2))


def trained_network(layers: Sequence[Layer]) -> Network:
    """A network in evaluation mode, without gradients, whose batch norms have seen random images.

    With arbitrary statistics its own rounding errors would grow from layer to layer. Needs torch.
    """
    import torch

    from hwnas.network import Network, batch_norms, initialise

    network = Network(layers).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    initialise(layers, network.state_dict(), generator)
    for norm in batch_norms(network):
        norm.momentum = None  # the plain average
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.uniform_(-0.5, 0.5, generator=generator)
    network(torch.from_numpy(random_images(layers, 8, seed=0)))
    return network.eval()


def tensors_with_ranges(
    layers: Sequence[Layer], network: Network, images: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """What `Exporter.write` gets in every precision: a network's tensors and, for int8, the ranges of its values.

    Args:
        layers: of the network.
        network: in evaluation mode.
        images: (num_images, in_channels, resolution, resolution), on which the ranges are those of its values.

    Returns:
        The tensors by their names, and `image.range`, `{layer}.range` and `{layer}.preactivation.range`, (2,) each.
    """
    import torch

    from hwnas.network import function, run

    state = network.state_dict()
    tensors = {name: tensor.numpy() for name, tensor in state.items()}

    def note(name: str, values: Tensor) -> Tensor:
        tensors[f"{name}.range"] = np.array([values.min(), values.max()], dtype=np.float32)
        return values

    def call(layer: Layer, *inputs: Tensor) -> Tensor:
        if layer.activation:
            note(f"{layer.name}.preactivation", function(replace(layer, activation=None), state, False, *inputs))
        return note(layer.name, function(layer, state, False, *inputs))

    run(layers, call, note(IMAGE, torch.from_numpy(images)))
    return tensors


def largest_difference(exporter: Exporter, layers: Sequence[Layer], path: Path) -> float:
    """Between the logits of a network's file and its own, relative to the largest logit.

    Args:
        exporter: writes the file and runs it.
        layers: of the network; see `trained_network`.
        path: the file to write.
    """
    import torch

    network, images = trained_network(layers), random_images(layers, 2, seed=1)
    exporter.write(layers, tensors_with_ranges(layers, network, images), path)
    expected = network(torch.from_numpy(images)).numpy()
    assert np.ptp(expected) > 0
    return float(np.abs(exporter.infer(path, images) - expected).max() / np.abs(expected).max())


# -------------------------------------------------------------------- contracts


class DeviceContract:
    """What `hwnas.measuring.measure` relies on. Give it a fixture `device`."""

    @pytest.fixture
    def network(self, device: Device, tmp_path: Path) -> Path:
        """A small network's file."""
        return self.write(device, tmp_path)

    @staticmethod
    def write(device: Device, folder: Path, *, largest: bool = False) -> Path:
        """The file of tiny's smallest or largest child."""
        space = tiny_space()
        name, arch = ("largest", space.largest()) if largest else ("smallest", space.smallest())
        writer = exporter(device.accepts, device.file_precision)
        return write_random(writer, space, arch, folder / name, np.random.default_rng(0))

    def test_describes_itself(self, device: Device) -> None:
        """Name, runtime, precision, and versions that stay the same."""
        assert device.name
        assert device.runtime
        assert device.precision
        versions = device.versions()
        assert versions
        assert versions == device.versions()
        assert all(isinstance(value, str) for value in versions.values())

    def test_runs_as_often_as_asked(self, device: Device, network: Path) -> None:
        """At least `repeats` positive times, or one that stands for so many."""
        times = device.run(network, replace(QUICK, repeats=7))
        assert times.facts.get("runs", len(times.times_ms)) >= 7
        assert min(times.times_ms) > 0

    def test_bigger_networks_take_longer(self, device: Device, network: Path, tmp_path: Path) -> None:
        """In turns on two files, each keeps its own latency."""
        bigger = self.write(device, tmp_path, largest=True)
        timing = replace(device.timing, repeats=10)
        small, big, again = (device.run(path, timing).latency_ms for path in (network, bigger, network))
        assert big > 2 * max(small, again)

    def test_a_bad_file_fails_alone(self, device: Device, network: Path, tmp_path: Path) -> None:
        """A `DeviceError`, and the next network runs."""
        garbage = tmp_path / f"garbage{network.suffix}"
        garbage.write_bytes(b"no network")
        with pytest.raises(DeviceError):
            device.run(garbage, QUICK)
        with pytest.raises(DeviceError):
            device.run(tmp_path / f"missing{network.suffix}", QUICK)
        assert device.run(network, QUICK).latency_ms > 0

    def test_opens_again_after_close(self, device: Device, network: Path) -> None:
        """Closing twice is fine, too."""
        device.close()
        device.close()
        assert device.run(network, QUICK).latency_ms > 0


class ExporterContract:
    """What profiling and the parity check rely on.

    Give it a fixture `exporter`. Where a format has several precisions, these are the fixture's parameters.
    """

    @staticmethod
    def space() -> SearchSpace:
        """Of the networks to write."""
        return tiny_space()

    def test_file_says_what_it_is(self, exporter: Exporter, tmp_path: Path) -> None:
        """The artifact describes the file, nothing but its parts is left beside it, and it can be replaced."""
        layers = lower(self.space(), self.space().smallest())
        tensors = random_tensors(layers, np.random.default_rng(0))
        path = tmp_path / f"model{exporter.suffix}"
        artifact = exporter.write(layers, tensors, path)
        assert (artifact.path, artifact.format, artifact.precision) == (path, exporter.format, exporter.precision)
        assert len(artifact.sha256) == 64
        assert artifact == exporter.write(layers, tensors, path)
        assert sorted(tmp_path.iterdir()) == parts(path)
        assert path in parts(path)

    def test_logits_per_image(self, exporter: Exporter, tmp_path: Path) -> None:
        """Of every image by itself."""
        space = self.space()
        arch = space.sample(np.random.default_rng(0))
        layers = lower(space, arch)
        path = tmp_path / f"model{exporter.suffix}"
        exporter.write(layers, random_tensors(layers, np.random.default_rng(0)), path)
        rng = np.random.default_rng(1)
        images = rng.standard_normal((3, space.in_channels, arch.resolution, arch.resolution), dtype=np.float32)
        logits = exporter.infer(path, images)
        assert logits.shape == (3, space.num_classes)
        np.testing.assert_allclose(exporter.infer(path, images[1:2])[0], logits[1], rtol=1e-4, atol=1e-5)
        assert not np.allclose(logits[0], logits[1])

    def test_batches(self, exporter: Exporter, tmp_path: Path) -> None:
        """A file of several images, or any number, gives each the logits that it gets by itself."""
        layers = lower(self.space(), self.space().smallest())
        network, images = trained_network(layers), random_images(layers, 7, seed=1)
        tensors = tensors_with_ranges(layers, network, images)
        path = tmp_path / f"model{exporter.suffix}"
        exporter.write(layers, tensors, path)
        expected = exporter.infer(path, images)
        for batch, able in ((3, exporter.batches != "one"), (None, exporter.batches == "any")):
            if not able:
                with pytest.raises(InputError, match=f"{exporter.format} take .* at a time, not {batch or 'any'}"):
                    exporter.but(batch=batch)
                continue
            other = exporter.but(batch=batch)
            other.write(layers, tensors, path)
            for count in (1, 7):
                found = other.infer(path, images[:count])
                np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    def test_pixels(self, exporter: Exporter, tmp_path: Path) -> None:
        """A file that takes pixels normalises them as the preprocessing does; its padding stays zero after that."""
        layers = lower(self.space(), self.space().smallest())
        pixels = Pixels((0.1, 0.5, 0.9)[: layers[0].in_channels], (0.2, 0.4, 0.3)[: layers[0].in_channels])
        if exporter.pixel_input is None:
            with pytest.raises(InputError, match=f"{exporter.format} cannot take pixels"):
                exporter.but(pixels=pixels)
            return
        shape = (8, layers[0].in_channels, layers[0].in_size, layers[0].in_size)
        some = np.random.default_rng(1).integers(0, 256, shape).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32).reshape(-1, 1, 1) for values in (pixels.mean, pixels.std))
        images = ((some / 255 - mean) / std).astype(np.float32)
        network = trained_network(layers)
        tensors, path = tensors_with_ranges(layers, network, images), tmp_path / f"model{exporter.suffix}"
        exporter.write(layers, tensors, path)
        expected = exporter.infer(path, images)
        other = exporter.but(pixels=pixels)
        assert other.takes == exporter.pixel_input
        other.write(layers, tensors, path)
        found = other.infer(path, images)
        if exporter.precision == "fp32":
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        else:
            assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99

    def test_refuses_incomplete_networks(self, exporter: Exporter, tmp_path: Path) -> None:
        """Missing or misshapen tensors are named, and no file is written."""
        layers = lower(self.space(), self.space().smallest())
        tensors = random_tensors(layers, np.random.default_rng(0))
        path = tmp_path / f"model{exporter.suffix}"
        for name in ("stem.conv.weight", "stem.norm.running_var", "classifier.bias"):
            with pytest.raises(ExportError, match=name):
                exporter.write(layers, {k: v for k, v in tensors.items() if k != name}, path)
            with pytest.raises(ExportError, match=f"{name}.*shape"):
                exporter.write(layers, tensors | {name: tensors[name][:-1]}, path)
        assert not list(tmp_path.iterdir())

    def test_a_bad_file_is_an_export_error(self, exporter: Exporter, tmp_path: Path) -> None:
        """Also when running one."""
        path = tmp_path / f"garbage{exporter.suffix}"
        path.write_bytes(b"no network")
        with pytest.raises(ExportError):
            exporter.infer(path, np.zeros((1, 1, 28, 28), dtype=np.float32))

    @pytest.mark.parametrize("exporter", ["fp32"], indirect=True)
    @pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3", "tiny"])
    @pytest.mark.parametrize("resolution", [33, 62])
    def test_computes_what_the_network_does(
        self, exporter: Exporter, name: str, resolution: int, tmp_path: Path
    ) -> None:
        """In fp32, in every space, also where feature maps have odd sides."""
        space = SearchSpace.load(name, num_classes=10)
        for arch in (space.smallest(), space.sample(np.random.default_rng(resolution))):
            layers = lower(space, replace(arch, resolution=resolution))
            assert largest_difference(exporter, layers, tmp_path / f"model{exporter.suffix}") < 2e-5

    @pytest.mark.parametrize("exporter", ["fp32"], indirect=True)
    @pytest.mark.parametrize("activation", get_args(Activation))
    def test_activations(self, exporter: Exporter, activation: Activation, tmp_path: Path) -> None:
        """Each of those that a space can have, in fp32."""
        space = replace(self.space(), activation=activation)
        layers = lower(space, space.smallest())
        assert largest_difference(exporter, layers, tmp_path / f"model{exporter.suffix}") < 1e-5
