"""The run's database: every measurement and every evaluation, committed as soon as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from hwnas.config import check
from hwnas.database import Database
from hwnas.devices.base import RunTimes, Timing
from hwnas.errors import InputError
from hwnas.measurement import Measurement, Role, usual_ms
from hwnas.space import Architecture

SCHEMA = 1

# Fields of a measurement whose columns hold them as they are.
_PLAIN = ("device", "runtime", "precision", "reference", "role", "error", "write_s", "run_s")

_metadata = sa.MetaData()

_schema = sa.Table("hwnas_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))

_measurements = sa.Table(
    "hwnas_measurements",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("protocol", sa.String(12), nullable=False, index=True),
    sa.Column("arch_id", sa.String(12), nullable=False),
    sa.Column("arch", sa.JSON, nullable=False),
    sa.Column("device", sa.String, nullable=False),
    sa.Column("runtime", sa.String, nullable=False),
    sa.Column("versions", sa.JSON, nullable=False),
    sa.Column("precision", sa.String, nullable=False),
    sa.Column("timing", sa.JSON, nullable=False),
    sa.Column("reference", sa.String, nullable=False),
    sa.Column("role", sa.String, nullable=False),
    sa.Column("times", sa.LargeBinary, nullable=False),  # float64, ms, all rounds on end
    sa.Column("preempted", sa.LargeBinary, nullable=False),  # one bit a time
    sa.Column("rounds", sa.JSON, nullable=False),  # of each round the number of times, its facts, and its spread
    sa.Column("reference_ms", sa.JSON, nullable=False),
    sa.Column("error", sa.String),
    sa.Column("write_s", sa.Float, nullable=False),
    sa.Column("run_s", sa.Float, nullable=False),
    sa.Column("created", sa.String, nullable=False),  # ISO 8601, UTC
)

_evaluations = sa.Table(
    "hwnas_evaluations",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("arch_id", sa.String(12), nullable=False),
    sa.Column("arch", sa.JSON, nullable=False),
    sa.Column("weights", sa.String, nullable=False),
    sa.Column("split", sa.String, nullable=False),
    sa.Column("protocol", sa.String, nullable=False),
    sa.Column("accuracy", sa.Float, nullable=False),
    sa.Column("num_images", sa.Integer, nullable=False),
    sa.Column("loss", sa.Float, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("created", sa.String, nullable=False),
    sa.UniqueConstraint("weights", "split", "protocol", "arch_id"),
)

_studies = sa.Table(
    "hwnas_studies",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("question", sa.JSON, nullable=False),
    sa.Column("known", sa.JSON, nullable=False),  # [arch, accuracy] of each child known before
)

_children = sa.Table(
    "hwnas_children",
    _metadata,
    sa.Column("study", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("arch", sa.JSON, nullable=False),
    sa.Column("begun", sa.Boolean, nullable=False),
    sa.Column("accuracy", sa.Float),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The accuracy of a child with a supernet's weights.

    Attributes:
        arch: the child.
        weights: what identifies the supernet's weights.
        split: the images it was evaluated on, such as `validation`.
        protocol: what else the accuracy depends on: calibration images, number of images, seed.
        accuracy: top-1, 0 to 1.
        num_images: evaluated.
        loss: mean cross-entropy.
        seconds: taken.
        created: when, UTC.
    """

    arch: Architecture
    weights: str
    split: str
    protocol: str
    accuracy: float
    num_images: int
    loss: float = 0.0
    seconds: float = 0.0
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class StudyChild:
    """A child that a study has proposed.

    Attributes:
        number: its place in the study, from 0.
        arch: the child.
        accuracy: 0 to 1; None until it is evaluated and recorded.
    """

    number: int
    arch: Architecture
    accuracy: float | None


