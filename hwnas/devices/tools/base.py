"""What a tool is: a program on the device that times a network's file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, ClassVar

from hwnas.devices.base import RunTimes, Timing


class Tool(ABC):
    """The command line of a program that times a network's file, and how to read what it prints.

    `ToolDevice` runs `command` once a round and gives its output to `parse`. Both are pure: they can be tested on a
    page of recorded output. Where a network has to be compiled first, it runs `build_command` ahead of its first round.

    A tool's figure is a number only where the network ran as asked: a delegate's fall-back, a warning that the work
    went elsewhere, or a line that says it failed is a `DeviceError` from `parse`.

    Args:
        precision: of the arithmetic, one of `precisions`.
        options: what the device's file gives under `options`.

    Attributes:
        runtime: what the program measures.
        accepts: the format of its files: an `Exporter.format`.
        precisions: of the arithmetic that it knows.
        int8: the precision of the files for int8, where the format knows several: see `OnnxExporter`.
        program: where it is on a device, if the device's file does not say.
        install: how it gets there.
    """

    runtime: ClassVar[str]
    accepts: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    int8: ClassVar[str] = "int8"
    program: ClassVar[str]
    install: ClassVar[str]

    def __init__(self, precision: str, **options: Any) -> None:
        self.precision = precision
        if options:
            raise ValueError(f"{', '.join(options)}: {type(self).__name__} has no such options")

    @abstractmethod
    def command(self, program: str, network: str, timing: Timing, folder: str) -> Sequence[str]:
        """The command line of one round.

        Args:
            program: the program on the device.
            network: the network's file there, or what `build_command` made of it.
            timing: how long to run; what the program has no option for is left to it.
            folder: a private one there, for what the program wants to keep between rounds.
        """

    def build_command(self, program: str, network: str, built: str, folder: str) -> Sequence[str] | None:
        """The command line that compiles a network; None where the program runs networks as they are.

        Args:
            program: the program on the device.
            network: the network's file there.
            built: the path there for what is compiled.
            folder: as for `command`.
        """
        return None

    @abstractmethod
    def parse(self, output: str) -> RunTimes:
        """What the program printed (stdout, then stderr), as times in milliseconds.

        Where it prints one figure for all runs, that is the one time, `facts["runs"]` says how many it stands for, and
        `spread` how far they lie apart, if that is known.

        Raises:
            DeviceError: it failed, the network did not run as asked, or there are no times in it.
        """

    def version_command(self, program: str) -> Sequence[str]:
        """A command that prints the program's version, or that it is there."""
        return ["sha256sum", program]

    def parse_version(self, output: str) -> Mapping[str, str]:
        """What `version_command` printed, as versions; by default the first digits of the program's hash.

        Raises:
            DeviceError: it is not what was expected.
        """
        return {self.runtime: output.split()[0][:12] if output.split() else "unknown"}


def spread_of_percentile(median: float, share: float, percentile: float) -> float:
    """Inter-quartile range over median, from the median and one percentile above it.

    As if the runs below that percentile were normally distributed; exact for symmetric ones where it is the third
    quartile. Unlike a standard deviation, it does not depend on the slowest runs.

    Args:
        median: of the runs.
        share: of the runs that are at most `percentile`, between 0.5 and 1.
        percentile: in the unit of `median`.
    """
    normal = NormalDist()
    return 2 * normal.inv_cdf(0.75) / normal.inv_cdf(share) * (percentile - median) / median
