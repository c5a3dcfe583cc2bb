"""The options of limits, which several commands take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from hwnas.errors import InputError

if TYPE_CHECKING:
    pass


def count(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    """The value of an option that takes `600M`, `0.6G`, `500k` or `6e8`."""
    if text is None:
        return None
    factor = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:])
    try:
        return float(text) if factor is None else factor * float(text[:-1])
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number such as 600M, 0.6G or 6e8") from None


def limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all limits; the function gets them as `devices`, a tuple of names, and `limits`, one of `Limit`s.

    `--latency-ms` and `--energy-mj` are given once for each `--device`, in the same order, or once for all of them.
    Limits on devices come first, those of the first device before those of the second.
    """

    @wraps(function)
    def with_limits(
        *args: Any,
        devices: tuple[str, ...],
        latency_ms: tuple[float, ...],
        energy_mj: tuple[float, ...],
        max_macs: float | None,
        max_params: float | None,
        max_size_mb: float | None,
        max_memory_mb: float | None,
        **options: Any,
    ) -> Any:
        from hwnas.searching import limits as kinds

        on_devices = [
            *(kinds.LatencyLimit(*pair) for pair in _per_device("--latency-ms", latency_ms, devices)),
            *(kinds.EnergyLimit(*pair) for pair in _per_device("--energy-mj", energy_mj, devices)),
        ]
        on_devices.sort(key=lambda limit: devices.index(limit.device))
        on_layers: dict[Callable[[float], kinds.Limit], float | None] = {
            kinds.MacsLimit: max_macs,
            kinds.ParamsLimit: max_params,
            kinds.SizeLimit: max_size_mb,
            kinds.MemoryLimit: max_memory_mb,
        }
        limits = (*on_devices, *(kind(bound) for kind, bound in on_layers.items() if bound is not None))
        return function(*args, devices=devices, limits=limits, **options)

    for option in reversed((
        click.option("--device", "devices", metavar="NAME", multiple=True, help="See `hwnas devices`. May repeat."),
        click.option("--latency-ms", type=float, multiple=True, help="At most so long: one, or one for each --device."),
        click.option("--energy-mj", type=float, multiple=True, help="At most so many millijoules; likewise."),
        click.option("--max-macs", metavar="COUNT", callback=count, help="Multiply-adds, at most: 600M."),
        click.option("--max-params", metavar="COUNT", callback=count, help="Parameters, at most: 5M."),
        click.option("--max-size-mb", type=float, help="Of the ONNX file in float32, at most (10^6 bytes)."),
        click.option("--max-memory-mb", type=float, help="Of float32 activations at any time, at most (10^6 bytes)."),
    )):  # fmt: skip
        with_limits = option(with_limits)
    return with_limits


def _per_device(option: str, bounds: Sequence[float], devices: Sequence[str]) -> Iterator[tuple[str, float]]:
    if len(set(devices)) < len(devices):
        raise InputError(f"--device {' --device '.join(devices)}: name each device once")
    if bounds and not devices:
        raise InputError(f"{option} {bounds[0]:g}: on which device? Name it with --device")
    if len(bounds) not in (0, 1, len(devices)):
        raise InputError(
            f"{option} is given {len(bounds)} times, --device {len(devices)} times: give one for each device, in the "
            "same order, or one for all"
        )
    return zip(devices, list(bounds) * (len(devices) if len(bounds) == 1 else 1), strict=False)
