"""Processes that prepare the parts of a batch side by side, in memory that they share with the one that trains.

Threads would take turns with the training loop, as Python runs one of them at a time. The processes are forked, so the
images' names and the shared memory are simply there; nothing is sent but the numbers of the steps.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Self

import torch
from torch import Tensor

from hwnas.errors import InputError
from hwnas.machine import num_processors

NUM_SLOTS = 2  # batches in preparation at a time
PARENT_CHECK_S = 1.0

Fill = Callable[[int, int, int], Tensor]


def num_available() -> int:
    """How many processes can work at a time; 0 where they cannot be forked (only Linux does it safely)."""
    return num_processors() if sys.platform == "linux" else 0


class Workers:
    """Processes that prepare the batches of one step after the other.

        with Workers(fill, shape, first_step=0, num_workers=4) as workers:
            batch = workers.next()

    Leaving the block ends them. They ignore Ctrl-C, which is for the process that trains, and end within seconds
    when that is killed.

    Args:
        fill: (step, start, stop) to the images from `start` to `stop` of the step's batch,
            (stop - start, channels, size, size) uint8; called in the processes.
        shape: (batch_size, channels, size, size) of a batch.
        first_step: the step of the first batch.
        num_workers: processes; at most one an image is started.
    """

    def __init__(self, fill: Fill, shape: tuple[int, ...], *, first_step: int, num_workers: int) -> None:
        # Not from /dev/shm, which is small in containers.
        memory = mmap.mmap(-1, NUM_SLOTS * math.prod(shape))
        batch_size, channels, *size = shape
        slots = torch.frombuffer(memory, dtype=torch.uint8).view(NUM_SLOTS, batch_size, *size, channels)
        self.slots = slots.permute(0, 1, 4, 2, 3)
        self.step = first_step
        context = multiprocessing.get_context("fork")
        num_workers = min(num_workers, shape[0])
        edges = [shape[0] * number // num_workers for number in range(num_workers + 1)]
        self._connections: list[Connection] = []
        self._processes = []
        for start, stop in pairwise(edges):
            ours, theirs = context.Pipe()
            arguments = theirs, fill, self.slots, start, stop, os.getpid()
            process = context.Process(target=_work, args=arguments, daemon=True, name="hwnas-loader")
            with warnings.catch_warnings():
                # Python 3.12 warns that other threads may hold locks; the children use none but their own.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for step in range(first_step, first_step + NUM_SLOTS):
            self._ask(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            process.close()
            connection.close()

    def next(self) -> Tensor:
        """The batch of the next step, of the shape that was asked for, uint8.

        Raises:
            InputError: an image cannot be read, or a process was killed.
        """
        for process, connection in zip(self._processes, self._connections, strict=True):
            try:
                problem, is_bug = connection.recv()
            except (EOFError, ConnectionError):
                process.join()
                raise InputError(
                    f"a process that prepares images was killed (exit code {process.exitcode}), for lack of memory "
                    "perhaps: use fewer, or a smaller batch"
                ) from None
            if is_bug:
                raise RuntimeError(problem)
            if problem is not None:
                raise InputError(problem)
        batch = self.slots[self.step % NUM_SLOTS].clone()
        self._ask(self.step + NUM_SLOTS)
        self.step += 1
        return batch

    def _ask(self, step: int) -> None:
        for connection in self._connections:
            with suppress(ConnectionError):  # it was killed, which shows when its answer is missing
                connection.send(step)


def _work(connection: Connection, fill: Fill, slots: Tensor, start: int, stop: int, parent: int) -> None:
    """Fill `start` to `stop` of the slot of each step that is asked for, and answer (problem, whether it is a bug)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        while not connection.poll(PARENT_CHECK_S):
            if os.getppid() != parent:
                return
        step = connection.recv()
        try:
            slots[step % NUM_SLOTS, start:stop] = fill(step, start, stop)
            answer: tuple[str | None, bool] = None, False
        except InputError as error:
            answer = str(error), False
        except Exception:
            answer = traceback.format_exc(), True
        connection.send(answer)