class Store(Database):
    """The run's database; a context manager that closes it.

    Many processes may use one at the same time. Optuna keeps its studies in the same database; our tables are called
    `hwnas_...`. Every method that adds commits before it returns.

    Args:
        url: see `Database`. Tables that are missing are made.

    Raises:
        InputError: as `Database`; or it was made by a newer hwnas.
    """

    def _prepare(self, connection: sa.Connection) -> None:
        super()._prepare(connection)
        tables = set(sa.inspect(connection).get_table_names())
        if not tables >= set(_metadata.tables):
            with self.claimed("tables"):  # PostgreSQL's `if not exists` fails where two processes make one at once
                for table in _metadata.sorted_tables:
                    connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
                    for index in table.indexes:
                        connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))
        if not connection.execute(sa.select(_schema.c.version)).all():
            self._insert_or_ignore(connection, _schema, {"version": SCHEMA})
        version = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar_one()
        if version > SCHEMA:
            raise InputError(
                f"{self.name}: made by a newer hwnas (its schema is {version}, this hwnas knows {SCHEMA}): "
                "upgrade hwnas, or use another run folder"
            )

    # ------------------------------------------------------------ measurements

    def add_measurement(self, measurement: Measurement) -> None:
        """Record a measurement.

        Raises:
            InputError: the database cannot be written.
        """
        times = [time for round in measurement.rounds for time in round.times_ms]
        preempted = [flag for round in measurement.rounds for flag in round.preempted]
        row = {name: getattr(measurement, name) for name in _PLAIN}
        row |= {
            "protocol": measurement.protocol,
            "arch_id": measurement.arch.id,
            "arch": measurement.arch.to_dict(),
            "versions": dict(measurement.versions),
            "timing": asdict(measurement.timing),
            "times": np.asarray(times, dtype="<f8").tobytes(),
            "preempted": np.packbits(np.asarray(preempted, dtype=bool)).tobytes(),
            "rounds": [[len(round.times_ms), dict(round.facts), round.spread] for round in measurement.rounds],
            "reference_ms": list(measurement.reference_ms),
            "created": measurement.created.isoformat(),
        }
        with self._connection() as connection:
            connection.execute(sa.insert(_measurements), row)

    def measurements(
        self,
        *,
        device: str | None = None,
        timing: Timing | None = None,
        role: Role | None = None,
        protocol: str | None = None,
        arch: Architecture | None = None,
    ) -> list[Measurement]:
        """The measurements that match all that is given, failed ones included, in the order they were made.

        Each comes with the reference's usual latency over all measurements of its protocol.

        Raises:
            InputError: the database cannot be read, or holds a record that is damaged.
        """
        table = _measurements.c
        wanted = _equal(_measurements, device=device, role=role, protocol=protocol, arch_id=arch.id if arch else None)
        references: dict[str, list[float]] = {}
        with self._connection() as connection:
            rows = connection.execute(sa.select(_measurements).where(*wanted).order_by(table.id)).all()
            alike = table.protocol.in_({row.protocol for row in rows})
            for key, reference_ms in connection.execute(sa.select(table.protocol, table.reference_ms).where(alike)):
                references.setdefault(key, []).extend(reference_ms)
        usual: dict[str, float] = {}
        found = []
        for row in rows:
            measurement = self._measurement(row)
            if timing not in (None, measurement.timing):
                continue
            if measurement.reference_ms:
                if row.protocol not in usual:
                    usual[row.protocol] = usual_ms(references[row.protocol], measurement.timing.max_drift)
                measurement = replace(measurement, usual_reference_ms=usual[row.protocol])
            found.append(measurement)
        return found

    def _measurement(self, row: sa.Row[Any]) -> Measurement:
        source = f"{self.name}: measurement {row.id}"
        try:
            times = np.frombuffer(row.times, dtype="<f8").tolist()
            bits = np.unpackbits(np.frombuffer(row.preempted, dtype=np.uint8)).astype(bool).tolist()
            rounds, start = [], 0
            for count, facts, *spread in row.rounds:  # older hwnas wrote no spread
                end = start + count
                rounds.append(RunTimes(tuple(times[start:end]), tuple(bits[start:end]), facts, *spread))
                start = end
            return Measurement(
                arch=Architecture.from_dict(row.arch, source),
                timing=check(Timing, row.timing, source=source),
                versions=row.versions,
                rounds=tuple(rounds),
                reference_ms=tuple(row.reference_ms),
                created=datetime.fromisoformat(row.created),
                **{name: getattr(row, name) for name in _PLAIN},
            )
        except (ValueError, TypeError) as error:
            raise InputError(self._damaged(f"measurement {row.id}: {error}")) from None

    # ------------------------------------------------------------ evaluations

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Record an evaluation, unless there is one of the same child, weights, split and protocol.

        Raises:
            InputError: the database cannot be written.
        """
        row = {name: getattr(evaluation, name) for name in evaluation.__slots__}
        row |= {"arch_id": evaluation.arch.id, "arch": evaluation.arch.to_dict()}
        row["created"] = evaluation.created.isoformat()
        with self._connection() as connection:
            self._insert_or_ignore(connection, _evaluations, row)

    def evaluation(self, arch: Architecture, weights: str, split: str, protocol: str) -> Evaluation | None:
        """The evaluation of one child, if there is one.

        Raises:
            InputError: the database cannot be read.
        """
        found = self._evaluations(arch_id=arch.id, weights=weights, split=split, protocol=protocol)
        return found[0] if found else None

    def evaluations(self, weights: str, split: str, protocol: str | None = None) -> list[Evaluation]:
        """All children evaluated with these weights on this split, in this way unless None, in the order they were.

        Raises:
            InputError: the database cannot be read.
        """
        return self._evaluations(weights=weights, split=split, protocol=protocol)

    def _evaluations(self, **wanted: str | None) -> list[Evaluation]:
        query = sa.select(_evaluations).where(*_equal(_evaluations, **wanted)).order_by(_evaluations.c.id)
        with self._connection() as connection:
            rows: Sequence[sa.RowMapping] = connection.execute(query).mappings().all()
        names = [name for name in Evaluation.__slots__ if name not in ("arch", "created")]
        found = []
        for row in rows:
            try:
                arch = Architecture.from_dict(row["arch"], f"{self.name}: evaluation {row['id']}")
                created = datetime.fromisoformat(row["created"])
                found.append(Evaluation(arch=arch, created=created, **{name: row[name] for name in names}))
            except (ValueError, TypeError) as error:
                raise InputError(self._damaged(f"evaluation {row['id']}: {error}")) from None
        return found

    def adopt(self, other: Store) -> None:
        """Copy the measurements and evaluations of another database that this one has not.

        Raises:
            InputError: one of them cannot be used.
        """
        with self.claimed("adopt"), other._connection() as theirs, self._connection() as ours:
            for table, keys in (
                (_measurements, ("protocol", "arch_id", "created")),
                (_evaluations, ("weights", "split", "protocol", "arch_id")),
            ):
                query = sa.select(*(table.c[key] for key in keys))
                here = {tuple(row) for row in ours.execute(query)}
                if {tuple(row) for row in theirs.execute(query)} <= here:
                    continue
                for row in theirs.execute(sa.select(table).order_by(table.c.id)).mappings():
                    if tuple(row[key] for key in keys) not in here:
                        ours.execute(sa.insert(table), {name: row[name] for name in row if name != "id"})

    # ------------------------------------------------------------ studies that workers share

    def open_study(self, name: str, question: Any, known: Sequence[tuple[Architecture, float]]) -> tuple[Any, Any]:
        """What a study asks, and the children known before it: as the worker gave them that was the first.

        Args:
            name: of the study.
            question: plain values.
            known: children and their accuracies.

        Returns:
            Question and known children of the study.

        Raises:
            InputError: the database cannot be used.
        """
        row = {"name": name, "question": question, "known": [[arch.to_dict(), accuracy] for arch, accuracy in known]}
        with self._connection() as connection:
            self._insert_or_ignore(connection, _studies, row)
            found = connection.execute(sa.select(_studies).where(_studies.c.name == name)).one()
        source = f"{self.name}: study {name}"
        return found.question, [(Architecture.from_dict(arch, source), accuracy) for arch, accuracy in found.known]

    def propose(self, study: str, first: int, archs: Sequence[Architecture]) -> None:
        """Add the next children of a study, unless another worker has.

        Args:
            study: its name.
            first: the number of the first of them.
            archs: at least one.

        Raises:
            InputError: the database cannot be written.
        """
        rows = [
            {"study": study, "number": number, "arch": arch.to_dict(), "begun": False}
            for number, arch in enumerate(archs, first)
        ]
        with self._connection() as connection:
            self._insert_or_ignore(connection, _children, rows)

    def children(self, study: str, first: int = 0) -> list[StudyChild]:
        """The children that a study has proposed, from a number on, in order.

        Raises:
            InputError: the database cannot be read.
        """
        table = _children.c
        query = sa.select(table.number, table.arch, table.accuracy).where(table.study == study, table.number >= first)
        source = f"{self.name}: study {study}"
        with self._connection() as connection:
            # Row by row: of ten thousand dicts at once, collecting garbage takes twice as long as all else.
            rows = connection.execute(query.order_by(table.number))
            return [StudyChild(row.number, Architecture.from_dict(row.arch, source), row.accuracy) for row in rows]

    def begin_child(self, study: str, number: int) -> bool:
        """Note that a worker evaluates a child; whether it is the first that does.

        Raises:
            InputError: the database cannot be written.
        """
        with self._connection() as connection:
            done = connection.execute(self._child(study, number).where(~_children.c.begun).values(begun=True))
        return done.rowcount == 1

    def finish_child(self, study: str, number: int, accuracy: float) -> None:
        """Record a child's accuracy, 0 to 1.

        Raises:
            InputError: the database cannot be written.
        """
        with self._connection() as connection:
            connection.execute(self._child(study, number).values(accuracy=accuracy))

    @staticmethod
    def _child(study: str, number: int) -> sa.Update:
        return sa.update(_children).where(_children.c.study == study, _children.c.number == number)


def _equal(table: sa.Table, **wanted: str | None) -> list[sa.ColumnElement[bool]]:
    """Conditions on a table's columns; None stands for any value."""
    return [table.c[name] == value for name, value in wanted.items() if value is not None]
