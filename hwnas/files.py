"""Files that are complete or not there at all."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place when the block ends without an exception.

        with replacing(path) as temporary:
            temporary.write_bytes(data)

    Raises:
        OSError: the folder is missing or cannot be written; what was at `path` is still there.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets only the owner read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file, and its folder if that is missing.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parts(path: Path) -> list[Path]:
    """The files of a network: `path`, and those beside it that share its stem (ncnn's `m.param` and `m.bin`)."""
    return sorted(file for file in path.parent.glob(f"{glob.escape(path.stem)}.*") if file.stem == path.stem)
