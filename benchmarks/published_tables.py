"""Published latencies of single networks and blocks, as features and milliseconds to fit device models to.

`samples()` reads `pixel_networks.csv`, `mbconv_blocks.csv` and `ncnn_*.csv` in `../shared/data/latency`, whose README
tells what the columns are and where they come from. The networks are written down here as lists of `Layer`s, from
their papers and reference code; ncnn's as the table of their layers has them.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwnas.layers import IMAGE, Feature, Kind, Layer, total_macs
from hwnas.predictors.features import FEATURE_NAMES, layer_features
from hwnas.space import round_channels

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "latency"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One published latency.

    Attributes:
        name: of the network or block.
        family: what it must not help to predict: other sizes of the same network.
        features: (num_features,).
        latency_ms: as published.
        whole: a network, not one block of it.
    """

    name: str
    family: str
    features: NDArray[np.float64]
    latency_ms: float
    whole: bool = True


# -------------------------------------------------------------------- networks as layers


class Network:
    """Layers one after the other, with TensorFlow's SAME padding."""

    def __init__(self, size: int, channels: int = 3) -> None:
        self.layers: list[Layer] = []
        self.last = Feature(IMAGE, channels, size)

    def add(self, kind: Kind, out_channels: int, source: Feature | None = None, **options: Any) -> Feature:
        source = source or self.last
        layer = Layer(
            name=f"layer{len(self.layers)}", kind=kind, inputs=(source.name,), in_channels=source.channels,
            out_channels=out_channels, in_size=source.size, **options,
        )  # fmt: skip
        self.layers.append(layer)
        self.last = layer.output
        return self.last

    def conv(self, width: int, kernel: int = 1, stride: int = 1, activation: Any = "relu", groups: int = 1) -> Feature:
        return self.add("conv", width, kernel=kernel, stride=stride, groups=groups, norm=True, activation=activation)

    def depthwise(self, kernel: int, stride: int, activation: Any = "relu") -> Feature:
        return self.conv(self.last.channels, kernel, stride, activation, groups=self.last.channels)

    def mbconv(
        self, middle: int, width: int, kernel: int, stride: int, *, se: int = 0, activation: str = "relu",
        gate: str = "sigmoid",
    ) -> Feature:  # fmt: skip
        """An inverted-residual block; `se` is the squeezed width, 0 for none."""
        source = self.last
        if middle != source.channels:
            self.conv(middle, activation=activation)
        wide = self.depthwise(kernel, stride, activation)
        if se:
            self.add("global_pool", middle)
            self.add("conv", se, bias=True, activation="relu")
            self.add("conv", middle, bias=True, activation=gate)
            self.last = self.add("scale", middle, wide)
        self.conv(width, activation=None)
        if stride == 1 and source.channels == width:
            self.add("add", width)
        return self.last

    def head(self, width: int, classes: int = 1001) -> list[Layer]:
        if width:
            self.conv(width)
        self.add("global_pool", self.last.channels)
        self.add("linear", classes, bias=True)
        return self.layers


def mobilenet_v1(width: float, size: int) -> list[Layer]:
    """Howard et al. 2017, table 1."""
    net = Network(size)
    net.conv(max(8, int(32 * width)), 3, 2)
    for channels, stride in zip((64, 128, 128, 256, 256, *[512] * 6, 1024, 1024), (1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1),
                                strict=True):  # fmt: skip
        net.depthwise(3, stride)
        net.conv(max(8, int(channels * width)))
    return net.head(0)


