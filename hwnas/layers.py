"""The one lowering: an architecture as its list of layers, every shape worked out.

The network is built from this list, the ONNX file is written from it, and MACs, parameters and latency features
are sums over it. A layer names the layers whose outputs it reads, so the list is the whole dataflow graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import product
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwnas.space import Activation, Architecture, Block, Genes, Number, SearchSpace, StageSpace, round_channels

Kind: TypeAlias = Literal["conv", "linear", "avg_pool", "global_pool", "scale", "add"]
IMAGE = "image"
BN_EPS = 1e-5  # added to the variance in every batch norm


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature map: the name of the layer that makes it, its channels, and its side in pixels."""

    name: str
    channels: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer. The module and its tensors in the network carry the same name.

    Attributes:
        name: dotted path, `stage2.block1.depthwise`.
        kind: `conv` (padded by kernel // 2), `linear` (on pooled features), `avg_pool` (2x2, stride 2, partial
            windows at the border averaged over what they hold), `global_pool`, `scale` (first input times the
            second, one factor a channel), `add`.
        inputs: names of the layers it reads; `image` is the network's input.
        in_size: side of the (first) input, pixels.
        bias: has a bias; norm: is followed by batch norm; activation: is followed by it.
        residual: the last normalised layer of a branch that is added to a shortcut (its gamma starts at zero).
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    in_channels: int
    out_channels: int
    in_size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False
    norm: bool = False
    activation: Activation | None = None
    residual: bool = False

    @property
    def out_size(self) -> int:
        """Side of the output: the input's side over the stride, rounded up; 1 after a global pool."""
        return 1 if self.kind == "global_pool" else -(-self.in_size // self.stride)

    @property
    def output(self) -> Feature:
        """The feature map it makes."""
        return Feature(self.name, self.out_channels, self.out_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight: (out, in / groups, kernel, kernel), (out, in) for `linear`, () without one."""
        if self.kind == "conv":
            return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)
        return (self.out_channels, self.in_channels) if self.kind == "linear" else ()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its parameters.

        `{name}.conv.weight`, `{name}.norm.bias`, ...; the classifier's are `{name}.weight` and `{name}.bias`.
        """
        conv = f"{self.name}.conv" if self.kind == "conv" else self.name
        channels = (self.out_channels,)
        tensors = {}
        if self.weight_shape:
            tensors[f"{conv}.weight"] = self.weight_shape
        if self.bias:
            tensors[f"{conv}.bias"] = channels
        if self.norm:
            tensors |= {f"{self.name}.norm.weight": channels, f"{self.name}.norm.bias": channels}
        return tensors

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.groups > 1

    @property
    def num_weights(self) -> int:
        """Elements of the weight tensor, without bias and batch norm."""
        shape = self.weight_shape
        return math.prod(shape) if shape else 0

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers; what the papers print as FLOPs.

        Not counted, as in EfficientNet's, Once-for-All's and AttentiveNAS's tables: batch norm, bias,
        activations, pooling, scaling, addition.
        """
        return self.num_weights * self.out_size**2

    @property
    def params(self) -> int:
        """Weights, biases, and gamma and beta of batch norm."""
        return self.num_weights + self.out_channels * (int(self.bias) + 2 * int(self.norm))


def lower(space: SearchSpace, arch: Architecture) -> tuple[Layer, ...]:
    """The layers of `arch` in the order of execution.

    `space` gives what is not chosen: strides, activations, squeeze-excite, shortcuts, classes. The architecture's
    values need not be among the space's choices (`SearchSpace.check` tells), only its number of stages must fit.
    """
    layers = list(stem_layers(space, arch.resolution, arch.stem))
    for number, (spec, stage) in enumerate(zip(space.stages, arch.stages, strict=True), 1):
        for index, block in enumerate(stage.blocks, 1):
            stride = spec.stride if index == 1 else 1
            name = f"stage{number}.block{index}"
            layers += block_layers(space, spec, name, layers[-1].output, stage.width, block, stride)
    return (*layers, *head_layers(space, layers[-1].output, arch.head))


def stem_layers(space: SearchSpace, resolution: int, width: int) -> tuple[Layer, ...]:
    """The first convolution."""
    stem = space.stem
    return (
        Layer(
            name="stem", kind="conv", inputs=(IMAGE,), in_channels=space.in_channels, out_channels=width,
            in_size=resolution, kernel=stem.kernel, stride=stem.stride, norm=True, activation=space.activation,
        ),
    )  # fmt: skip


def block_layers(
    space: SearchSpace, spec: StageSpace, name: str, source: Feature, width: int, block: Block, stride: int
) -> tuple[Layer, ...]:
    """An inverted-residual block (MobileNetV2/V3, EfficientNet, BigNAS) that reads `source`."""
    activation = spec.activation or space.activation
    expanded = source.channels if block.expand == 1 else round_channels(source.channels * block.expand)
    layers: list[Layer] = []

    def conv(part: str, source: Feature, out_channels: int, **options: object) -> Feature:
        layers.append(
            Layer(
                name=f"{name}.{part}", kind="conv", inputs=(source.name,), in_channels=source.channels,
                out_channels=out_channels, in_size=source.size, **options,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        return layers[-1].output

    def other(part: str, kind: Kind, *sources: Feature, stride: int = 1) -> Feature:
        channels, size = sources[0].channels, sources[0].size
        layers.append(
            Layer(
                name=f"{name}.{part}", kind=kind, inputs=tuple(s.name for s in sources), in_channels=channels,
                out_channels=channels, in_size=size, kernel=stride, stride=stride,
            )
        )  # fmt: skip
        return layers[-1].output

    has_shortcut = space.shortcut == "pool-conv" or (stride == 1 and source.channels == width)
    x = source
    if block.expand != 1:
        x = conv("expand", x, expanded, norm=True, activation=activation)
    x = conv(
        "depthwise", x, expanded, kernel=block.kernel, stride=stride, groups=expanded, norm=True, activation=activation
    )
    if spec.se:
        se = space.squeeze_excite
        of = source.channels if se.of == "input" else expanded
        # At divisor 1 EfficientNet's int(channels * ratio); else MobileNetV3's rounding.
        squeezed = max(1, int(of * se.ratio)) if se.divisor == 1 else round_channels(of * se.ratio, se.divisor)
        gate = other("se.pool", "global_pool", x)
        gate = conv("se.reduce", gate, squeezed, bias=True, activation=se.activation)
        gate = conv("se.expand", gate, expanded, bias=True, activation=se.gate)
        x = other("se.scale", "scale", x, gate)
    x = conv("project", x, width, norm=True, residual=has_shortcut)
    if has_shortcut:
        shortcut = source
        if stride == 2:
            shortcut = other("shortcut.pool", "avg_pool", shortcut, stride=2)
        if shortcut.channels != width:
            shortcut = conv("shortcut.conv", shortcut, width)
        other("add", "add", x, shortcut)
    return tuple(layers)


def head_layers(space: SearchSpace, source: Feature, width: int) -> tuple[Layer, ...]:
    """Last convolutions, global pool and classifier."""
    activation = space.activation

    def layer(name: str, kind: Kind, source: Feature, out_channels: int, **options: object) -> Layer:
        return Layer(
            name=name, kind=kind, inputs=(source.name,), in_channels=source.channels, out_channels=out_channels,
            in_size=source.size, **options,  # type: ignore[arg-type]
        )  # fmt: skip

    expand = space.head.expand
    wide = width if expand is None else round_channels(source.channels * expand)
    conv = layer("head.conv", "conv", source, wide, norm=True, activation=activation)
    pool = layer("head.pool", "global_pool", conv.output, wide)
    layers = [conv, pool]
    if expand is not None:
        layers.append(layer("head.mix", "conv", pool.output, width, activation=activation))
    layers.append(layer("classifier", "linear", layers[-1].output, space.num_classes, bias=True))
    return tuple(layers)


# -------------------------------------------------------------------- sums


def total_macs(layers: Sequence[Layer]) -> int:
    """Multiply-adds of a network (see `Layer.macs`)."""
    return sum(layer.macs for layer in layers)


def total_params(layers: Sequence[Layer]) -> int:
    """Parameters of a network (see `Layer.params`)."""
    return sum(layer.params for layer in layers)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the network whose layers depend on few choices: the stem, one block, or the head.

    Attributes:
        genes: names of those choices, in the order of `lower`'s arguments.
        choices: their values.
        lower: the layers for one value of each; empty where the depth leaves the block out.
    """

    genes: tuple[str, ...]
    choices: tuple[tuple[Number, ...], ...]
    lower: Callable[..., tuple[Layer, ...]]

    def layers(self) -> Iterator[tuple[Layer, ...]]:
        """The layers for every combination of the choices, in the order of `itertools.product`."""
        return (self.lower(*values) for values in product(*self.choices))


@singledispatch
def segments(space: SearchSpace) -> Iterator[Segment]:
    """Every part of the networks of a space; a child's layers are one combination out of each.

    Spaces of other networks, such as those of published tables, register how theirs are made.
    """
    choices = {gene.name: gene.choices for gene in space.genes}

    def segment(genes: Sequence[str], lower: Callable[..., tuple[Layer, ...]]) -> Segment:
        return Segment(tuple(genes), tuple(choices[gene] for gene in genes), lower)

    yield segment(["resolution", "stem"], lambda res, width: stem_layers(space, res, width))
    source, stride = "stem", space.stem.stride
    for number, spec in enumerate(space.stages, 1):
        stage = f"stage{number}"
        for index in range(1, spec.depth[-1] + 1):
            kernel, expand = (
                f"{stage}.{name}" if f"{stage}.{name}" in choices else f"{stage}.block{index}.{name}"
                for name in ("kernel", "expand")
            )
            genes = ["resolution", source, f"{stage}.width", f"{stage}.depth", kernel, expand]
            block = _block_at(space, spec, f"{stage}.block{index}", index, downscale=stride)
            if index == 1:
                yield segment(genes, block)
                source, stride = f"{stage}.width", stride * spec.stride
            else:  # reads its own stage's width, which is asked once
                yield segment(genes[:1] + genes[2:], lambda res, width, *rest, b=block: b(res, width, width, *rest))
    yield segment(
        ["resolution", source, "head"],
        lambda res, channels, width: head_layers(space, Feature("x", channels, -(-res // stride)), width),
    )


def _block_at(
    space: SearchSpace, spec: StageSpace, name: str, index: int, *, downscale: int
) -> Callable[..., tuple[Layer, ...]]:
    def block(res: int, channels: int, width: int, depth: int, kernel: int, expand: Number) -> tuple[Layer, ...]:
        if depth < index:
            return ()
        source = Feature("x", channels, -(-res // downscale))  # ceil(ceil(n / a) / b) == ceil(n / (a * b))
        stride = spec.stride if index == 1 else 1
        return block_layers(space, spec, name, source, width, Block(kernel, expand), stride)

    return block


class _SegmentTables:
    """Something of many architectures at once, from their genes: a table a segment, one look-up each.

    Every different block is lowered once, what it gives goes into a table, and an architecture's value combines one
    row of each.

    Args:
        space: the search space.
        values: what the layers of a segment give, always equally many numbers of at least 0; 0 without layers.
    """

    _combine: ClassVar[np.ufunc]

    def __init__(
        self, space: SearchSpace, values: Callable[[Sequence[Layer]], Sequence[float] | NDArray[np.float64]]
    ) -> None:
        column = {gene.name: index for index, gene in enumerate(space.genes)}
        self._num_genes = len(column)
        self._tables: list[tuple[list[tuple[int, int]], NDArray[np.float64]]] = []
        for segment in segments(space):
            table = np.asarray([values(layers) for layers in segment.layers()], dtype=np.float64)
            self._tables.append((self._axes(segment, column), table))

    @staticmethod
    def _axes(segment: Segment, column: Mapping[str, int]) -> list[tuple[int, int]]:
        """(Gene column, number of choices) of what a segment depends on, leaving out what does not vary."""
        return [
            (column[gene], len(options))
            for gene, options in zip(segment.genes, segment.choices, strict=True)
            if len(options) > 1
        ]

    def __call__(self, genes: Genes, chunk: int = 16384) -> NDArray[np.float64]:
        """Values of shape (num_archs, num_quantities) for genes of shape (num_archs, num_genes).

        `chunk` architectures at a time stay in the processor's cache.
        """
        if genes.ndim != 2 or genes.shape[1] != self._num_genes:
            raise ValueError(f"genes have shape (num_archs, {self._num_genes}), not {genes.shape}")
        num_quantities = self._tables[0][1].shape[1]
        totals = np.zeros((len(genes), num_quantities))
        for start in range(0, len(genes), chunk):
            # One contiguous row a gene; what an absent block's -1 selects does not matter: its depth gives zeros.
            columns = np.maximum(genes[start : start + chunk].T, 0).astype(np.int32, order="C")
            part = totals[start : start + chunk]
            for axes, table in self._tables:
                index: NDArray[np.int32] | int = 0
                for column, size in axes:
                    index = index * size + columns[column]
                self._combine(part, table[index] if isinstance(index, int) else table.take(index, axis=0), out=part)
        return totals


class LayerSums(_SegmentTables):
    """Sums over the layers of many architectures at once, from their genes: (num_archs, num_quantities).

        costs = LayerSums(space, lambda layer: (layer.macs, layer.params))
        macs, params = costs(space.encode(archs)).T

    Args:
        space: the search space.
        measure: the quantities of one layer, always equally many.
    """

    _combine = np.add

    def __init__(self, space: SearchSpace, measure: Callable[[Layer], Sequence[float]]) -> None:
        any_layer = Layer(name="", kind="add", inputs=(), in_channels=1, out_channels=1, in_size=1)
        nothing = np.zeros(len(measure(any_layer)))
        super().__init__(
            space, lambda layers: np.sum([measure(layer) for layer in layers], axis=0) if layers else nothing
        )


# -------------------------------------------------------------------- memory

# How many further tensors of its output's size an activation takes while it is computed, as in onnxruntime: swish is
# an operator of its own (QuickGelu), all others are computed in place, as part of the convolution.
SPARE_TENSORS: Mapping[Activation, int] = {"swish": 1}


def peak_activation_bytes(
    layers: Sequence[Layer], bytes_per_element: int = 4, spare: Mapping[Activation, int] = SPARE_TENSORS
) -> int:
    """The most memory that feature maps take at any time, when each lives from its layer to its last reader.

    Layers run in the order of the list. While one runs, its inputs and its output are there, beside what later layers
    read: a block's input up to its shortcut, a feature map up to its squeeze-excite's scaling. The image is there up
    to the first layer, the last layer's output to the end. Weights, and what a runtime needs to lay memory out or to
    repack inputs, are not counted.

    Args:
        layers: of a network, or of consecutive blocks: what they read and do not make is there from the start.
        bytes_per_element: 4 in float32, 1 in int8.
        spare: of each activation that is not computed in place, how many tensors more than its output are there then:
            1 as an operator of its own, 2 for a swish as a sigmoid and a product.
    """
    last = {name: layer for layer in layers for name in layer.inputs}
    made = {layer.name for layer in layers}
    live = {layer.inputs[0]: layer.in_channels * layer.in_size**2 for layer in layers if layer.inputs[0] not in made}
    peak = 0
    for layer in layers:
        elements = live[layer.name] = layer.out_channels * layer.out_size**2
        peak = max(peak, sum(live.values()))
        for name in layer.inputs:
            if last[name] is layer:
                live.pop(name, None)
        if layer.activation is not None:
            peak = max(peak, sum(live.values()) + spare.get(layer.activation, 0) * elements)
    return peak * bytes_per_element


class LayerPeaks(_SegmentTables):
    """`peak_activation_bytes` of many architectures at once, from their genes: (num_archs,).

    Between two segments nothing lives but the one feature map that the second reads, so the network's peak is the
    largest of its segments' own.

    Args:
        space: the search space.
        bytes_per_element, spare: see `peak_activation_bytes`.
    """

    _combine = np.maximum

    def __init__(
        self, space: SearchSpace, bytes_per_element: int = 4, spare: Mapping[Activation, int] = SPARE_TENSORS
    ) -> None:
        super().__init__(space, lambda layers: (peak_activation_bytes(layers, bytes_per_element, spare),))

    def __call__(self, genes: Genes, chunk: int = 16384) -> NDArray[np.float64]:
        """Bytes of shape (num_archs,) for genes of shape (num_archs, num_genes); see `LayerSums`."""
        return super().__call__(genes, chunk)[:, 0]
