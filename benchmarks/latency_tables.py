"""Published latency tables of other people's devices, as genes and milliseconds that hwnas's predictors take.

`fbnet()` and `ofa()` read `../shared/data/latency`, whose README tells what the columns are and where they come from.
Once-for-All's networks are children of `ofa-mbv3`. FBNet's are of no space that hwnas can train (grouped 1x1
convolutions, skipped blocks), so `FbnetSpace` brings what predictors ask of a space: genes and segments of layers.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwnas.layers import IMAGE, Feature, Kind, Layer, Segment, segments
from hwnas.space import Architecture, Block, Gene, Genes, SearchSpace, Stage

# Sums of a table of blocks (shared/data/latency/README.md): no end-to-end measurements.
SUMS = ("eyeriss", "pixel3", "raspi4")
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "latency"


@dataclass(frozen=True)
class Table:
    """Networks of one space, and their latency on several devices.

    Attributes:
        space: of the networks; a `SearchSpace`, or what predictors need of one.
        genes: (num_networks, num_genes).
        latency_ms: (num_networks,) by device.
    """

    name: str
    space: Any
    genes: Genes
    latency_ms: dict[str, NDArray[np.float64]]


def family(device: str) -> str:
    """What must not help to predict a device: the same chip at another batch, and its close relatives."""
    if device.startswith(("gold", "silver")):
        return "xeon"
    if device.startswith(("titanx", "titan_xp", "1080ti")):  # titanx, titanxp, 1080ti: Maxwell and Pascal
        return "pascal"
    if device.startswith(("2080ti", "titan_rtx")):
        return "turing"
    return device


# -------------------------------------------------------------------- FBNet

# HW-NAS-Bench (Li et al., ICLR 2021), hw_nas_bench_api/fbnet_models/model_infer.py: channels, blocks and strides of
# the stages (the latter for CIFAR and for ImageNet), head channels; expand ratio, kernel and groups of the choices.
_STAGES = ((16, 1), (24, 4), (32, 4), (64, 4), (112, 4), (184, 4), (352, 1))
_STRIDES = {32: (1, 1, 2, 2, 1, 2, 1), 224: (1, 2, 2, 2, 1, 2, 1)}
_HEAD = {32: 1504, 224: 1984}
_CLASSES = {32: 100, 224: 1000}
_BLOCKS = ((1, 3, 1), (1, 3, 2), (3, 3, 1), (6, 3, 1), (1, 5, 1), (1, 5, 2), (3, 5, 1), (6, 5, 1))
SKIP = len(_BLOCKS)


@dataclass(frozen=True)
class FbnetSpace:
    """FBNet's 22 places, each with one of eight blocks or none, as HW-NAS-Bench measured it.

    Attributes:
        resolution: 32 (CIFAR-100) or 224 (ImageNet).
    """

    resolution: int = 32
    name: str = "fbnet"

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """Which block is at each place."""
        places = sum(count for _, count in _STAGES)
        return tuple(Gene(f"op{place}", tuple(range(SKIP + 1))) for place in range(places))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "resolution": self.resolution}

    def encode(self, archs: Any) -> Genes:
        """Rows of choices are their own genes."""
        return np.asarray(archs, dtype=np.int8).reshape(-1, len(self.genes))

    def lower(self, genes: NDArray[np.int8]) -> list[Layer]:
        """The layers of one network, genes (22,)."""
        column = {gene.name: value for gene, value in zip(self.genes, genes.tolist(), strict=True)}
        return [layer for part in self.segments() for layer in part.lower(*(column[name] for name in part.genes))]

    def segments(self) -> Iterator[Segment]:
        source = Feature("stem", 16, self.resolution // (1 if self.resolution == 32 else 2))
        stem = _conv("stem", Feature(IMAGE, 3, self.resolution), 16, kernel=3, stride=self.resolution // source.size)
        yield Segment((), (), lambda: (stem,))
        place = 0
        for (width, count), stride in zip(_STAGES, _STRIDES[self.resolution], strict=True):
            for index in range(count):
                block = _block_at(f"block{place}", source, width, stride if index == 0 else 1)
                gene = self.genes[place]
                yield Segment((gene.name,), (gene.choices,), block)
                source = Feature(gene.name, width, source.size // (stride if index == 0 else 1))
                place += 1
        head = _conv("head", source, _HEAD[self.resolution])
        pool = _layer("pool", "global_pool", head.output, head.out_channels)
        classifier = _layer("classifier", "linear", pool.output, _CLASSES[self.resolution], bias=True)
        yield Segment((), (), lambda: (head, pool, classifier))


@segments.register
def _(space: FbnetSpace) -> Iterator[Segment]:  # type: ignore[misc]  # a space by its parts, not by its class
    return space.segments()


def _layer(name: str, kind: Kind, source: Feature, out_channels: int, **options: Any) -> Layer:
    return Layer(
        name=name, kind=kind, inputs=(source.name,), in_channels=source.channels, out_channels=out_channels,
        in_size=source.size, **options,
    )  # fmt: skip


def _conv(name: str, source: Feature, out_channels: int, *, relu: bool = True, **options: Any) -> Layer:
    return _layer(
        name, "conv", source, out_channels, norm=True, activation="relu" if relu else None, **options
    )  # fmt: skip


def _block_at(name: str, source: Feature, width: int, stride: int) -> Callable[[int], tuple[Layer, ...]]:
    def block(op: int) -> tuple[Layer, ...]:
        same = stride == 1 and source.channels == width
        if op == SKIP:
            return () if same else (_conv(name, source, width, stride=stride),)
        expand, kernel, groups = _BLOCKS[op]
        wide = source.channels * expand
        first = _conv(f"{name}.expand", source, wide, groups=groups)
        middle = _conv(f"{name}.depthwise", first.output, wide, kernel=kernel, stride=stride, groups=wide)
        last = _conv(f"{name}.project", middle.output, width, groups=groups, relu=False)
        add = _layer(f"{name}.add", "add", last.output, width)
        return (first, middle, last, add) if same else (first, middle, last)

    return block


def fbnet() -> Table:
    """5,000 networks at CIFAR-100 geometry on 19 devices; whether our layers have the table's MACs is checked."""
    columns = _read("fbnet_networks.csv.gz")
    genes = np.stack([columns[f"op{place}"] for place in range(22)], axis=1).astype(np.int8)
    return Table("FBNet", FbnetSpace(), genes, _latencies(columns))