def _inverted(
    size: int, width: float, stages: str, *, head: int, stem: int = 32, depth: Callable[[int, int], int] | None = None
) -> list[Layer]:
    """Networks of inverted-residual blocks; a stage is `t6c24n2s2k3`, perhaps with `e` for squeeze-excite."""
    net = Network(size)
    net.conv(stem, 3, 2)
    for index, text in enumerate(stages.split()):
        numbers = {word[0]: int(word[1:]) for word in _words(text.removesuffix("e"))}
        count = depth(index, numbers["n"]) if depth else numbers["n"]
        for block in range(count):
            source = net.last.channels
            net.mbconv(
                source * numbers["t"], round_channels(numbers["c"] * width), numbers["k"],
                numbers["s"] if block == 0 else 1, se=max(1, source // 4) if text.endswith("e") else 0,
            )  # fmt: skip
    return net.head(head)


def _words(text: str) -> Iterator[str]:
    """`t6c24` -> `t6`, `c24`."""
    starts = [index for index, letter in enumerate(text) if letter.isalpha()]
    yield from (text[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True))


def mobilenet_v2(width: float, size: int) -> list[Layer]:
    """Sandler et al. 2018, table 2; the head is widened but never narrowed."""
    return _inverted(
        size, width, "t1c16n1s1k3 t6c24n2s2k3 t6c32n3s2k3 t6c64n4s2k3 t6c96n3s1k3 t6c160n3s2k3 t6c320n1s1k3",
        head=round_channels(1280 * max(1.0, width)), stem=round_channels(32 * width),
    )  # fmt: skip


def mnasnet_a1(width: float, size: int) -> list[Layer]:
    """Tan et al. 2019, figure 7."""
    return _inverted(
        size, width, "t1c16n1s1k3 t6c24n2s2k3 t3c40n3s2k5e t6c80n4s2k3 t6c112n2s1k3e t6c160n3s2k5e t6c320n1s1k3",
        head=1280, stem=round_channels(32 * width),
    )  # fmt: skip


def mnasnet_b1(width: float, size: int) -> list[Layer]:
    """tensorflow/tpu, models/official/mnasnet/mnasnet_models.py: b1, which TensorFlow's hosted models are."""
    return _inverted(
        size, width, "t1c16n1s1k3 t3c24n3s2k3 t3c40n3s2k5 t6c80n3s2k5 t6c96n2s1k3 t6c192n4s2k5 t6c320n1s1k3",
        head=1280, stem=round_channels(32 * width),
    )  # fmt: skip


def efficientnet_lite(number: int, size: int) -> list[Layer]:
    """tensorflow/tpu, models/official/efficientnet/lite: EfficientNet without squeeze-excite, stem and head fixed."""
    width, depth = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))[number]
    return _inverted(
        size, width, "t1c16n1s1k3 t6c24n2s2k3 t6c40n2s2k5 t6c80n3s2k3 t6c112n3s1k5 t6c192n4s2k5 t6c320n1s1k3",
        head=1280, depth=lambda index, count: count if index in (0, 6) else int(np.ceil(depth * count)),
    )  # fmt: skip


_NETWORKS: dict[str, Callable[[float, int], list[Layer]]] = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mnasnet_a1": mnasnet_a1,
    "mnasnet_hosted": mnasnet_b1,
    **{
        f"efficientnet_lite{n}": (lambda width, size, number=n: efficientnet_lite(number, size))  # type: ignore[misc]
        for n in range(5)
    },
}


def features_of(layers: list[Layer]) -> NDArray[np.float64]:
    """The sum over the layers, (num_features,)."""
    return np.sum([layer_features(layer) for layer in layers], axis=0)


