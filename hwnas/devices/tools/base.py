"""What a tool is: a program on the device that times a network's file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hwnas.devices.base import RunTimes, Timing


class Tool(ABC):
    """The command line of a program that times a network's file, and how to read what it prints.

    `ToolDevice` runs `command` once a round and gives its output to `parse`. Both are pure: they can be tested on a
    page of recorded output.

    A tool's figure is a number only where the network ran as asked: a delegate's fall-back, a warning that the work
    went elsewhere, or a line that says it failed is a `DeviceError` from `parse`.

    Args:
        precision: of the arithmetic, one of `precisions`.
        options: what the device's file gives under `options`.

    Attributes:
        runtime: what the program measures.
        accepts: the format of its files: an `Exporter.format`.
        precisions: of the arithmetic that it knows.
        program: where it is on a device, if the device's file does not say.
        install: how it gets there.
    """

    runtime: ClassVar[str]
    accepts: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
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
            network: the network's file there.
            timing: how long to run; what the program has no option for is left to it.
            folder: a private one there, for what the program wants to keep between rounds.
        """

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
