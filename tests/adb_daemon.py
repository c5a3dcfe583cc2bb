"""A phone on loopback: a daemon that speaks adb's protocol, so that the real adb client can be tested.

Written from AOSP's packages/modules/adb: docs/dev/protocol.md (messages), sync.md (files), shell_service.h (shell v2)
and daemon/shell_service.cpp (a process whose connection breaks gets SIGHUP, and its pipes are closed). Shell commands
are run on this machine, and files are where they are.
"""

import errno
import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

CHUNK = 64 * 1024

# A message: command, two arguments, length and sum of the payload (not used), and the command's complement.
_MESSAGE = struct.Struct("<4s5I")
_VERSION = 0x01000001  # without sums
_TOKEN, _SIGNATURE = 1, 2  # of AUTH

# A packet of shell v2: which stream, and its length.
_PACKET = struct.Struct("<BI")
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)

# A request or an answer of sync: what, and a length or another number.
_SYNC = struct.Struct("<4sI")


class Phone:
    """A phone that `adb connect SERIAL` reaches, while it is plugged in.

    Args:
        model: as `adb devices -l` shows it.
        programs: a folder that comes first on the phone's PATH.
        authorized: whether somebody confirmed the dialog.
        capacity: bytes that its disk takes.
    """

    def __init__(self, model: str, programs: Path, *, authorized: bool = True, capacity: float = float("inf")) -> None:
        self.model, self.authorized, self.capacity = model, authorized, capacity
        self.env = {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[_Connection] = []
        self._port = 0
        self.plug()

    def __enter__(self) -> "Phone":
        return self

    def __exit__(self, *_: object) -> None:
        self.unplug()
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def banner(self) -> bytes:
        features = f"ro.product.name=fake;ro.product.model={self.model};ro.product.device=fake;features=shell_v2,cmd"
        return f"device::{features}".encode()

    def plug(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def unplug(self) -> None:
        """Break all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes up the thread that accepts
        self._listener.close()
        while self._connections:
            self._connections.pop().close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection = _Connection(self, listener.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class _Connection:
    """The adb server's connection, which carries all its streams."""

    def __init__(self, phone: Phone, sock: socket.socket) -> None:
        self._phone, self._socket = phone, sock
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lock = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._opened = 0

    def serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                command, arg0, arg1, length, _, _ = _MESSAGE.unpack(self._read(_MESSAGE.size))
                self._handle(command, arg0, arg1, self._read(length))
        self.close()

    def send(self, command: bytes, arg0: int, arg1: int, payload: bytes = b"") -> None:
        magic = int.from_bytes(command, "little") ^ 0xFFFFFFFF
        header = _MESSAGE.pack(command, arg0, arg1, len(payload), 0, magic)
        with self._lock:
            self._socket.sendall(header + payload)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for stream in list(self._streams.values()):
            stream.end()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self._socket.recv(count - len(data)) or _raise_eof()
        return data

    def _handle(self, command: bytes, theirs: int, ours: int, payload: bytes) -> None:
        if command == b"CNXN" and self._phone.authorized:
            self.send(b"CNXN", _VERSION, CHUNK, self._phone.banner)
        elif command == b"CNXN" or (command == b"AUTH" and theirs == _SIGNATURE):
            self.send(b"AUTH", _TOKEN, 0, os.urandom(20))  # then they show their key, and the phone a dialog
        elif command == b"OPEN":
            self._opened += 1
            stream = self._streams[self._opened] = _Stream(self, self._opened, theirs)
            service = payload.rstrip(b"\0").decode()
            threading.Thread(target=self._serve, args=[stream, service], daemon=True).start()
        elif ours in self._streams:  # else it is closed on this side, and they do not know yet
            stream = self._streams[ours]
            if command == b"WRTE":
                stream.feed(payload)
                self.send(b"OKAY", ours, theirs)
            elif command == b"OKAY":
                stream.acknowledge()
            elif command == b"CLSE":
                stream.end()

    def _serve(self, stream: "_Stream", service: str) -> None:
        kind, _, argument = service.partition(":")
        kind, *options = kind.split(",")
        with suppress(OSError, EOFError):
            if kind in ("shell", "exec"):
                stream.accept()
                _Shell(self._phone, stream, argument, "v2" in options).serve()
            elif kind == "sync":
                stream.accept()
                _Sync(self._phone, stream).serve()
            stream.close()
        stream.end()
        del self._streams[stream.id]


class _Stream:
    """One service's bytes. Reading and writing raise an `EOFError` when the other side or the connection has gone."""

    def __init__(self, connection: _Connection, id: int, theirs: int) -> None:
        self._connection, self.id, self._theirs = connection, id, theirs
        self._received: queue.Queue[bytes] = queue.Queue()
        self._rest = b""
        self._acknowledged = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._ended = False

    def accept(self) -> None:
        self._connection.send(b"OKAY", self.id, self._theirs)

    def read(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._rest += self._received.get() or _raise_eof()
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def read_some(self) -> bytes:
        return self._received.get() or _raise_eof()

    def write(self, data: bytes) -> None:
        with self._lock:
            for start in range(0, len(data), CHUNK):
                if self._ended:
                    raise EOFError
                self._connection.send(b"WRTE", self.id, self._theirs, data[start : start + CHUNK])
                self._acknowledged.acquire()

    def close(self) -> None:
        if not self._ended:
            self._connection.send(b"CLSE", self.id, self._theirs)

    def feed(self, data: bytes) -> None:
        self._received.put(data)

    def acknowledge(self) -> None:
        self._acknowledged.release()

    def end(self) -> None:
        self._ended = True
        self._received.put(b"")
        self._acknowledged.release()


class _Shell:
    """A command. By version 2 of the protocol its streams are apart, and its status is passed on."""

    def __init__(self, phone: Phone, stream: _Stream, command: str, v2: bool) -> None:
        self._stream, self._v2 = stream, v2
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd="/",
            env=phone.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if v2 else subprocess.STDOUT,
            start_new_session=True,
        )
        phone.processes.append(self._process)

    def serve(self) -> None:
        process = self._process
        pumps = [threading.Thread(target=self._pump, args=[process.stdout, _STDOUT])]
        if self._v2:
            pumps.append(threading.Thread(target=self._pump, args=[process.stderr, _STDERR]))
        feeder = threading.Thread(target=self._feed, daemon=True)
        for thread in (feeder, *pumps):
            thread.start()
        for pump in pumps:
            pump.join()
        status = process.wait()
        if self._v2:
            self._send(_EXIT, bytes([status if status >= 0 else 128 - status]))
        self._stream.close()
        self._stream.end()
        feeder.join()

    def _pump(self, pipe, stream: int) -> None:
        with pipe, suppress(OSError, EOFError):
            while data := pipe.read1(CHUNK):
                self._send(stream, data)

    def _send(self, stream: int, data: bytes) -> None:
        self._stream.write(_PACKET.pack(stream, len(data)) + data if self._v2 else data)

    def _feed(self) -> None:
        stdin = self._process.stdin
        try:
            for data in self._input():
                stdin.write(data)
                stdin.flush()
        except EOFError:
            self._process.send_signal(signal.SIGHUP)  # does nothing where it has ended
        except BrokenPipeError:
            pass  # it does not read
        with suppress(BrokenPipeError):
            stdin.close()

    def _input(self) -> Iterator[bytes]:
        while not self._v2:
            yield self._stream.read_some()
        while True:
            stream, length = _PACKET.unpack(self._stream.read(_PACKET.size))
            data = self._stream.read(length)
            if stream == _STDIN:
                yield data
            elif stream == _CLOSE_STDIN:
                self._process.stdin.close()


class _Sync:
    """Copies files."""

    def __init__(self, phone: Phone, stream: _Stream) -> None:
        self._phone, self._stream = phone, stream

    def serve(self) -> None:
        answers = {b"STAT": self._stat, b"LIST": self._list, b"SEND": self._receive, b"RECV": self._send}
        while True:
            what, length = _SYNC.unpack(self._stream.read(_SYNC.size))
            if what == b"QUIT":
                return
            path = self._stream.read(length).decode()
            try:
                answers[what](path)
            except OSError as error:
                self._fail(error.strerror)

    def _fail(self, reason: str) -> None:
        self._stream.write(_SYNC.pack(b"FAIL", len(reason)) + reason.encode())

    def _stat(self, path: str) -> None:
        try:
            found = Path(path).lstat()
        except OSError:
            numbers = (0, 0, 0)
        else:
            numbers = (found.st_mode, found.st_size, int(found.st_mtime))
        self._stream.write(struct.pack("<4s3I", b"STAT", *numbers))

    def _list(self, path: str) -> None:
        for child in Path(path).iterdir():
            found, name = child.lstat(), child.name.encode()
            head = struct.pack("<4s4I", b"DENT", found.st_mode, found.st_size, int(found.st_mtime), len(name))
            self._stream.write(head + name)
        self._stream.write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))

    def _send(self, path: str) -> None:
        with Path(path).open("rb") as file:
            while data := file.read(CHUNK):
                self._stream.write(_SYNC.pack(b"DATA", len(data)) + data)
        self._stream.write(_SYNC.pack(b"DONE", 0))

    def _receive(self, target: str) -> None:
        name, _, mode = target.rpartition(",")
        path, chunks = Path(name), self._chunks()
        try:
            with path.open("wb") as file:
                for data in chunks:
                    if len(data) > self._phone.capacity:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._phone.capacity -= file.write(data)
            path.chmod(stat.S_IMODE(int(mode)))
        except OSError as error:
            path.unlink(missing_ok=True)
            self._fail(error.strerror)
            for _ in chunks:  # to the end: they may not read before
                continue
        else:
            self._stream.write(_SYNC.pack(b"OKAY", 0))

    def _chunks(self) -> Iterator[bytes]:
        while True:
            what, length = _SYNC.unpack(self._stream.read(_SYNC.size))  # with DONE comes the time of the file
            if what == b"DONE":
                return
            yield self._stream.read(length)


def _raise_eof() -> NoReturn:
    raise EOFError
