"""DB-API 2.0 (PEP 249) over sessions.

Statements are written as for psycopg: ``%s`` or ``%(name)s`` for parameters and, where there are any, ``%%`` for a
percent sign. A connection is a session: it takes nothing from the broker until its first statement. Threads may share
the module, not connections.

A cursor holds its whole result, whose size the broker bounds. A cursor made with ``stream=True`` reads any number of
rows as they come.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from session_broker import _sync
from session_broker._arguments import IsolationLevel, TransactionArguments
from session_broker.errors import (
    DatabaseError,
    DataError,
    EndReason,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    SessionEnded,
    Warning,
)
from session_broker.results import Result, Row, Statement, TransactionState

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from session_broker.values import Column
    from sessionbroker.v1.error_pb2 import PgError
    from sessionbroker.v1.session_pb2 import GetSessionResponse, SessionState

__all__ = [
    "BINARY",
    "DATETIME",
    "NUMBER",
    "ROWID",
    "STRING",
    "Binary",
    "Connection",
    "Cursor",
    "DataError",
    "DatabaseError",
    "Date",
    "DateFromTicks",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "Time",
    "TimeFromTicks",
    "Timestamp",
    "TimestampFromTicks",
    "Warning",
    "apilevel",
    "connect",
    "paramstyle",
    "threadsafety",
]

apilevel = "2.0"
threadsafety = 1
paramstyle = "pyformat"

T = TypeVar("T")
Parameters = Sequence[object] | Mapping[str, object]
Description = tuple[str, int, None, None, int | None, int | None, None]

# How many sets of parameters executemany sends at a time; the broker takes up to 10,000.
_SETS_MAX = 1_000
# How many rows are asked of a stream at a time where nobody says.
_ROWS = 1_000


def connect(target: str | _sync.Broker, *, autocommit: bool = False, **arguments: Any) -> Connection:
    """A connection.

    Args:
        target: Where the broker is, ``"localhost:50051"``; or a `Broker`, which connections may share and which stays
            open when they close.
        autocommit: Whether each statement is a transaction of its own.
        **arguments: Those of `session_broker.connect`; with a `Broker`, those of `Broker.session`.

    Raises:
        ProgrammingError: An argument is wrong.
        TypeError: There is no such argument.
    """
    if isinstance(target, _sync.Broker):
        return Connection(target.session(**arguments), autocommit=autocommit)
    broker = _sync.connect(target, **arguments)
    return Connection(broker.session(), autocommit=autocommit, on_close=broker.close)


class Stream(Protocol):
    """What a connection needs of a stream."""

    @property
    def columns(self) -> Sequence[Column]:
        """The result's columns."""

    def fetchmany(self, size: int) -> list[Row]:
        """The next rows; none at the end."""

    def close(self) -> None:
        """Stops the statement, unless it has ended."""


class Session(Protocol):
    """What a connection needs of a session."""

    @property
    def state(self) -> SessionState | None:
        """Where it stands; None before its first call."""

    def execute(self, sql: str, params: Sequence[object], *, commit: bool) -> Result:
        """Runs a statement."""

    def stream(self, sql: str, params: Sequence[object], *, commit: bool) -> Stream:
        """Runs a statement whose rows come as they are read."""

    def batch(self, statements: Sequence[Statement], *, commit: bool) -> list[Result]:
        """Runs statements."""

    def begin(self, **options: Unpack[TransactionArguments]) -> None:
        """Notes how the next transaction begins."""

    def commit(self) -> object:
        """Ends the transaction."""

    def rollback(self, savepoint: str | None = None) -> None:
        """Ends the transaction without its writes, or goes back to a savepoint."""

    def create_savepoint(self, name: str) -> None:
        """Sets a savepoint."""

    def release_savepoint(self, name: str) -> None:
        """Forgets a savepoint."""

    def cancel(self) -> bool:
        """Stops the running statement."""

    def info(self) -> GetSessionResponse:
        """What is behind it."""

    def close(self) -> None:
        """Ends the session."""


