"""What a runtime under Python is; `worker.py` runs it on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol


class Runtime(Protocol):
    """Loads and runs networks of one format. Each file beside this one has a class `Runtime` of this shape.

    The file is sent to the device as it is: it imports the standard library and numpy at its head, the runtime's own
    package inside the methods, and nothing of hwnas (this class only `if TYPE_CHECKING`). It reads with Python 3.8.

    A runtime never falls back in silence: a network that would not run on the hardware or in the precision asked for
    is an error. Any exception is the failure of one network, told with its first line; a crash or a hang of the
    runtime ends only the worker's process.

    Attributes:
        accepts: the format of its files: an `Exporter.format`.
        precisions: of the arithmetic that it knows; files of `int8` are quantised, those of all others are fp32, and
            the runtime casts.
        int8: the precision of the files for int8, where the format knows several (see `OnnxExporter`); else it is left
            out.
        install: what to install on the device, for messages: a pip requirement, or hwnas[extra].
    """

    accepts: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    install: ClassVar[str]

    def __init__(self, precision: str, **options: object) -> None:
        """Take the precision, and the options that the device's file gives.

        Raises:
            ValueError: an option's value is wrong.
        """

    def versions(self) -> dict[str, str]:
        """The runtime's version, and that of what else decides its speed: a driver, the name of a GPU.

        Raises:
            ImportError: it is not installed.
        """

    def load(self, path: str, threads: int) -> Callable[[], object]:
        """Load a network of batch 1, and return a function that runs it once on input set here, to the very end.

        Work on a GPU has ended when it returns.
        """
