"""What a layer asks of a machine: the quantities that predictors sum over a network's layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from hwnas.errors import InputError
from hwnas.layers import Layer, LayerSums, segments
from hwnas.space import Genes, SearchSpace

# Units: multiply-adds (`_macs`), elements of activations read and written (`_moved`), elements an activation
# function is applied to (`_elements`), weights, and counts of operations. Saved predictors refer to these names:
# add names freely, but give a quantity with a new meaning a new name.
FEATURE_NAMES = (
    "dense_macs", "pointwise_macs", "padding_macs",
    "depthwise3_macs", "depthwise3_stride2_macs", "depthwise5_macs", "depthwise5_stride2_macs",
    "depthwise7_macs", "depthwise7_stride2_macs", "depthwise_padding_macs", "grouped_macs", "linear_macs",
    "dense_moved", "pointwise_moved", "depthwise_moved", "grouped_moved", "pool_moved", "elementwise_moved", "weights",
    "convs", "depthwise_convs", "grouped_convs", "pools", "elementwise_ops", "squeeze_excites",
    "relu_elements", "swish_elements", "h_swish_elements", "sigmoid_elements", "h_sigmoid_elements",
    "networks",
)  # fmt: skip
_INDEX = {name: index for index, name in enumerate(FEATURE_NAMES)}

# Neighbouring parts of the network share a table of so many rows at most: one look-up instead of several, and with some
# tens of sums a row it stays in the processor's cache.
_MOST_ROWS = 2048

# Vector units work on so many channels at a time: onnxruntime's convolutions on AVX-512 pad channels to 16.
_LANES = 16


def layer_features(layer: Layer) -> Sequence[float]:
    """The quantities of one layer, (num_features,), in the order of `FEATURE_NAMES`.

    Depthwise kernels over 7 count as 7, under 3 as 3. `padding_macs` and
    `depthwise_padding_macs` are what filling channels up to a multiple of 16 adds. `networks` is 1 in the
    classifier, which every network has once.
    """
    features = [0.0] * len(FEATURE_NAMES)

    def add(name: str, amount: float) -> None:
        features[_INDEX[name]] += amount

    read = layer.in_channels * layer.in_size**2
    written = layer.out_channels * layer.out_size**2
    add("weights", layer.num_weights)
    match layer.kind:
        case "conv" if 1 < layer.groups < layer.in_channels:
            add("grouped_macs", layer.macs)
            add("grouped_moved", read + written)
            add("grouped_convs", 1)
        case "conv" if layer.depthwise:
            kernel, stride = min(max(layer.kernel, 3), 7), "_stride2" if layer.stride > 1 else ""
            add(f"depthwise{kernel}{stride}_macs", layer.macs)
            add("depthwise_padding_macs", layer.macs * (_padded(layer.out_channels) / layer.out_channels - 1))
            add("depthwise_moved", read + written)
            add("depthwise_convs", 1)
        case "conv":
            shape = "pointwise" if layer.kernel == 1 else "dense"
            filled = _padded(layer.out_channels) / layer.out_channels
            if shape == "pointwise":
                filled *= _padded(layer.in_channels) / layer.in_channels
            add(f"{shape}_macs", layer.macs)
            add("padding_macs", layer.macs * (filled - 1))
            add(f"{shape}_moved", read + written)
            add("convs", 1)
        case "linear":
            add("linear_macs", layer.macs)
            add("networks", 1)
        case "avg_pool" | "global_pool":
            add("pool_moved", read + written)
            add("pools", 1)
        case "scale":
            add("elementwise_moved", read + written)
            add("elementwise_ops", 1)
            add("squeeze_excites", 1)
        case "add":
            add("elementwise_moved", 2 * read + written)
            add("elementwise_ops", 1)
    if layer.activation:
        add(f"{layer.activation.replace('-', '_')}_elements", written)
    return features


def _padded(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


# (Gene column, number of choices) of what a part of the network depends on; and the part's layers for each combination
# of those, (num_combinations, num_layers).
_Part: TypeAlias = tuple[list[tuple[int, int]], csr_array]


class FeatureSums(LayerSums):
    """Features of many networks at once, from their genes: (num_archs, num_features).

    Attributes:
        layers: the different layers that networks of the space are made of, (num_layers,).
        layer_features: their features, (num_layers, num_features).
    """

    def __init__(self, space: SearchSpace) -> None:
        column = {gene.name: index for index, gene in enumerate(space.genes)}
        self._num_genes = len(column)
        index = self._index = dict[tuple[object, ...], int]()
        self.layers: list[Layer] = []
        parts = []
        for segment in segments(space):
            rows, columns = [], []
            num_rows = 0
            for row, layers in enumerate(segment.layers()):
                num_rows = row + 1
                for layer in layers:
                    key = self._key(layer)
                    if key not in index:
                        index[key] = len(index)
                        self.layers.append(layer)
                    rows.append(row)
                    columns.append(index[key])
            parts.append((self._axes(segment, column), num_rows, rows, columns))
        self.layer_features = np.array([layer_features(layer) for layer in self.layers])
        self._incidence: list[_Part] = []
        for axes, num_rows, rows, columns in parts:
            part = axes, csr_array((np.ones(len(rows)), (rows, columns)), shape=(num_rows, len(index)))
            joined = _joined(self._incidence[-1], part) if self._incidence else None
            if joined is None:
                self._incidence.append(part)
            else:
                self._incidence[-1] = joined
        self._tables = self.by_layer(self.layer_features)._tables

    @staticmethod
    def _key(layer: Layer) -> tuple[object, ...]:
        return (*layer_shape(layer), layer.in_size)

    def rows(self, layers: Sequence[Layer]) -> list[int]:
        """Where a network's layers stand in `layers`."""
        return [self._index[self._key(layer)] for layer in layers]

    def by_layer(self, values: NDArray[np.float64]) -> LayerSums:
        """Sums of other quantities of the layers, (num_layers, num_outputs) -> (num_archs, num_outputs)."""
        sums = copy(self)
        sums._tables = [(axes, incidence @ values) for axes, incidence in self._incidence]
        return sums

    def counts(self, genes: Genes) -> csr_array:
        """How often each layer is in each network: sparse, (num_archs, num_layers)."""
        columns = np.maximum(genes.T, 0).astype(np.int64)
        total = csr_array((len(genes), len(self.layers)))
        for axes, incidence in self._incidence:
            row = np.zeros(len(genes), dtype=np.int64)
            for column, size in axes:
                row = row * size + columns[column]
            total = total + incidence[row]
        return total

    def weighted(self, coefficients: NDArray[np.float64]) -> LayerSums:
        """Sums of `coefficients` times features: (num_archs, 1) for (num_features,), in a tenth of the time.

        With shape (num_features, num_outputs) so many sums at once, (num_archs, num_outputs).
        """
        return self.by_layer(self.layer_features @ coefficients.reshape(len(FEATURE_NAMES), -1))