class Connection:
    """A session as PEP 249 has it.

    As a context manager it commits at the end, or rolls back on an error, and closes.
    """

    Warning = Warning
    Error = Error
    InterfaceError = InterfaceError
    DatabaseError = DatabaseError
    DataError = DataError
    OperationalError = OperationalError
    IntegrityError = IntegrityError
    InternalError = InternalError
    ProgrammingError = ProgrammingError
    NotSupportedError = NotSupportedError

    _cursor_class: type[Cursor]

    def __init__(
        self, session: Session, *, autocommit: bool = False, on_close: Callable[[], None] | None = None
    ) -> None:
        self.session = session
        """The session beneath."""
        self.isolation_level: IsolationLevel | str | None = None
        """Of the transactions that begin from now on; None: the session's."""
        self.read_only: bool | None = None
        """Whether these are READ ONLY; None: as the session says."""
        self.deferrable: bool | None = None
        """Whether these are DEFERRABLE; None: as the session says."""
        self._autocommit = autocommit
        self._on_close = on_close
        self._closed = False
        self._streamed: _Streamed | None = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, or has failed."""
        state = self.session.state
        return state is not None and TransactionState(state.transaction_state) is not TransactionState.NONE

    @property
    def autocommit(self) -> bool:
        """Whether each statement is a transaction of its own.

        Setting it raises `ProgrammingError` while a transaction is open.
        """
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        if value != self._autocommit and self.in_transaction:
            raise ProgrammingError("autocommit cannot change while a transaction is open: commit or roll back first")
        self._autocommit = value

    def cursor(self, *, stream: bool = False) -> Cursor:
        """A cursor.

        While one with `stream` reads, another statement on the connection first takes what is left of its rows into
        memory. Closed before its end, or left open at commit, its statement is stopped and undone, unless all its rows
        were read. One that writes, locks rows or calls a function, as far as its words tell, runs to its end instead.

        Raises:
            InterfaceError: The connection is closed.
        """
        self._check_open()
        return self._cursor_class(self, stream=stream)

    def execute(self, operation: str, parameters: Parameters | None = None) -> Cursor:
        """Runs a statement on a new cursor: see `Cursor.execute`."""
        return self.cursor().execute(operation, parameters)

    def commit(self) -> None:
        """Commits the transaction, if there is one.

        Raises:
            CommitRolledBack: A statement had failed, and PostgreSQL rolled back.
            CommitUnknown: Nobody could say what became of it.
            Error: As the broker says.
        """
        self._check_open()
        if self._streamed:
            self._streamed.stop()
        self.session.commit()

    def rollback(self) -> None:
        """Rolls the transaction back, if there is one. Makes the connection usable after any error.

        Raises:
            Error: As the broker says.
        """
        self._check_open()
        if self._streamed:
            self._streamed.drop()
        self.session.rollback()

    def create_savepoint(self, name: str) -> None:
        """Sets a savepoint, beginning a transaction when there is none. So does SQL's SAVEPOINT.

        Raises:
            ProgrammingError: In autocommit there is no transaction to set it in.
            Error: As the broker says.
        """
        self._begin()
        if self._autocommit and not self.in_transaction:
            raise ProgrammingError("in autocommit no transaction holds a savepoint: set autocommit to False before")
        self.session.create_savepoint(name)

    def rollback_to_savepoint(self, name: str) -> None:
        """Undoes what came after a savepoint; a failed transaction is then open again.

        Raises:
            Error: As the broker says.
        """
        self._check_open()
        if self._streamed:
            self._streamed.drop()
        self.session.rollback(name)

    def release_savepoint(self, name: str) -> None:
        """Forgets a savepoint and those set after it, and keeps what was done.

        Raises:
            ProgrammingError: There is none of that name.
            Error: As the broker says.
        """
        self._check_open()
        if not self.in_transaction:
            raise ProgrammingError("there is no savepoint: no transaction is open")
        self._begin()
        self.session.release_savepoint(name)

    def _act_on_savepoint(self, action: re.Match[str]) -> None:
        quoted = action["quoted"]
        name = action["name"].lower() if quoted is None else quoted.replace('""', '"')
        if action["create"]:
            self.create_savepoint(name)
        elif action["release"]:
            self.release_savepoint(name)
        else:
            self.rollback_to_savepoint(name)

    def cancel(self) -> bool:
        """Stops the running statement, from another thread. Returns whether there was one.

        Raises:
            Error: As the broker says.
        """
        self._check_open()
        return self.session.cancel()

    def ping(self) -> None:
        """Asks the broker whether the session lives. Touches no database.

        Raises:
            SessionEnded: It does not.
            Error: As the broker says.
        """
        self._check_open()
        end_reason = EndReason(self.session.info().end_reason)
        if end_reason is not EndReason.UNSPECIFIED:
            ended = SessionEnded(f"the session has ended: {end_reason.name}")
            ended.end_reason = end_reason
            raise ended

    def close(self) -> None:
        """Ends the session. What was not committed is rolled back."""
        if self._closed:
            return
        if self._streamed:
            self._streamed.drop()
        self._closed = True
        try:
            self.session.close()
        finally:
            if self._on_close:
                self._on_close()

    def xid(self, format_id: int, global_transaction_id: str, branch_qualifier: str) -> None:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        raise _no_two_phase()

    def tpc_begin(self, xid: object) -> None:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        raise _no_two_phase()

    def tpc_prepare(self) -> None:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        raise _no_two_phase()

    def tpc_commit(self, xid: object = None) -> None:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        raise _no_two_phase()

    def tpc_rollback(self, xid: object = None) -> None:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        raise _no_two_phase()

    def tpc_recover(self) -> list[object]:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        raise _no_two_phase()

    def __enter__(self) -> Self:
        """Itself."""
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commits, or rolls back on an error, and closes."""
        if self._closed:
            return
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InterfaceError("the connection is closed: connect again")

    def _begin(self) -> None:
        """Makes the session ready for a call."""
        self._check_open()
        if self._streamed:
            self._streamed.keep()
        if self.in_transaction:
            return
        options = TransactionArguments()
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        if self.read_only is not None:
            options["read_only"] = self.read_only
        if self.deferrable is not None:
            options["deferrable"] = self.deferrable
        self.session.begin(**options)

    def _run(self, call: Callable[[], T]) -> T:
        """Makes a call that may run a statement. In autocommit nothing is left of one that fails."""
        self._begin()
        try:
            return call()
        except BaseException:
            if self._autocommit:
                with suppress(Error):
                    self.session.rollback()
            raise


