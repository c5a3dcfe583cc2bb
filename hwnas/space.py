"""Search spaces, and the one walk over their choices.

A `SearchSpace` says what may be chosen; an `Architecture` is what was chosen. `SearchSpace.walk` visits every
choice in a fixed order, and everything else is a `pick` handed to it: sampling, mutation, checking, encoding.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, StrictInt, with_config

from hwnas.config import check, read_yaml
from hwnas.errors import InputError

Number: TypeAlias = int | float
Pick: TypeAlias = Callable[[str, tuple[Any, ...]], Any]
Genes: TypeAlias = NDArray[np.int8]
FloatArray: TypeAlias = NDArray[np.float64]
Activation = Literal["relu", "swish", "h-swish", "sigmoid", "h-sigmoid"]

_STRICT = ConfigDict(extra="forbid")


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least 90% of `channels`.

    Source: `_make_divisible` of the MobileNet reference code (tensorflow/models), used by all spaces here.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Block:
    """One block of a stage: depthwise kernel size and expand ratio."""

    kernel: int
    expand: Number


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its output channels and the blocks it has (their number is the depth)."""

    width: int
    blocks: tuple[Block, ...]


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Architecture:
    """One child network: only what exists is written down, so equality and hashing are right.

    Attributes:
        resolution: side of the square input image, pixels.
        stem: output channels of the first convolution.
        stages: the stages in order.
        head: channels of the last feature vector.
    """

    resolution: int
    stem: int
    stages: tuple[Stage, ...]
    head: int

    def get(self, name: str) -> Number:
        """The value of a choice by the name that `SearchSpace.walk` gives it, such as `stage3.block1.kernel`.

        A choice shared by a whole stage (`stage3.kernel`) is read from the stage's first block.

        Raises:
            InputError: this architecture has no such stage or block.
        """
        stage, block, attribute = _path(name)
        if stage is None:
            return int(getattr(self, attribute))
        if stage > len(self.stages):
            raise InputError(f"{name}: the architecture has only {len(self.stages)} stages")
        blocks = self.stages[stage - 1].blocks
        if attribute == "depth":
            return len(blocks)
        if attribute == "width":
            return self.stages[stage - 1].width
        if block > len(blocks):
            raise InputError(f"{name}: the stage has only {len(blocks)} blocks")
        value: Number = getattr(blocks[block - 1], attribute)
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists for JSON."""
        return {
            "resolution": self.resolution,
            "stem": self.stem,
            "stages": [
                {"width": s.width, "blocks": [{"kernel": b.kernel, "expand": b.expand} for b in s.blocks]}
                for s in self.stages
            ],
            "head": self.head,
        }

    @classmethod
    def from_dict(cls, value: object, source: str = "architecture") -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: a key is missing or unknown, or a value has the wrong type.
        """
        return check(cls, value, source=source)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that identify the architecture, the same on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """One line as the papers print children, stage by stage; mixed values within a stage as `3/5`."""

        def per_stage(values: Iterable[Sequence[Number]]) -> str:
            return "-".join("/".join(f"{v:g}" for v in sorted(set(stage))) for stage in values)

        widths = "-".join(str(stage.width) for stage in self.stages)
        depths = "-".join(str(len(stage.blocks)) for stage in self.stages)
        kernels = per_stage([block.kernel for block in stage.blocks] for stage in self.stages)
        expands = per_stage([block.expand for block in stage.blocks] for stage in self.stages)
        return f"{self.resolution}px w{self.stem}|{widths}|{self.head} d{depths} k{kernels} e{expands}"


@cache
def _path(name: str) -> tuple[int | None, int, str]:
    """`stage3.block2.kernel` -> (3, 2, "kernel"); `stage3.kernel` -> (3, 1, "kernel"); `head` -> (None, 0, "head")."""
    match = re.fullmatch(r"stage(\d+)\.(?:block(\d+)\.)?(width|depth|kernel|expand)", name)
    if match is None:
        return None, 0, name
    return int(match[1]), int(match[2] or 1), match[3]