def _read(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixel(device: str, backend: str, threads: str, precision: str) -> list[Sample]:
    """The networks of `pixel_networks.csv` measured so."""
    found = []
    for row in _read("pixel_networks.csv"):
        if (row["device"], row["backend"], row["precision"]) != (device, backend, precision):
            continue
        if row["threads"].partition(" ")[0] != threads:
            continue
        width, size = float(row["width"]), int(row["res"])
        layers = _NETWORKS[row["net"]](width, size)
        name = f"{row['net']} {width:g} {size}"
        found.append(Sample(name, row["net"].partition("_lite")[0], features_of(layers), float(row["lat_ms"])))
    return found


def macs_differences() -> dict[str, float]:
    """How far our MACs are from the tables', by network: relative, where the table has them."""
    found = {}
    for row in _read("pixel_networks.csv"):
        if row["mmacs"]:
            layers = _NETWORKS[row["net"]](float(row["width"]), int(row["res"]))
            found[f"{row['net']} {row['width']} {row['res']}"] = total_macs(layers) / 1e6 / float(row["mmacs"]) - 1
    return found


# -------------------------------------------------------------------- blocks


def blocks(table: str) -> list[Sample]:
    """The blocks of `mbconv_blocks.csv`; a family is a resolution of Note 10, a place in the network of Pixel 1."""
    found = []
    for row in _read("mbconv_blocks.csv"):
        if row["table"] != table:
            continue
        h, cin, cout = int(row["h"]), int(row["cin"]), int(row["cout"])
        net = Network(h, cin)
        late = table == "ofa_note10"
        match row["op"]:
            case "Conv":
                net.conv(cout, 3, 2, "h_swish" if late else "relu")
            case "Conv_1" | "Conv_2":
                net.conv(cout, activation="h_swish" if late else "relu")
            case "AvgPool2D":
                net.add("global_pool", cout)
            case "Logits":
                if not late:
                    net.add("global_pool", cin)
                net.add("linear", cout, bias=True)
            case "expanded_conv":
                middle = int(float(row["mid"]))
                net.mbconv(
                    middle, cout, int(float(row["kernel"])), int(float(row["stride"])),
                    se=round_channels(middle / 4) if row["se"] == "1.0" else 0,
                    activation="h_swish" if row["hs"] == "1.0" else "relu", gate="h_sigmoid",
                )  # fmt: skip
        place = f"{cin}>{cout}"
        found.append(
            Sample(f"{row['res']} {row['key']}", place, features_of(net.layers), float(row["mean_ms"]), whole=False)
        )
    return found


# -------------------------------------------------------------------- ncnn

_FREE = ("Flatten", "Noop", "Reshape", "PriorBox", "DetectionOutput", "YoloDetectionOutput", "Yolov3DetectionOutput")
_ACTIVATIONS = {1: "relu", 2: "relu", 3: "relu", 4: "sigmoid", 5: "swish", 6: "h_swish"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized(Layer):
    """A layer whose padding is not hwnas's."""

    out: int = 0

    @property
    def out_size(self) -> int:
        return self.out


def _ncnn_features(row: dict[str, str]) -> NDArray[np.float64]:
    """One row of `ncnn_layers.csv`, in the terms of `layer_features`."""
    kind, cin, cout, size, out = row["type"], *(int(row[key]) for key in ("cin", "cout", "h", "ho"))
    layer: dict[str, Any] = {
        "name": row["name"], "inputs": ("",), "in_channels": cin, "out_channels": cout, "in_size": size, "out": out,
    }  # fmt: skip
    kernel, stride, groups, code = (int(float(row[key] or 1)) for key in ("k", "stride", "groups", "act"))
    activation: Any = _ACTIVATIONS.get(code) if row["act"] else None
    if kind in _FREE:
        return np.zeros(len(FEATURE_NAMES))
    if kind in ("Convolution", "ConvolutionDepthWise", "DeconvolutionDepthWise"):
        # A 1x1 map through kernels of 3 and more is still a convolution.
        return np.asarray(
            layer_features(
                Sized(**layer, kind="conv", kernel=kernel, stride=stride, groups=groups, activation=activation)
            )
        )
    if kind == "InnerProduct":
        layer |= {"in_channels": cin * size * int(row["w"]), "in_size": 1}
        features = np.asarray(layer_features(Sized(**layer, kind="linear")))
        features[FEATURE_NAMES.index("networks")] = 0
        return features
    if kind == "Pooling":
        return np.asarray(layer_features(Sized(**layer, kind="avg_pool")))
    # What is left goes over its elements once.
    features = np.zeros(len(FEATURE_NAMES))
    elements = cout * out * int(row["wo"])
    names = {"ReLU": "relu", "Swish": "swish", "HardSwish": "h_swish", "Sigmoid": "sigmoid", "HardSigmoid": "h_sigmoid"}
    if kind in names:  # in `layer_features` an activation is part of the layer before it, never an operation
        features[FEATURE_NAMES.index(f"{names[kind]}_elements")] = elements
    else:
        features[FEATURE_NAMES.index("elementwise_moved")] = elements * (3 if kind in ("Eltwise", "BinaryOp") else 2)
        features[FEATURE_NAMES.index("elementwise_ops")] = 1
    return features


@cache
def _ncnn_networks() -> dict[str, NDArray[np.float64]]:
    sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(FEATURE_NAMES)))
    for row in _read("ncnn_layers.csv"):
        sums[row["model"]] = sums[row["model"]] + _ncnn_features(row)
    for features in sums.values():
        features[FEATURE_NAMES.index("networks")] = 1
    return dict(sums)