def fbnet_macs(dataset: str) -> NDArray[np.float64]:
    """The table's own MACs, `cifar100` or `imagenet`, (num_networks,)."""
    return _read("fbnet_networks.csv.gz")[f"macs_{dataset}"]


# -------------------------------------------------------------------- Once-for-All


def ofa() -> Table:
    """5,000 networks of Once-for-All's MobileNetV3 space on two GPUs at batches of 1, 32 and 64."""
    columns = _read("ofa_networks.csv.gz")
    space = SearchSpace.load("ofa-mbv3")
    wide = [stage.width[0] for stage in space.stages]
    archs = []
    for row in zip(*(columns[name].astype(int).tolist() for name in columns if "lat" not in name), strict=True):
        values = dict(zip((name for name in columns if "lat" not in name), row, strict=True))
        stages = [Stage(wide[0], (Block(3, 1),))]
        for stage in range(5):
            places = range(4 * stage, 4 * stage + values[f"d{stage}"])
            blocks = tuple(Block(values[f"ks{place}"], values[f"e{place}"]) for place in places)
            stages.append(Stage(wide[stage + 1], blocks))
        archs.append(Architecture(values["r"], space.stem.width[0], tuple(stages), space.head.width[0]))
    used = tuple(sorted({arch.resolution for arch in archs}))
    if used != space.resolution:
        space = replace(space, resolution=used)
    return Table("OFA", space, space.encode(archs), _latencies(columns))


def _latencies(columns: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    return {name.removeprefix("lat_"): values for name, values in columns.items() if name.startswith("lat_")}


def _read(name: str) -> dict[str, NDArray[np.float64]]:
    with gzip.open(FOLDER / name, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    return dict(zip(header, np.array(rows, dtype=np.float64).T, strict=True))
