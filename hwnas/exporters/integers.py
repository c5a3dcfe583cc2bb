"""int8 as LiteRT and XNNPACK have it: activations on a grid a tensor, weights on one an output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The unit of a weight times that of its layer's input, over the output's, at least: XNNPACK refuses less than 2^-32,
# and channels that are nothing but their bias would overflow its 32 bits.
LEAST_MULTIPLIER = 2.0**-20


@dataclass(frozen=True, slots=True)
class Grid:
    """What the integers of a tensor stand for: `scale * (integer - zero_point)`.

    Attributes:
        signed: int8; else uint8.
    """

    scale: float
    zero_point: int
    signed: bool = True

    @classmethod
    def of(cls, low: float, high: float) -> Grid:
        """The finest one of int8 that has `low`, 0 and `high`; 0, which pads, is met exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32((high - low) / 255)) or 1.0
        return cls(scale, max(-128, min(127, round(-128 - low / scale))))


LOGISTIC = Grid(1 / 256, -128)  # demanded of a sigmoid's output
PIXELS = Grid(1.0, 0, signed=False)


class Integers(NamedTuple):
    """A layer's weights and bias.

    Attributes:
        weight: int8, of the weight's shape; symmetric.
        scale: of the weights, float32 (num_channels,), or (1,).
        bias: int32 (num_channels,).
        units: of the bias, the input's scale times the weight's, float64.
    """

    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    units: NDArray[np.float64]

    @classmethod
    def of(cls, weight: NDArray[Any], bias: NDArray[Any], axis: int | None, source: Grid, output: Grid) -> Integers:
        """In integers.

        Args:
            weight: floating-point numbers.
            bias: (num_channels,).
            axis: of the weight's output channels; None for one scale for all.
            source: the grid of the layer's input.
            output: that of what it makes, before its activation.
        """
        others = None if axis is None else tuple(other for other in range(weight.ndim) if other != axis)
        largest = np.maximum(weight.max(axis=others, keepdims=True), -weight.min(axis=others, keepdims=True))
        scale = np.maximum(largest / 127, LEAST_MULTIPLIER * output.scale / source.scale).astype(np.float32)
        numbers = weight / scale
        np.rint(numbers, out=numbers)
        units = source.scale * scale.reshape(-1).astype(np.float64)
        whole = np.clip(np.rint(bias / units), -(2**31) + 1, 2**31 - 1)
        return cls(numbers.astype(np.int8), scale.reshape(-1), whole.astype("<i4"), units)
