"""Decoded and resized images in files that are mapped into memory, shared by commands and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwnas.files import replacing

PREPARED_BYTES = 8 * 2**30  # of all files in a folder


def prepared(path: Path, shape: tuple[int, ...], fill: Callable[[NDArray[np.uint8]], None]) -> Tensor | None:
    """The images in a file, which is made if it is missing or damaged, and is complete or not there at any time.

    Two processes may make it at once: one's file takes the place of the other's, and both hold the same.

    Args:
        path: an .npy file; its folder is made, and the files made first are deleted where it would pass
            `PREPARED_BYTES` (who has one mapped keeps it).
        shape: of the images.
        fill: writes them into an array of that shape.

    Returns:
        uint8, to be read only. None where the folder cannot be written or has no room for so much.
    """
    num_bytes = math.prod(shape)
    images = _mapped(path, shape)
    if images is None and num_bytes <= PREPARED_BYTES:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_room(path.parent, num_bytes)
            with replacing(path) as temporary:
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
                fill(array)
                array.flush()
        except OSError:  # full disk, no rights
            return None
        images = _mapped(path, shape)
    return images


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    try:
        # Copy on write, though nobody writes: torch warns of memory that it could not write to.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = images.shape == shape and images.dtype == np.uint8 and images.flags.c_contiguous
    return torch.from_numpy(images) if sound else None


def _make_room(folder: Path, num_bytes: int) -> None:
    files = [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in folder.glob("[!.]*.npy")]
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total + num_bytes <= PREPARED_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
