"""How far the logits of a file may be from those of its network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config


@dataclass(frozen=True, slots=True)
class Gate:
    """What a file must keep to be shipped.

    Attributes:
        max_abs_diff: largest difference of a logit; None where rounding is meant.
        correlation: of all logits, at least.
        top1_agreement: share of images with the same highest logit, at least.
    """

    max_abs_diff: float | None
    correlation: float
    top1_agreement: float


# fp32: runtimes differ by about 1e-5 in the order of their sums. fp16: 11 bits of mantissa. int8: the demo's children
# have correlations of 0.999 and agree on 98% of the top classes (docs/export.md); deep networks lose more.
_INT8 = Gate(None, 0.98, 0.8)
GATES = {"fp32": Gate(1e-3, 0.99999, 1.0), "fp16": Gate(None, 0.9995, 0.98), "int8": _INT8, "int8-symmetric": _INT8}


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far a file's logits are from others, and how far they may be.

    Attributes:
        runtime: where the file ran.
        num_images: real images compared.
        max_abs_diff: largest difference of a logit.
        correlation: of all logits.
        top1_agreement: share of images with the same highest logit, 0 to 1.
        max_allowed: of `max_abs_diff`; None for any.
        least_correlation, least_agreement: of the two others.
        passed: whether the file may be shipped.
    """

    runtime: str
    num_images: int
    max_abs_diff: float
    correlation: float
    top1_agreement: float
    max_allowed: float | None
    least_correlation: float
    least_agreement: float
    passed: bool

    @classmethod
    def of(cls, expected: NDArray[np.float32], found: NDArray[np.float32], precision: str, runtime: str) -> Parity:
        """Compare logits, both (num_images, num_classes), by the `GATES` of a precision."""
        gate = GATES[precision]
        if expected.shape != found.shape or not np.isfinite(found).all():
            difference, alike, agreement = np.inf, 0.0, 0.0
        else:
            difference = float(np.abs(expected - found).max())
            alike = correlation(expected, found)
            agreement = float((expected.argmax(1) == found.argmax(1)).mean())
        small = gate.max_abs_diff is None or difference < gate.max_abs_diff
        return cls(
            runtime=runtime,
            num_images=len(expected),
            max_abs_diff=difference,
            correlation=alike,
            top1_agreement=agreement,
            max_allowed=gate.max_abs_diff,
            least_correlation=gate.correlation,
            least_agreement=gate.top1_agreement,
            passed=bool(small and alike >= gate.correlation and agreement >= gate.top1_agreement),
        )

    def __str__(self) -> str:
        allowed = "" if self.max_allowed is None else f" (allowed {self.max_allowed:g})"
        return (
            f"logits differ by up to {self.max_abs_diff:.3g}{allowed}, their correlation is {self.correlation:.5f} (at "
            f"least {self.least_correlation:g}), the top class agrees on {self.top1_agreement:.1%} of "
            f"{self.num_images} images (at least {self.least_agreement:.0%})"
        )


def correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Pearson's, of all values; 1 where both are constant and equal."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float(np.array_equal(one, other))
