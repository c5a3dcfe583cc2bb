"""A database that many processes use at the same time: how it is reached, and who of them may do what."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from hwnas.errors import InputError

BUSY_TIMEOUT_S = 60.0
POLL_S = 0.5  # for a claim that another process has

# So the server notices within two minutes that a worker's machine has gone, and frees what it had claimed; a process
# that dies on a machine that lives is noticed at once.
_KEEPALIVE = "-c tcp_keepalives_idle=60 -c tcp_keepalives_interval=20 -c tcp_keepalives_count=3"


def database_url(given: str | Path) -> sa.URL:
    """A database's URL with the driver that hwnas uses; a path is an SQLite file.

    Raises:
        InputError: it is no URL.
    """
    try:
        url = sa.make_url(f"sqlite:///{given}" if isinstance(given, Path) else given)
    except sa.exc.ArgumentError:
        raise InputError(f"{given!r} is no database URL, such as sqlite:////data/hwnas.db") from None
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def connect_arguments(url: sa.URL) -> dict[str, Any]:
    """What SQLAlchemy's engines connect with, ours and Optuna's."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": BUSY_TIMEOUT_S}
    if url.get_backend_name() == "postgresql" and "options" not in url.query:
        return {"options": _KEEPALIVE}
    return {}


class Database:
    """A database, SQLite or PostgreSQL; a context manager that closes it.

    Every statement is a transaction of its own: nothing to lose at a kill, nothing to upgrade or to retry.

    Args:
        url: an SQLAlchemy URL such as `sqlite:////data/run/hwnas.db` or `postgresql://host/hwnas`, or the path of an
            SQLite file, made if it is not there.

    Raises:
        InputError: it is damaged, is not one, or cannot be reached.
    """

    def __init__(self, url: str | Path) -> None:
        self._url = database_url(url)
        self._sqlite = self._url.get_backend_name() == "sqlite"
        with self._explained():
            self._engine = sa.create_engine(
                self._url, connect_args=connect_arguments(self._url), isolation_level="AUTOCOMMIT"
            )
        try:
            with self._connection() as connection:
                self._prepare(connection)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The file, or the URL without its password: for messages."""
        if self._sqlite:
            return str(self._url.database)
        return self._url.render_as_string(hide_password=True)

    def _prepare(self, connection: sa.Connection) -> None:
        """Make it ready for use; subclasses add their tables."""
        if not self._sqlite:
            return
        found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise InputError(self._damaged(str(found).splitlines()[-1]))
        if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")

    # ------------------------------------------------------------ claims

    @contextmanager
    def claim(self, what: str) -> Iterator[bool]:
        """Hold something that only one of all who use this database may have at a time.

            with store.claim("child 7") as mine:
                if mine: ...

        It is let go at the end, and by the death of the process: the lock belongs to an open file beside the database
        (SQLite), or to the connection to the server (PostgreSQL: `pg_try_advisory_lock`). So there are no heartbeats
        and no clocks to compare, and what a killed process had claimed is free at once.

        Args:
            what: its name.

        Yields:
            Whether it is ours now; False where another process or thread has it.

        Raises:
            InputError: the database cannot be used.
        """
        digest = hashlib.sha256(what.encode()).digest()
        if self._sqlite:
            with _locked_file(Path(f"{self._url.database}-claim-{digest.hex()[:16]}")) as mine:
                yield mine
            return
        key = int.from_bytes(digest[:8], signed=True)
        with self._connection() as connection:
            mine = connection.execute(sa.select(sa.func.pg_try_advisory_lock(key))).scalar_one()
            try:
                yield mine
            finally:
                if mine:
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(key)))

    @contextmanager
    def claimed(self, what: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait until something can be claimed, and hold it: see `claim`.

        Args:
            what: its name.
            waiting: called now and then while another has it.
        """
        while True:
            with self.claim(what) as mine:
                if mine:
                    yield
                    return
            waiting()
            time.sleep(POLL_S)

    # ------------------------------------------------------------ the database

    def _insert_or_ignore(
        self, connection: sa.Connection, table: sa.Table, rows: dict[str, Any] | list[dict[str, Any]]
    ) -> None:
        insert = sqlite.insert if self._sqlite else postgresql.insert
        connection.execute(insert(table).values(rows).on_conflict_do_nothing())

    @contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong with the database, as an `InputError`."""
        try:
            yield
        except sa.exc.OperationalError as error:  # missing folder, full disk, no rights, server away
            raise InputError(f"{self.name}: the database cannot be used: {_reason(error)}") from None
        except sa.exc.DatabaseError as error:
            if not self._sqlite:
                raise InputError(f"{self.name}: the database cannot be used: {_reason(error)}") from None
            raise InputError(self._damaged(_reason(error))) from None
        except ModuleNotFoundError as error:
            remedy = ": pip install 'hwnas[postgresql]'" if error.name == "psycopg" else ""
            raise InputError(f"{self._url}: {error}{remedy}") from None
        except sa.exc.ArgumentError as error:
            raise InputError(f"{self._url}: {error}") from None

    def _damaged(self, reason: str) -> str:
        remedy = "restore it from a backup"
        if self._sqlite:
            remedy = f"move it away to start anew, or try `sqlite3 {self.name} .recover | sqlite3 rescued.db`"
        return f"{self.name}: the database is damaged ({reason}): {remedy}"

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reason(error: sa.exc.DatabaseError) -> str:
    return str(error.orig).strip().splitlines()[0]


@contextmanager
def _locked_file(path: Path) -> Iterator[bool]:
    """Whether a lock file could be had; it is gone again afterwards."""
    try:
        file = path.open("a")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if os.fstat(file.fileno()).st_nlink == 0:  # its holder removed it between our opening and our locking it
            yield False
            return
        try:
            yield True
        finally:
            path.unlink()