def _expand_range(value: object) -> object:
    """A choice as a file writes it: one number, a list, or `{from: 16, to: 32, step: 8}`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, dict):
        if set(value) != {"from", "to", "step"} or not all(type(v) is int for v in value.values()):
            raise ValueError(f"a range has three whole numbers, from, to and step, not {value!r}")
        if value["step"] <= 0 or value["to"] < value["from"]:
            raise ValueError(f"a range goes up by a positive step, not {value!r}")
        return tuple(range(value["from"], value["to"] + 1, value["step"]))
    if isinstance(value, list | tuple):
        wrong = [item for item in value if type(item) not in (int, float)]
        if wrong:
            raise ValueError(f"choices are numbers, not {wrong[0]!r}")
        return tuple(value)
    raise ValueError(f"choices are a number, a list of numbers or a range, not {value!r}")


Ints = Annotated[tuple[StrictInt, ...], BeforeValidator(_expand_range)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_expand_range)]


def _require(rule: str, name: str, values: Sequence[Number], holds: Callable[[Number], bool]) -> None:
    for value in values:
        if not holds(value):
            raise ValueError(f"{name}={value}: {rule}")
    if len(values) > 127:
        raise ValueError(f"{name}: at most 127 choices, not {len(values)}")
    if not values or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{name}={list(values)}: choices are listed once each, in ascending order, at least one")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class SqueezeExcite:
    """How the squeeze-excite branch of a block is built.

    Attributes:
        ratio: squeezed channels as a share of `of`.
        of: the block's `input` channels (EfficientNet, BigNAS) or its `expanded` ones (MobileNetV3, AttentiveNAS).
        divisor: squeezed channels are rounded to a multiple of this.
        activation: between the two convolutions.
        gate: after them.
    """

    ratio: float = 0.25
    of: Literal["input", "expanded"] = "input"
    divisor: int = 1
    activation: Activation = "swish"
    gate: Activation = "sigmoid"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: must be over 0 and at most 1")
        if self.divisor < 1:
            raise ValueError(f"divisor={self.divisor}: must be at least 1")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class StemSpace:
    """Choices of the first convolution."""

    width: Ints
    kernel: int = 3
    stride: int = 2

    def __post_init__(self) -> None:
        _require("channels are at least 1", "width", self.width, lambda v: v >= 1)
        _require("kernels are odd numbers from 1", "kernel", (self.kernel,), lambda v: v >= 1 and v % 2 == 1)
        _require("strides are 1 or 2", "stride", (self.stride,), lambda v: v in (1, 2))


@with_config(_STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpace:
    """Choices of one stage of inverted-residual (MBConv) blocks; `stride` is that of its first block."""

    width: Ints
    depth: Ints
    kernel: Ints
    expand: Numbers
    stride: int = 1
    se: bool = False
    activation: Activation | None = None

    def __post_init__(self) -> None:
        _require("channels are at least 1", "width", self.width, lambda v: v >= 1)
        _require("a stage has at least 1 block", "depth", self.depth, lambda v: v >= 1)
        _require("kernels are odd numbers from 1", "kernel", self.kernel, lambda v: v >= 1 and v % 2 == 1)
        _require("expand ratios are at least 1", "expand", self.expand, lambda v: v >= 1)
        _require("strides are 1 or 2", "stride", (self.stride,), lambda v: v in (1, 2))


@with_config(_STRICT)
@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpace:
    """Choices of the head.

    Without `expand`: a 1x1 convolution to `width`, global pool, classifier (BigNAS). With it: a 1x1 convolution
    to `expand` times the last stage's width, global pool, a 1x1 convolution to `width` without batch norm,
    classifier (MobileNetV3, Once-for-All, AttentiveNAS).
    """

    width: Ints
    expand: Number | None = None

    def __post_init__(self) -> None:
        _require("channels are at least 1", "width", self.width, lambda v: v >= 1)
        if self.expand is not None and self.expand < 1:
            raise ValueError(f"expand={self.expand}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Gene:
    """One choice of the deepest walk.

    `depth_gene` is the index of the gene that decides whether block `block` of its stage exists; None if the choice
    always exists.
    """

    name: str
    choices: tuple[Number, ...]
    block: int = 0
    depth_gene: int | None = None


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The set of networks one supernet holds.

    Attributes:
        name: a short name, kept with everything that is made from the space.
        resolution: sides of the square input image, pixels, ascending.
        stem, stages, head: their choices.
        activation: of all layers that do not say otherwise.
        squeeze_excite: how the stages with `se: true` build that branch.
        shortcut: `identity` adds a block's input only where shapes agree; `pool-conv` gives every block a
            shortcut: a 2x2 average pool at stride 2, a 1x1 convolution where channels differ (BigNAS).
        kernel_per, expand_per: one choice per `layer`, or one shared by a whole `stage`.
        in_channels: channels of the input image.
        num_classes: outputs of the classifier.
    """

    name: str
    resolution: Ints
    stem: StemSpace
    stages: tuple[StageSpace, ...]
    head: HeadSpace
    activation: Activation = "swish"
    squeeze_excite: SqueezeExcite = SqueezeExcite()
    shortcut: Literal["identity", "pool-conv"] = "identity"
    kernel_per: Literal["layer", "stage"] = "layer"
    expand_per: Literal["layer", "stage"] = "layer"
    in_channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        _require("resolutions are at least 8 pixels", "resolution", self.resolution, lambda v: v >= 8)
        if not self.stages:
            raise ValueError("stages=[]: a space has at least one stage")
        if self.in_channels < 1:
            raise ValueError(f"in_channels={self.in_channels}: must be at least 1")
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes}: must be at least 2")

    # ---------------------------------------------------------------- loading

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names of the spaces that come with hwnas."""
        files = resources.files("hwnas").joinpath("spaces").iterdir()
        return tuple(sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml")))

    @classmethod
    def load(cls, name_or_path: str | Path, **changes: Any) -> Self:
        """A space by its name (`bignas`) or from a YAML file.

        A file may start from another space: `base: bignas` (or a path beside it) takes over every key it does not
        write itself; `width_multiplier: 1.2` scales all widths, rounded to multiples of 8.

        Args:
            name_or_path: one of `names()`, or a path that ends in .yaml or .yml.
            changes: fields to replace, such as `kernel_per="stage"` or `num_classes=10`.

        Raises:
            InputError: unknown name, or a mistake in the file (with file, line, key, rule and value).
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            if str(name_or_path) not in cls.names():
                known = ", ".join(cls.names())
                raise InputError(
                    f"unknown space {str(name_or_path)!r}: not one of {known}; a space of your own is a .yaml file"
                )
            path = Path(str(resources.files("hwnas").joinpath("spaces", f"{name_or_path}.yaml")))
        content, lines = _read_space(path, ())
        multiplier = content.pop("width_multiplier", 1.0)
        if type(multiplier) not in (int, float) or not 0 < multiplier <= 10:
            raise InputError(f"{path}: width_multiplier={multiplier!r}: must be a number over 0 and at most 10")
        space = check(cls, {"name": path.stem, **content, **changes}, source=str(path), lines=lines)
        return space if multiplier == 1 else space._scaled(multiplier)

    @classmethod
    def from_dict(cls, value: object, source: str = "space") -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: with key, rule and value of the first mistake.
        """
        return check(cls, value, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists for JSON or YAML."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value

    def _scaled(self, multiplier: float) -> Self:
        def scale(widths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted({round_channels(width * multiplier) for width in widths}))

        return replace(
            self,
            stem=replace(self.stem, width=scale(self.stem.width)),
            stages=tuple(replace(stage, width=scale(stage.width)) for stage in self.stages),
            head=replace(self.head, width=scale(self.head.width)),
        )

    # ---------------------------------------------------------------- the walk

    def walk(self, pick: Pick) -> Architecture:
        """Visit every choice in a fixed order, and return the architecture that `pick(name, choices)` makes.

        A stage's depth is asked before its blocks, so blocks that do not exist are never asked for.

        Raises:
            InputError: `pick` returned a value that is not among the choices.
        """

        def choose(name: str, choices: tuple[Any, ...]) -> Any:
            value = pick(name, choices)
            if value not in choices:
                raise InputError(f"{name}={value} is not one of {choices}")
            return value

        resolution = choose("resolution", self.resolution)
        stem = choose("stem", self.stem.width)
        stages = []
        for number, stage in enumerate(self.stages, 1):
            name = f"stage{number}"
            width = choose(f"{name}.width", stage.width)
            depth = choose(f"{name}.depth", stage.depth)
            kernel = choose(f"{name}.kernel", stage.kernel) if self.kernel_per == "stage" else None
            expand = choose(f"{name}.expand", stage.expand) if self.expand_per == "stage" else None
            blocks = tuple(
                Block(
                    kernel or choose(f"{name}.block{block}.kernel", stage.kernel),
                    expand or choose(f"{name}.block{block}.expand", stage.expand),
                )
                for block in range(1, depth + 1)
            )
            stages.append(Stage(width, blocks))
        return Architecture(resolution, stem, tuple(stages), choose("head", self.head.width))

    def largest(self) -> Architecture:
        """The biggest child: the largest value of every choice."""
        return self.walk(lambda _name, choices: choices[-1])

    def smallest(self) -> Architecture:
        """The smallest child: the least value of every choice."""
        return self.walk(lambda _name, choices: choices[0])

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random child: each choice uniform."""
        return self.walk(lambda _name, choices: choices[rng.integers(len(choices))])

    def mutate(self, arch: Architecture, rng: np.random.Generator, probability: float = 0.1) -> Architecture:
        """A copy of `arch` in which each choice is drawn anew with `probability`.

        Blocks that a greater depth adds are drawn at random.
        """

        def pick(name: str, choices: tuple[Any, ...]) -> Any:
            if len(choices) > 1 and rng.random() < probability:
                return choices[rng.integers(len(choices))]
            try:
                return arch.get(name)
            except InputError:
                return choices[rng.integers(len(choices))]

        return self.walk(pick)

    def crossover(self, a: Architecture, b: Architecture, rng: np.random.Generator) -> Architecture:
        """A child that takes each choice from `a` or `b` with equal probability, from the one that has it."""

        def pick(name: str, _choices: tuple[Any, ...]) -> Any:
            first, second = (a, b) if rng.random() < 0.5 else (b, a)
            try:
                return first.get(name)
            except InputError:
                return second.get(name)

        return self.walk(pick)

    def check(self, arch: Architecture, *, any_resolution: bool = False) -> Architecture:
        """Return `arch` if it belongs to this space.

        Args:
            arch: the child.
            any_resolution: also accept resolutions that are not in the space: convolutions take any image, and a
                trained supernet's children serve resolutions in between, once calibrated there (BigNAS, 4.3).

        Raises:
            InputError: the first choice that does not fit, with its value and the allowed ones.
        """
        if any_resolution:
            self.check(replace(arch, resolution=self.resolution[0]))
            if arch.resolution < 1:
                raise InputError(f"resolution={arch.resolution} is not at least 1 pixel")
            return arch
        found = self.walk(lambda name, _choices: arch.get(name))
        if len(arch.stages) != len(self.stages):
            raise InputError(
                f"the architecture has {len(arch.stages)} stages, space {self.name!r} has {len(self.stages)}"
            )
        if found != arch:
            raise InputError(
                f"the architecture mixes kernels or expand ratios within a stage, but space {self.name!r} has "
                f"kernel_per={self.kernel_per}, expand_per={self.expand_per}"
            )
        return arch

    def has_resolution_of(self, arch: Architecture) -> bool:
        """Whether a child that `check` accepts at any resolution is at one of the space.

        Others are evaluated and exported like these, but have no genes, so no predictor or search knows them.
        """
        return arch.resolution in self.resolution

    def skeletons(self, levels: int = 3) -> Iterator[Architecture]:
        """The coarse grid of BigNAS's selection: network-wise settings of resolution, depth, width, kernel, expand.

        Every resolution is combined with `levels` evenly spaced positions in the choices of depth and of width, and
        with the least and greatest kernel and expand ratio. Each architecture is given once.
        """
        positions = [index / max(levels - 1, 1) for index in range(levels)]
        seen = set()
        for resolution in self.resolution:
            for depth, width in ((d, w) for d in positions for w in positions):
                for kernel, expand in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    where = {"depth": depth, "width": width, "kernel": kernel, "expand": expand}
                    arch = self.walk(_at_positions(resolution, where))
                    if arch not in seen:
                        seen.add(arch)
                        yield arch

    # ---------------------------------------------------------------- genes

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The choices of the deepest child in the order of the walk: the columns of `encode`."""
        genes: list[Gene] = []
        depth_genes: dict[int, int] = {}

        def record(name: str, choices: tuple[Any, ...]) -> Any:
            stage, block, attribute = _path(name)
            if attribute == "depth" and stage is not None:
                depth_genes[stage] = len(genes)
            if stage is not None and ".block" in name:
                genes.append(Gene(name, choices, block, depth_genes[stage]))
            else:
                genes.append(Gene(name, choices))
            return choices[-1]

        self.walk(record)
        return tuple(genes)

    @cached_property
    def _column(self) -> Mapping[str, int]:
        return {gene.name: index for index, gene in enumerate(self.genes)}

    def size(self) -> int:
        """The number of architectures in the space."""

        def blocks(stage: StageSpace) -> int:
            per_block = (len(stage.kernel) if self.kernel_per == "layer" else 1) * (
                len(stage.expand) if self.expand_per == "layer" else 1
            )
            per_stage = (len(stage.kernel) if self.kernel_per == "stage" else 1) * (
                len(stage.expand) if self.expand_per == "stage" else 1
            )
            return len(stage.width) * per_stage * sum(int(per_block**depth) for depth in stage.depth)

        total = len(self.resolution) * len(self.stem.width) * len(self.head.width)
        return total * math.prod(map(blocks, self.stages))

    def encode(self, archs: Iterable[Architecture]) -> Genes:
        """Architectures as indices into their choices: int8, (num_archs, num_genes), -1 where a block is absent.

        Raises:
            InputError: an architecture does not belong to the space.
        """
        rows = []
        for arch in archs:
            row = np.full(len(self.genes), -1, dtype=np.int8)

            def pick(name: str, choices: tuple[Any, ...], arch: Architecture = arch, row: Genes = row) -> Any:
                value = arch.get(name)
                if value in choices:
                    row[self._column[name]] = choices.index(value)
                return value

            self.walk(pick)
            rows.append(row)
        return np.stack(rows) if rows else np.empty((0, len(self.genes)), dtype=np.int8)

    def decode(self, genes: Genes) -> Architecture:
        """The architecture of one row of `encode`, shape (num_genes,)."""
        return self.walk(lambda name, choices: choices[genes[self._column[name]]])

    def sample_genes(self, count: int, rng: np.random.Generator) -> Genes:
        """`count` random children as genes, each choice uniform: int8, (count, num_genes)."""
        return self.mask_absent(self.draw_genes(count, rng))

    def draw_genes(self, count: int, rng: np.random.Generator) -> Genes:
        """`sample_genes` before absent blocks are masked: a choice for every gene."""
        columns = [rng.integers(len(gene.choices), size=count, dtype=np.int8) for gene in self.genes]
        return np.stack(columns, axis=1)

    def mutate_genes(self, genes: Genes, rng: np.random.Generator, probability: float | FloatArray = 0.1) -> Genes:
        """`mutate` for many children: copies in which each choice is drawn anew with `probability`.

        Args:
            genes: (num_archs, num_genes).
            rng: source of chance.
            probability: one for all, or one for each child, (num_archs, 1).
        """
        anew = (rng.random(genes.shape) < probability) | (genes < 0)
        return self.mask_absent(np.where(anew, self.draw_genes(len(genes), rng), genes))

    def crossover_genes(self, a: Genes, b: Genes, rng: np.random.Generator) -> Genes:
        """`crossover` for many pairs: children that take each choice from `a` or `b`, from the one that has it.

        All of shape (num_archs, num_genes).
        """
        from_a = rng.random(a.shape) < 0.5
        return self.mask_absent(np.where((from_a & (a >= 0)) | (b < 0), a, b))

    def mask_absent(self, genes: Genes) -> Genes:
        """Set the genes of blocks beyond their stage's depth to -1, in place; (num_archs, num_genes)."""
        for index, gene in enumerate(self.genes):
            if gene.depth_gene is not None:
                depths = np.asarray(self.genes[gene.depth_gene].choices)
                genes[depths[genes[:, gene.depth_gene]] < gene.block, index] = -1
        return genes