# SAVEPOINT, RELEASE SAVEPOINT and ROLLBACK TO SAVEPOINT, which the broker has calls for.
_SAVEPOINT = re.compile(
    r"""\s*(?:(?P<create>SAVEPOINT)|(?P<release>RELEASE)(?:\s+SAVEPOINT)?|ROLLBACK\s+TO(?:\s+SAVEPOINT)?)"""
    r"""\s+(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<name>\w+))\s*;?\s*""",
    re.IGNORECASE,
)


def _no_two_phase() -> NotSupportedError:
    return NotSupportedError(
        "the broker has no two-phase commit: commit with commit(), and ask resolve_commit in doubt"
    )


class Cursor:
    """Runs statements and holds the last one's result. Made by `Connection.cursor`."""

    def __init__(self, connection: Connection, *, stream: bool) -> None:
        self.connection = connection
        """Its connection."""
        self.arraysize = 1
        """How many rows `fetchmany` fetches unless told."""
        self.lastrowid = None
        """PostgreSQL has none: use RETURNING."""
        self.rowcount = -1
        """Rows returned or affected; -1 when the statement counts none, or its rows are still coming."""
        self.description: list[Description] | None = None
        """The columns' names and types; None when the statement returns no rows."""
        self.notices: Sequence[PgError] = ()
        """Warnings and notices that the statement raised."""
        self._streams = stream
        self._rows: _Rows | None = None
        self._closed = False

    @property
    def server_side(self) -> bool:
        """Whether it reads its rows as they come."""
        return self._streams

    def execute(self, operation: str, parameters: Parameters | None = None) -> Self:
        """Runs a statement, with a sequence of parameters for ``%s`` or a mapping for ``%(name)s``.

        Raises:
            InterfaceError: The cursor or its connection is closed.
            ProgrammingError: The placeholders and the parameters do not fit, or PostgreSQL does not take the statement.
            Error: As PostgreSQL or the broker says.
        """
        self._restart()
        connection, commit = self.connection, self.connection.autocommit
        if not parameters and (savepoint := _SAVEPOINT.fullmatch(operation)):
            connection._act_on_savepoint(savepoint)
            return self
        sql, params = _bound(operation, parameters)
        if self._streams:
            streamed = connection._run(lambda: _Streamed(self, sql, params))
            self._rows = streamed if streamed.columns else None
            self.description = _description(streamed.columns)
            if not streamed.columns:
                streamed.keep()
            return self
        result = connection._run(lambda: connection.session.execute(sql, params, commit=commit))
        self._rows = _Rows(result.rows) if result.columns else None
        self.description = _description(result.columns)
        self.rowcount = _row_count(result)
        self.notices = result.notices
        return self

    def executemany(self, operation: str, seq_of_parameters: Sequence[Parameters]) -> Self:
        """Runs a statement once with each set of parameters. Rows that it returns are not kept.

        Raises:
            InterfaceError: The cursor or its connection is closed.
            ProgrammingError: The placeholders and the parameters do not fit, or PostgreSQL does not take the statement.
            Error: As PostgreSQL or the broker says; `metadata` has the number of the set.
        """
        self._restart()
        bound = [_bound(operation, parameters) for parameters in seq_of_parameters]
        self.rowcount = self.connection._run(lambda: self._run_many(bound))
        return self

    def _run_many(self, bound: Sequence[tuple[str, Sequence[object]]]) -> int:
        counts = [0]
        for start in range(0, len(bound), _SETS_MAX):
            sets = bound[start : start + _SETS_MAX]
            is_last = start + _SETS_MAX >= len(bound)
            statement = Statement(sets[0][0], parameter_sets=[params for _, params in sets])
            results = self.connection.session.batch([statement], commit=self.connection.autocommit and is_last)
            counts.extend(max(_row_count(result), 0) for result in results)
        return sum(counts)

    def callproc(self, procname: str, parameters: Sequence[object] = ()) -> Sequence[object]:
        """Calls a function by its name as in the catalog, ``"schema.name"`` where it is not on the search path.

        Its rows are fetched as a query's. Returns the parameters as they were: PostgreSQL returns rows instead.

        Raises:
            Error: As for `execute`.
        """
        name = ".".join('"' + part.replace('"', '""') + '"' for part in procname.split("."))
        self.execute(f"SELECT * FROM {name.replace('%', '%%')}({', '.join(['%s'] * len(parameters))})", parameters)
        return parameters

    def fetchone(self) -> Row | None:
        """The next row; None at the end.

        Raises:
            ProgrammingError: There is no result.
            Error: As PostgreSQL or the broker says, of a stream.
        """
        rows = self._fetch(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> list[Row]:
        """The next rows: `size`, or `arraysize`, or as many as there are.

        Raises:
            ProgrammingError: There is no result.
            Error: As PostgreSQL or the broker says, of a stream.
        """
        return self._fetch(self.arraysize if size is None else size)

    def fetchall(self) -> list[Row]:
        """All other rows.

        Raises:
            ProgrammingError: There is no result.
            Error: As PostgreSQL or the broker says, of a stream.
        """
        return self._fetch(None)

    def nextset(self) -> None:
        """There is never another result."""
        self._check_open()

    def setinputsizes(self, sizes: Sequence[object]) -> None:
        """Does nothing: PostgreSQL needs no sizes."""
        self._check_open()

    def setoutputsize(self, size: int, column: int | None = None) -> None:
        """Does nothing: values come whole."""
        self._check_open()

    def close(self) -> None:
        """Lets go of the result."""
        if not self._closed:
            self._let_go()
            self._closed = True

    def __iter__(self) -> Iterator[Row]:
        """The rows that are left."""
        return self

    def __next__(self) -> Row:
        """The next row."""
        row = self.fetchone()
        if row is None:
            raise StopIteration
        return row

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InterfaceError("the cursor is closed: make another with Connection.cursor()")
        self.connection._check_open()

    def _restart(self) -> None:
        self._check_open()
        self._let_go()
        self.description, self.rowcount, self.notices = None, -1, ()

    def _let_go(self) -> None:
        if isinstance(self._rows, _Streamed):
            self._rows.stop()
        self._rows = None

    def _fetch(self, size: int | None) -> list[Row]:
        self._check_open()
        if self._rows is None:
            raise ProgrammingError("there are no rows to fetch: execute a statement that returns some")
        rows = self._rows.fetch(size)
        if isinstance(self._rows, _Streamed) and self._rows.count is not None:
            self.rowcount = self._rows.count
        return rows


class _Rows:
    """Rows that are here."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = deque(rows)

    def fetch(self, size: int | None) -> list[Row]:
        if size is None or size >= len(self._rows):
            rows = list(self._rows)
            self._rows.clear()
            return rows
        return [self._rows.popleft() for _ in range(size)]


# The words of statements that write, or lock rows.
_WRITES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|CALL|DO|CREATE|EXECUTE|FOR\s+(?:KEY\s+)?SHARE)\b", re.IGNORECASE)
# What stands before a parenthesis: a function's name, with its schema and quotes, or a word of SQL.
_CALLED = re.compile(r"""(?<![\w."])([\w."]+)\s*\(""")
# Words of SQL, types, and functions that leave nothing behind. Every other function may write.
_HARMLESS = frozenset(
    """
    all and any array as between by case cast cross cube distinct else end escape except exists extract filter from
    full group grouping having ilike in inner intersect is isnull join lateral left like limit materialized minus
    natural not notnull nullif offset on only or order outer over partition range right rollup rows select sets similar
    some tablesample then union using values when where window with within
    bit bpchar char character decimal float interval numeric time timestamp timestamptz timetz varbit varchar varying
    abs age array_agg array_length array_position array_remove array_to_string avg bool_and bool_or btrim cardinality
    ceil ceiling chr coalesce concat concat_ws count cume_dist current_setting date_part date_trunc decode dense_rank
    div encode every exp first_value floor format generate_series generate_subscripts greatest initcap json_agg
    json_array_elements json_build_array json_build_object json_each json_object_agg jsonb_agg jsonb_array_elements
    jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_object_agg jsonb_object_keys lag last_value lead least length ln
    log lower lpad ltrim make_date make_interval make_timestamp max md5 min mod mode now nth_value ntile octet_length
    overlay percent_rank percentile_cont percentile_disc position power random rank regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table repeat replace reverse round row row_number row_to_json rpad rtrim sign
    split_part sqrt starts_with stddev string_agg string_to_array strpos substr substring sum to_char to_date to_json
    to_jsonb to_number to_timestamp to_tsquery to_tsvector translate trim trunc unnest upper variance width_bucket
    """.split()  # noqa: SIM905
)
_SAVEPOINTS = itertools.count(1)


def _may_write(sql: str) -> bool:
    """Whether a statement may write, as far as its words tell: a view, an operator or a cast may hide a function."""
    if _WRITES.search(sql):
        return True
    return any(name.lower().removeprefix("pg_catalog.") not in _HARMLESS for name in _CALLED.findall(sql))


class _Streamed(_Rows):
    """Rows that come as they are read.

    To stop a statement fails its transaction, so one that may be stopped runs after a savepoint, and one that may write
    is not stopped.
    """

    def __init__(self, cursor: Cursor, sql: str, params: Sequence[object]) -> None:
        super().__init__(())
        connection = self._connection = cursor.connection
        self._cursor = weakref.ref(cursor)
        self._runs_to_its_end = _may_write(sql)
        self._savepoint: str | None = None
        self.count: int | None = None
        """How many rows there were, once that is known."""
        self._arrived = 0
        session, autocommit = connection.session, connection.autocommit
        if not autocommit and not self._runs_to_its_end:
            self._savepoint = f"stream {next(_SAVEPOINTS)}"
            session.create_savepoint(self._savepoint)
        self._stream = session.stream(sql, params, commit=autocommit)
        self.columns = self._stream.columns
        connection._streamed = self

    def fetch(self, size: int | None) -> list[Row]:
        while self._is_open and (size is None or len(self._rows) < size):
            self._read(_ROWS if size is None else size - len(self._rows))
        rows = super().fetch(size)
        if not self._is_open and self.count is None and (size is None or len(rows) < size):
            raise ProgrammingError(
                "the statement did not run to its end, and the other rows are gone: execute it again"
            )
        return rows

    def keep(self) -> None:
        """Takes what is left into memory, if there is still a cursor to fetch it."""
        if self._cursor() is None:
            self.stop()
        while self._is_open:
            self._read(_ROWS)

    def stop(self) -> None:
        """Wants no more rows."""
        while self._is_open and self._runs_to_its_end:
            self._read(_ROWS)
            self._rows.clear()
        if not self._is_open:
            return
        # Where all rows were read, only the end is missing, and what the statement did stays.
        try:
            self._read(1)
        except Error as error:
            # What PostgreSQL or Python cannot do with a row that nobody wants is undone as well.
            if error.sqlstate is None and not isinstance(error, DataError):
                raise
        else:
            if not self._is_open:
                return
        self.drop()
        session = self._connection.session
        session.rollback(self._savepoint)
        if self._savepoint:
            session.release_savepoint(self._savepoint)

    def drop(self) -> None:
        """Stops the statement, of which the caller undoes what it has done."""
        if self._is_open:
            self._connection._streamed = None
            self._stream.close()

    @property
    def _is_open(self) -> bool:
        return self._connection._streamed is self

    def _read(self, size: int) -> None:
        try:
            rows = self._stream.fetchmany(size)
        except BaseException:
            self.drop()
            if self._connection.autocommit:
                with suppress(Error):
                    self._connection.session.rollback()
            raise
        self._rows.extend(rows)
        self._arrived += len(rows)
        if not rows:
            self._connection._streamed = None
            self.count = self._arrived
            if self._savepoint:
                self._connection.session.release_savepoint(self._savepoint)


def _bound(operation: str, parameters: Parameters | None) -> tuple[str, Sequence[object]]:
    """The statement with ``$1``, ``$2`` ... and its parameters in order."""
    if parameters is None:
        return operation, ()
    sql, names, positions = _translated(operation)
    if isinstance(parameters, Mapping):
        if positions:
            raise ProgrammingError("the statement has '%s': give a sequence of parameters, or name them '%(name)s'")
        missing = [name for name in names if name not in parameters]
        if missing:
            raise ProgrammingError(f"the statement has '%({missing[0]})s', and the parameters do not: add it")
        return sql, [parameters[name] for name in names]
    if isinstance(parameters, str | bytes) or not isinstance(parameters, Sequence):
        raise ProgrammingError(f"the parameters are a {type(parameters).__name__}: give a sequence or a mapping")
    if names:
        raise ProgrammingError("the statement names its parameters, '%(name)s': give a mapping")
    if len(parameters) != positions:
        raise ProgrammingError(
            f"the statement has {positions} placeholders, and there are {len(parameters)} parameters"
        )
    return sql, parameters


_PLACEHOLDER = re.compile(r"%(?:\((?P<name>[^)]*)\))?(?P<kind>.?)", re.DOTALL)


@lru_cache(maxsize=1_024)
def _translated(operation: str) -> tuple[str, tuple[str, ...], int]:
    """The statement with ``$1``, ``$2`` ..., the names of its parameters, or how many there are without names."""
    names: dict[str, int] = {}
    positions = itertools.count(1)
    used = 0

    def place(match: re.Match[str]) -> str:
        nonlocal used
        name, kind = match["name"], match["kind"]
        if name is None and kind == "%":
            return "%"
        if kind != "s":
            raise ProgrammingError(
                f"{match.group()!r} is no placeholder: write '%s' or '%(name)s', and '%%' for a percent"
            )
        if name is not None:
            return f"${names.setdefault(name, len(names) + 1)}"
        used = next(positions)
        return f"${used}"

    sql = _PLACEHOLDER.sub(place, operation)
    if names and used:
        raise ProgrammingError("the statement mixes '%s' and '%(name)s': use one of them")
    return sql, tuple(names), used


# Statements whose tag ends in the number of their rows.
_COUNTS = re.compile(r".* (\d+)")


def _row_count(result: Result) -> int:
    if result.columns:
        return len(result.rows)
    match = _COUNTS.fullmatch(result.command_tag)
    return int(match[1]) if match else -1


_NUMERIC = 1700


def _description(columns: Sequence[Column]) -> list[Description] | None:
    return [_described(column) for column in columns] or None


def _described(column: Column) -> Description:
    precision = scale = None
    if column.type_oid == _NUMERIC and column.type_modifier >= 0:
        precision, scale = divmod(column.type_modifier - 4, 1 << 16)
    return column.name, column.type_oid, None, None, precision, scale, None


class _TypeObject:
    """PEP 249's: equal to the oids of its types."""

    def __init__(self, *oids: int) -> None:
        self._oids = frozenset(oids)

    def __eq__(self, other: object) -> bool:
        """Whether it is itself, or one of its types."""
        return self is other or other in self._oids

    def __hash__(self) -> int:
        """Its types'."""
        return hash(self._oids)


STRING = _TypeObject(18, 19, 25, 1042, 1043, 705)
"""char, name, text, bpchar, varchar, unknown."""
BINARY = _TypeObject(17)
"""bytea."""
NUMBER = _TypeObject(20, 21, 23, 700, 701, 1700)
"""int8, int2, int4, float4, float8, numeric."""
DATETIME = _TypeObject(1082, 1083, 1114, 1184, 1186, 1266)
"""date, time, timestamp, timestamptz, interval, timetz."""
ROWID = _TypeObject(26)
"""oid."""

Binary = bytes
Date = date
Time = time
Timestamp = datetime
DateFromTicks = date.fromtimestamp
TimestampFromTicks = datetime.fromtimestamp


def TimeFromTicks(ticks: float) -> time:  # noqa: N802
    """The time of day, in the local time zone, so many seconds after 1970."""
    return datetime.fromtimestamp(ticks).time()


Connection._cursor_class = Cursor
