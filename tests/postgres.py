"""A private PostgreSQL server on the loopback, for tests: `with Postgres() as server: ... server.url() ...`.

The server refuses to run as root: root starts it as `postgres`, or else as `nobody`; anybody else as himself. Whoever
is on this machine may connect while it runs.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest

_STOP_S = 20.0


def _programs() -> Path | None:
    """The folder of `initdb` and `postgres`: Debian keeps it off the path; the newest version."""
    on_path = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = [path for path in folders if (path / "postgres").exists()]
    return found[-1] if found else on_path and Path(on_path).resolve().parent


def _user() -> pwd.struct_passwd | None:
    """Who runs the server; None: ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


class Postgres:
    """Starts when it is entered, and is gone with its data when it is left.

    Args:
        durable: whether a commit waits for the disk, as on a real server; tests need not wait.
    """

    def __init__(self, durable: bool = False) -> None:
        self._durable = durable

    def __enter__(self) -> Self:
        programs = _programs()
        if programs is None:
            pytest.skip("no PostgreSQL server: apt-get install postgresql")
        user = _user()
        self._folder = Path(tempfile.mkdtemp(prefix="hwnas-pg-"))
        options: dict[str, Any] = {"cwd": self._folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
        if user is not None:
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        try:
            data = self._folder / "data"
            words = [programs / "initdb", "-D", data, "-U", "hwnas", "--auth=trust", "--encoding=UTF8", "--no-sync"]
            done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
            assert done.returncode == 0, done.stderr
            self._start(programs, data, options)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def _start(self, programs: Path, data: Path, options: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self._folder}
        settings |= {} if self._durable else {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        log = self._folder / "log"
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [programs / "postgres", "-D", data, *words], stdout=file, stderr=subprocess.STDOUT, **options
            )
        ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        deadline = time.monotonic() + 30
        while subprocess.run(ready, check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise AssertionError(log.read_text())
            time.sleep(0.1)

    def url(self, name: str = "postgres", driver: str = "") -> str:
        """The URL of a database, made if it is not there; `driver` such as `+psycopg`."""
        import psycopg

        server = f"postgresql://hwnas@127.0.0.1:{self.port}"
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            query = "SELECT 1 FROM pg_database WHERE datname = %s"
            if connection.execute(query, (name,)).fetchone() is None:
                connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        return f"postgresql{driver}://hwnas@127.0.0.1:{self.port}/{name}"

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGINT)  # ends all connections
        try:
            self._process.wait(_STOP_S)
        finally:
            self._process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)