def _joined(first: _Part, second: _Part) -> _Part | None:
    """The sum of two parts by all that either depends on; None where that table were too long."""
    axes = list(dict.fromkeys([*first[0], *second[0]]))
    num_rows = math.prod(size for _, size in axes)
    if num_rows > _MOST_ROWS:
        return None
    combinations = np.array(list(product(*(range(size) for _, size in axes)))).reshape(num_rows, len(axes))
    choices = dict(zip(axes, combinations.T, strict=True))

    def rows(part: _Part) -> NDArray[np.int64]:
        row = np.zeros(num_rows, dtype=np.int64)
        for axis in part[0]:
            row = row * axis[1] + choices[axis]
        return row

    return axes, first[1][rows(first)] + second[1][rows(second)]


def layer_shape(layer: Layer) -> tuple[object, ...]:
    """What makes two layers the same but for the size of their feature maps."""
    return (
        layer.kind, layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.groups, layer.activation,
        layer.norm,
    )  # fmt: skip


@lru_cache(maxsize=8)
def feature_sums(space: SearchSpace) -> FeatureSums:
    """The tables of a space, made once: they take a second for the largest spaces."""
    return FeatureSums(space)


def by_name(coefficients: NDArray[np.float64]) -> dict[str, float]:
    """Coefficients (num_features,) as a JSON object of those that are not zero."""
    return {name: float(value) for name, value in zip(FEATURE_NAMES, coefficients, strict=True) if value}


def from_names(coefficients: dict[str, float]) -> NDArray[np.float64]:
    """The inverse of `by_name`.

    Raises:
        InputError: a name that this version does not know.
    """
    values = np.zeros(len(FEATURE_NAMES))
    for name, value in coefficients.items():
        if name not in _INDEX:
            raise InputError(f"unknown feature {name!r}: the predictor comes from another version, fit it anew")
        values[_INDEX[name]] = value
    return values
