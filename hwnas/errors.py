"""The errors that hwnas raises on purpose.

On the command line a `HwnasError` becomes one line on stderr and its exit code. Any other exception is a bug:
it shows its traceback and exits with 1.
"""


def printable(text: str) -> str:
    """A text that may hold what a device said, for a terminal: without characters that it would take for commands."""
    return "".join(character if character.isprintable() else " " for character in text)


class HwnasError(Exception):
    """Base of the errors below, which are the ones to raise. Messages state rule, value and remedy."""

    exit_code = 1


class InputError(HwnasError, ValueError):
    """Bad input from the user: an option, a file, a configuration, an architecture outside its space."""

    exit_code = 2


class LimitError(HwnasError):
    """No child of the space satisfies the limit. The message carries the least possible value."""

    exit_code = 3


class DeviceError(HwnasError):
    """A device cannot be reached, lacks its runtime, or fails to run an artifact."""

    exit_code = 4


class ExportError(HwnasError):
    """A network cannot be written in a format, or the file's outputs differ from the network's."""

    exit_code = 5