# The kind of networks that hwnas's spaces hold: depthwise or grouped convolutions, no channel shuffles, and no
# detectors, whose ends run on the processor.
MOBILE = (
    "mobilenet", "mobilenet_v2", "mobilenet_v3", "mnasnet", "proxylessnasnet", "efficientnet_b0", "regnety_400m",
)  # fmt: skip
SHUFFLING = ("shufflenet", "shufflenet_v2")
# Submissions by a short name: how the device's name begins, and the threads. On a GPU threads do not matter.
CPU_SUBMISSIONS = {
    "Raspberry Pi 4, 1 thread": ("Raspberry Pi 4", ("1",)),
    "Raspberry Pi 4, 4 threads": ("Raspberry Pi 4", ("4",)),
    "Raspberry Pi 3B+, 1 thread": ("Raspberry Pi 3", ("1",)),
    "Raspberry Pi 3B+, 4 threads": ("Raspberry Pi 3", ("4",)),
    "Raspberry Pi Zero 2 W": ("Raspberry Pi Zero 2", ("1",)),
    "Raspberry Pi 5, overclocked": ("Raspberry Pi 5 Broadcom BCM2712 Overclock", ("4",)),
    "Snapdragon 410": ("Qualcomm MSM8916", ("1",)),
    "Snapdragon 660": ("Qualcomm SDM660", ("1",)),
    "Snapdragon 810": ("Qualcomm MSM8994", ("1",)),
    "Snapdragon 821": ("Qualcomm MSM8996", ("1",)),
    "Snapdragon 855+": ("Qualcomm SM8150", ("1",)),
    "Jetson Nano's processor": ("NVIDIA Jetson Nano", ("1",)),
    "Jetson AGX Xavier's processor": ("NVIDIA Jetson AGX Xavier", ("1",)),
    "Jetson Orin Nano's processor": ("NVIDIA Jetson Orin Nano", ("1",)),
    "Jetson AGX Orin's processor": ("NVIDIA Jetson AGX Orin", ("1",)),
}
GPU_SUBMISSIONS = {
    "Jetson Nano": ("NVIDIA Jetson Nano", ("1", "4")),
    "Jetson AGX Xavier": ("NVIDIA Jetson AGX Xavier", ("1",)),
    "Jetson Orin Nano": ("NVIDIA Jetson Orin Nano", ("1", "6")),
    "Jetson AGX Orin": ("NVIDIA Jetson AGX Orin", ("1",)),
    "Adreno 512": ("Qualcomm SDM660", ("1",)),
    "Adreno 620": ("Qualcomm SDM765G", ("4",)),
    "Adreno 640": ("Qualcomm SM8150", ("1",)),
    "Adreno 660": ("Qualcomm Snapdragon 888", ("8",)),
    "Adreno X1-85": ("Qualcomm Snapdragon X Elite", ("1",)),
}


def ncnn(device: str, threads: Sequence[str], *, gpu: bool, names: Sequence[str] = MOBILE) -> list[Sample]:
    """The named networks in `ncnn_networks.csv` measured so: the fastest run of each in each submission."""
    networks, found = _ncnn_networks(), []
    for row in _read("ncnn_networks.csv"):
        name = row["model"]
        same = row["device"].startswith(device) and row["num_threads"] in threads
        if name in names and same and (float(row["gpu_device"]) >= 0) == gpu:
            found.append(Sample(name, name, networks[name], float(row["min_ms"])))
    return found