def _at_positions(resolution: int, where: Mapping[str, float]) -> Pick:
    """A pick that takes each choice at a relative position from 0 (least) to 1 (greatest), by the kind of choice."""

    def pick(name: str, choices: tuple[Any, ...]) -> Any:
        if name == "resolution":
            return resolution
        position = where.get(name.rpartition(".")[2], where["width"])  # stem and head are widths
        return choices[round(position * (len(choices) - 1))]

    return pick


def _read_space(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, int]]:
    """The keys of a space file over those of its base, and the lines of the keys it writes itself."""
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: a space is a mapping of keys to values, not {type(content).__name__}")
    base = content.pop("base", None)
    if base is None:
        return content, lines
    file = path.parent / str(base)
    if file.suffix not in (".yaml", ".yml"):
        if base not in SearchSpace.names():
            known = ", ".join(SearchSpace.names())
            raise InputError(f"{path}:{lines['base']}: base: unknown space {base!r}: not one of {known}")
        file = Path(str(resources.files("hwnas").joinpath("spaces", f"{base}.yaml")))
    if file.resolve() in seen or file.resolve() == path.resolve():
        raise InputError(f"{path}:{lines['base']}: base: {base} leads back to this file")
    below, _ = _read_space(file, (*seen, path.resolve()))
    below.pop("name", None)
    return {**below, **content}, lines
