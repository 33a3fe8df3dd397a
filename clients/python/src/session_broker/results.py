"""What comes back: rows, commits, engines."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from session_broker.errors import ProgrammingError
from session_broker.values import Column
from sessionbroker.v1 import session_pb2
from sessionbroker.v1.error_pb2 import PgError

__all__ = ["AtLeast", "Commit", "Engine", "Outcome", "Result", "Row", "Statement", "TransactionState"]

Row = tuple[Any, ...]


class Outcome(enum.IntEnum):
    """What became of a transaction."""

    UNSPECIFIED = 0
    COMMITTED = 1
    ROLLED_BACK = 2
    NOTHING_WRITTEN = 3
    """It ended well, and had written nothing."""
    IN_PROGRESS = 4
    UNKNOWN = 5
    """Nobody can say."""

    @classmethod
    def _missing_(cls, value: object) -> Outcome:
        return cls.UNSPECIFIED


class TransactionState(enum.IntEnum):
    """Where a session's transaction stands."""

    UNSPECIFIED = 0
    NONE = 1
    """There is none: no connection to PostgreSQL is held."""
    OPEN = 2
    FAILED = 3
    """A statement failed: roll back."""

    @classmethod
    def _missing_(cls, value: object) -> TransactionState:
        return cls.UNSPECIFIED


@dataclass(frozen=True)
class Commit:
    """What a commit did."""

    outcome: Outcome
    """`COMMITTED` or `NOTHING_WRITTEN`; everything else is an exception."""
    commit_token: str = field(default="", repr=False)
    """For `Broker.resolve_commit`; empty when nothing was written."""
    transaction_id: int = 0
    """PostgreSQL's (xid8); 0 when nothing was written."""

    @classmethod
    def of(cls, message: session_pb2.CommitResponse) -> Commit:
        """Reads the protocol's message."""
        return cls(Outcome(message.outcome), message.commit_token, message.transaction_id)


@dataclass(frozen=True)
class Result:
    """A whole result, in memory. Iterating gives its rows."""

    columns: Sequence[Column]
    """Its columns; none when the statement returns no rows."""
    rows: list[Row] = field(repr=False)
    """Its rows, as tuples."""
    row_count: int
    """Rows returned, or affected when the statement returns none."""
    command_tag: str
    """PostgreSQL's: `"INSERT 0 1"`, `"SELECT 3"`."""
    notices: Sequence[PgError] = field(default=(), repr=False)
    """Warnings and notices that the statement raised; at most 100."""
    commit: Commit | None = None
    """What the commit did, when the call was to commit."""

    def __iter__(self) -> Iterator[Row]:
        """Its rows."""
        return iter(self.rows)

    def one(self) -> Row:
        """Its only row.

        Raises:
            ProgrammingError: It has none, or several.
        """
        if len(self.rows) != 1:
            raise ProgrammingError(f"the result has {len(self.rows)} rows where one was expected")
        return self.rows[0]

    def scalar(self) -> Any:
        """The first value of its only row.

        Raises:
            ProgrammingError: It has no row, or several, or no column.
        """
        row = self.one()
        if not row:
            raise ProgrammingError("the result has no column")
        return row[0]


@dataclass(frozen=True)
class AtLeast:
    """An expectation of `Statement.expect`: so many rows or more."""

    rows: int


@dataclass(frozen=True)
class Statement:
    """A statement of a batch or of a whole transaction."""

    sql: str
    params: Sequence[object] = field(default=(), repr=False)
    """The parameters of its one run, $1 first."""
    parameter_sets: Sequence[Sequence[object]] = field(default=(), repr=False)
    """It runs once with each of these, in order; then `params` must be empty."""
    expect: int | AtLeast | None = None
    """How many rows each run must return or affect; else `Broker.run` rolls back. Not for `Session.batch`."""


@dataclass(frozen=True)
class Engine:
    """What is behind a session: SQLAlchemy's `get_bind`."""

    name: str
    """The engine's, in the broker's configuration."""
    database: str
    user: str
    server_version: str
    """PostgreSQL's; empty until the engine has opened its first connection."""
