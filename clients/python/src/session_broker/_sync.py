"""The blocking API: a thin shell that does what the core's steps ask for."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import grpc

from session_broker._arguments import (
    Retry,
    RunArguments,
    Seconds,
    SessionArguments,
    TransactionArguments,
    timeout_seconds,
)
from session_broker._broker import BrokerCore, notified
from session_broker._channel import (
    PROBE_TIMEOUT,
    TLS,
    Credentials,
    Metadata,
    Route,
    Schedule,
    bearer,
    closed,
    serialize,
    traced,
)
from session_broker._protocol import Call, Method, Pause, Shape, Step, Steps
from session_broker._retry import backoff
from session_broker._session import SessionCore
from session_broker._statements import CallOptions, StatementLike
from session_broker._streams import CopyStream, RowStream, StreamCore
from session_broker.bulk import (
    PIECE_BYTES,
    Copied,
    CopyData,
    CopyOptions,
    Missed,
    Notification,
    SessionFilters,
    copy_options,
    pieces,
)
from session_broker.errors import (
    Advice,
    BrokerUnavailable,
    EndReason,
    Error,
    InterfaceError,
    ProgrammingError,
    from_rpc_error,
)
from session_broker.results import Commit, Engine, Outcome, Result, Row, TransactionState
from session_broker.values import Column
from sessionbroker.v1 import bulk_pb2
from sessionbroker.v1.admin_pb2 import SessionOverview
from sessionbroker.v1.error_pb2 import PgError
from sessionbroker.v1.session_pb2 import GetSessionResponse, SessionState

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from session_broker._tracing import Span

T = TypeVar("T")


def connect(
    target: str,
    *,
    credentials: Credentials | None = None,
    tls: bool | TLS = False,
    retry: Retry | None = None,
    follow_owner: bool = True,
    plaintext_beyond_loopback: bool = False,
    channel_options: Sequence[tuple[str, str | int]] = (),
    **session: Unpack[SessionArguments],
) -> Broker:
    """A connection to a broker. Nothing is sent before its first use.

    Args:
        target: `HOST:PORT` or `unix:/PATH`.
        credentials: A bearer token, or what is called for one before each call.
        tls: `True`, or a `TLS`, to encrypt.
        retry: How often calls are repeated by themselves, where that is safe.
        follow_owner: Whether calls on a session go to the endpoint that the broker names for it, where that answers.
        plaintext_beyond_loopback: Whether credentials may go to another machine without `tls`.
        channel_options: Further gRPC channel options.
        **session: Defaults for all sessions: `engine`, `profile`, `lease_ttl`, `isolation_level`, `read_only`,
            `deferrable`, `statement_timeout`, `lock_timeout`, `transaction_timeout`, `role`, `settings`,
            `connect_options`, `labels`, `timeout` (of statements that are given none, in seconds), `attach` (whether
            the broker is to notice within seconds that this program has died), `loaders` (by type name, what makes a
            value of PostgreSQL's text).

    Raises:
        ProgrammingError: An argument is wrong, or credentials would go over a network in plain text.
        TypeError: There is no such argument.
    """
    route = Route(target, credentials, tls, plaintext_beyond_loopback, channel_options)
    return Broker(BrokerCore(target, retry or Retry(), follow_owner, session), route)


class Broker:
    """A connection to a broker. Threads may share it; a process that forks afterwards may not.

    Its sessions that are idle are kept from a thread in the background, which ends with it.
    """

    def __init__(self, core: BrokerCore, route: Route) -> None:
        self._core = core
        self._links = _Links(core, route)
        self._finalizer = weakref.finalize(self, self._links.close)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"<session_broker.Broker {self._core.target}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Sessions that are not closed are ended by their lease."""
        self._finalizer()

    def session(self, **overrides: Unpack[SessionArguments]) -> Session:
        """A session, with `connect`'s arguments or others. The broker is asked for it at its first use.

        Raises:
            ProgrammingError: An argument is wrong.
        """
        return Session(self, SessionCore(self._core, overrides), self._links)

    def transaction(
        self, work: Callable[[Session], T], *, attempts_max: int = 3, **overrides: Unpack[SessionArguments]
    ) -> T:
        """Calls `work` with a session and commits; again from the start when the transaction is to be repeated.

        Raises:
            Error: As the last attempt raised it.
            CommitUnknown: Nobody could say whether it is committed; it is not repeated then.
        """
        for attempt in itertools.count(1):
            try:
                with self.session(**overrides) as session:
                    return work(session)
            except Error as error:
                if attempt >= attempts_max or error.advice not in (Advice.TRANSACTION, Advice.SESSION):
                    raise
            time.sleep(backoff(attempt))
        raise AssertionError("it counts for ever")

    def run(
        self,
        statements: Sequence[StatementLike],
        *,
        attempts_max: int = 3,
        idempotency_key: str | None = None,
        max_rows: int | None = None,
        statement_class: str = "",
        timeout: Seconds | None = None,
        **options: Unpack[RunArguments],
    ) -> list[Result]:
        """A whole transaction in one call: begins, runs, checks what is expected, and commits.

        Serialization failures and deadlocks are tried again by the broker, `attempts_max` times in all, 1 to 10. With
        an `idempotency_key` a call whose answer was lost is repeated, and still runs once.

        Raises:
            ExpectationFailed: A row count is not as expected; nothing is done.
            CommitUnknown: Nobody could say whether it is committed: repeat it with the same `idempotency_key`.
            DataError: Nothing is done; or, with `Error.commit`, it is committed, and Python cannot hold a value of its
                results.
            Error: As for `Session.execute`; nothing is done.
        """
        call = CallOptions(timeout=timeout, max_rows=max_rows, statement_class=statement_class)
        steps = self._core.run(statements, attempts_max, idempotency_key, call, options)
        return self._links.drive(steps)

    def resolve_commit(self, commit_token: str, wait: Seconds | None = None) -> Outcome:
        """What became of a transaction, by its commit token; waits up to 30 s while it is in progress.

        Raises:
            ProgrammingError: The token is none of this caller's.
            BrokerUnavailable: No broker answers.
            OperationalError: PostgreSQL cannot be asked.
        """
        return self._links.drive(self._core.resolve_commit(commit_token, timeout_seconds(wait)))

    def listen(self, *channels: str, engine: str | None = None, profile: str | None = None) -> Listener:
        """What NOTIFY sends on the channels from now on.

        Channels' names are taken as they are: NOTIFY without quotes folds them to lower case.

        Raises:
            ProgrammingError: There is no such engine or profile, or a channel's name is wrong.
            OperationalError: PostgreSQL cannot be reached, or has its maximum of listeners.
        """
        return Listener(self._links.drive(self._core.listen(channels, engine, profile)))

    def sessions(self, **filters: Unpack[SessionFilters]) -> list[SessionOverview]:
        """The live sessions of the broker that answers, for principals with the admin right.

        Raises:
            OperationalError: The caller has it not.
        """
        return self._links.drive(self._core.sessions(filters))

    def terminate(self, session_id: str, reason: str) -> EndReason:
        """Ends a session, for principals with the admin right: its transaction is rolled back. Says why it ended.

        Raises:
            SessionUnknown: There is none of that id.
            OperationalError: The caller has not the right.
        """
        return self._links.drive(self._core.terminate(session_id, reason))


class Session:
    """A session: transactions one after another, each begun by its first statement.

    As a context manager it commits at the end, rolls back on an error, and closes always. One thread at a time uses
    it: another hears `InterfaceError`, but for `cancel`. After whatever error `rollback` makes it usable again.
    """

    def __init__(self, broker: Broker, core: SessionCore, links: _Links) -> None:
        self._broker = broker
        self._core = core
        self._links = links
        self._incoming: Stream | CopyOut | None = None

    def __repr__(self) -> str:
        return f"<session_broker.Session {self.id or 'not begun'}{', closed' if self.closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.commit()
        finally:
            self.close()

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None and core.grant and not core.closed:
            warnings.warn(f"{self!r} was not closed: its lease ends it", ResourceWarning, stacklevel=2, source=self)

    @property
    def id(self) -> str:
        """Its name for logs and operators, which opens nothing; empty before its first call."""
        return self._core.grant.id if self._core.grant else ""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._core.closed

    @property
    def transaction_state(self) -> TransactionState:
        """Where its transaction stood after the last call."""
        return self._core.transaction

    @property
    def state(self) -> SessionState | None:
        """All that the broker said of it after the last call; `None` before the first."""
        return self._core.state

    @property
    def engine(self) -> Engine:
        """What is behind it; the broker is asked once.

        Raises:
            Error: As for `info`.
        """
        return self._links.begin_and_drive(self._core, self._core.engine())

    def get_bind(self) -> Engine:
        """`engine`, by the name that SQLAlchemy's sessions have for it.

        Raises:
            Error: As for `info`.
        """
        return self.engine

    def execute(
        self,
        sql: str,
        params: Sequence[object] = (),
        *,
        commit: bool = False,
        timeout: Seconds | None = None,
        max_rows: int | None = None,
        statement_class: str = "",
    ) -> Result:
        """Runs one statement, `$1`, `$2` for parameters, beginning a transaction when there is none.

        Args:
            sql: The statement.
            params: Its parameters.
            commit: Commit when it has succeeded, in the same call; roll back when it has not.
            timeout: The most seconds that the call may take, with all its repeats.
            max_rows: Fail when there are more rows.
            statement_class: What kind of statement it is, by a name that the profile has for it.

        Raises:
            ProgrammingError, DataError, IntegrityError, NotSupportedError: PostgreSQL refuses; see `Error.sqlstate`.
            SessionEnded, SessionUnknown: The session is over; nothing ran.
            StatementTimeout: A time limit stopped it.
            BrokerUnavailable: No answer came, in all attempts.
            DataError: Python cannot hold a value of the result: with `Error.commit` all is committed. Or the request is
                larger than the 16 MiB that a broker takes.
            CommitUnknown: With `commit`, and nobody could say what became of it.
            InterfaceError: The session is closed, or in use.
            OperationalError: A limit, a deadlock, a server that is away; `Error.advice` says what to repeat.
        """
        return self._links.begin_and_drive(
            self._core,
            self._core.execute(sql, params, CallOptions(commit, timeout, max_rows, statement_class)),
        )

    def stream(
        self,
        sql: str,
        params: Sequence[object] = (),
        *,
        commit: bool = False,
        timeout: Seconds | None = None,
        max_rows: int | None = None,
        statement_class: str = "",
    ) -> Stream:
        """As `execute`, but the rows come as they are read. Until the stream ends the session does nothing else.

        Raises:
            Error: As for `execute`; once rows have come, while reading them.
        """
        core, call = self._links.begin_and_drive(
            self._core,
            self._core.stream(sql, params, CallOptions(commit, timeout, max_rows, statement_class)),
        )
        stream = self._incoming = Stream(core, call)
        return stream

    def batch(
        self,
        statements: Sequence[StatementLike],
        *,
        commit: bool = False,
        timeout: Seconds | None = None,
        max_rows: int | None = None,
        statement_class: str = "",
    ) -> list[Result]:
        """Runs many statements in one call, and stops at the first that fails. One result for each run.

        Raises:
            Error: As for `execute`; `metadata["statement_index"]` says which failed, counted from 0.
        """
        return self._links.begin_and_drive(
            self._core,
            self._core.batch(statements, CallOptions(commit, timeout, max_rows, statement_class)),
        )

    def copy_in(
        self,
        table: str,
        data: CopyData,
        *,
        columns: Sequence[str] = (),
        commit: bool = False,
        timeout: Seconds | None = None,
        statement_class: str = "",
        **options: Unpack[CopyOptions],
    ) -> Copied:
        """COPY FROM STDIN into `TABLE` or `SCHEMA.TABLE`.

        `data` is bytes, a binary file, or an iterable of bytes.

        Raises:
            DataError: The data is wrong; `pg.where` says in which line.
            Error: As for `execute`. What reading `data` raises goes on as it is, and nothing is copied.
        """
        target = bulk_pb2.CopyInTarget(table=table, columns=columns, options=copy_options(options))
        pump = _Pump(data)
        call = CallOptions(commit=commit, timeout=timeout, statement_class=statement_class)
        try:
            return self._links.begin_and_drive(self._core, self._core.copy_in(target, pump.messages, call))
        except Error:
            if pump.error is not None:
                raise pump.error from None
            raise

    def copy_out(
        self,
        table: str = "",
        *,
        query: str = "",
        columns: Sequence[str] = (),
        commit: bool = False,
        timeout: Seconds | None = None,
        statement_class: str = "",
        **options: Unpack[CopyOptions],
    ) -> CopyOut:
        """COPY TO STDOUT of `TABLE` or `SCHEMA.TABLE`, or of a query. Until it ends the session does nothing else.

        Raises:
            Error: As for `execute`; once data has come, while reading it.
        """
        request = bulk_pb2.CopyOutRequest(columns=columns, options=copy_options(options))
        if query:
            request.query = query
        else:
            request.table = table
        call = CallOptions(commit=commit, timeout=timeout, statement_class=statement_class)
        core, streaming = self._links.begin_and_drive(self._core, self._core.copy_out(request, call))
        copy = self._incoming = CopyOut(core, streaming)
        return copy

    def begin(self, **options: Unpack[TransactionArguments]) -> None:
        """Says how the next transaction begins: `isolation_level`, `read_only`, `deferrable`. Nothing is sent.

        Raises:
            ProgrammingError: A transaction is open, or an option is wrong.
        """
        self._core.begin(options)

    def commit(self) -> Commit:
        """Ends the transaction: what it returns is committed, or there was nothing to commit.

        When its answer is lost it asks what became of it, for ten seconds; called again, it asks on.

        Raises:
            CommitRolledBack, IntegrityError, OperationalError: It was rolled back instead.
            CommitUnknown: Nobody could say; `commit_token` is for `Broker.resolve_commit`.
            SessionEnded, SessionUnknown: The session was over before; nothing is committed.
        """
        return self._links.drive(self._core.commit())

    def rollback(self, savepoint: str | None = None) -> None:
        """Ends the transaction without its writes; with a savepoint, goes back to it.

        Without one it makes the session usable again after whatever error: where the broker's session is over or cannot
        be reached, which rolls back too, the next statement begins another.

        Raises:
            ProgrammingError: There is no savepoint of that name; the transaction stands as before.
            Error: With a savepoint, as for `execute`.
        """
        if self._incoming:
            self._incoming._leave()
        self._links.drive(self._core.rollback(savepoint))

    def create_savepoint(self, name: str) -> None:
        """Sets a savepoint.

        Raises:
            Error: As for `execute`.
        """
        self._links.begin_and_drive(self._core, self._core.create_savepoint(name))

    def release_savepoint(self, name: str) -> None:
        """Forgets a savepoint, and keeps what was done since.

        Raises:
            ProgrammingError: There is none of that name.
            Error: As for `execute`.
        """
        self._links.drive(self._core.release_savepoint(name))

    @contextlib.contextmanager
    def savepoint(self, name: str = "savepoint") -> Iterator[None]:
        """A nested transaction: on an error in the block, what was done in it is undone, and the error goes on.

        Raises:
            Error: As for `execute`.
        """
        self.create_savepoint(name)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Error):
                self.rollback(name)
                self.release_savepoint(name)
            raise
        self.release_savepoint(name)

    def cancel(self) -> bool:
        """Stops the running statement, from another thread; false when none runs. Returns when it has stopped.

        Raises:
            OperationalError: PostgreSQL could not be asked.
        """
        return self._links.drive(self._core.cancel())

    def info(self) -> GetSessionResponse:
        """What is behind the session: engine, database, user, server version, backend, pool.

        Raises:
            SessionUnknown: It ended long ago.
            BrokerUnavailable: No answer came.
        """
        return self._links.begin_and_drive(self._core, self._core.info())

    def close(self) -> None:
        """Ends the session; what was not committed is rolled back. A second time it does nothing.

        Raises:
            InterfaceError: Another thread uses it.
        """
        if self._incoming:
            self._incoming._leave()
        self._links.drive(self._core.close())

    def abandon(self) -> None:
        """Lets the session go without a call: its lease ends it."""
        self._core.abandon()


class _Incoming(Generic[T]):
    """What a call brings bit by bit. Iterating gives it; as a context manager it is closed at the end."""

    def __init__(self, core: StreamCore[T], call: _Streaming) -> None:
        self._incoming = core
        self._call = call
        self._items: Iterator[T] = iter(core.begun())
        self._reading = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def row_count(self) -> int | None:
        """How many rows there were, or were affected; `None` before the end."""
        return self._incoming.row_count

    @property
    def commit(self) -> Commit | None:
        """What the commit did, when one was asked; `None` before the end."""
        return self._incoming.commit

    @property
    def notices(self) -> Sequence[PgError]:
        """Warnings and notices so far."""
        return self._incoming.notices

    def __iter__(self) -> Iterator[T]:
        """What has not been read yet.

        Raises:
            InterfaceError: It has failed or was closed before.
            Error: The result is not complete.
        """
        while True:
            yield from self._items
            if not self._read():
                return

    def close(self) -> None:
        """Ends it. Before its end that stops the statement, and the transaction has failed.

        Where it was to commit, it may have: `Session.commit` tells.
        """
        self._call.cancel()
        self._incoming.left()

    def _leave(self) -> None:
        """Ends it for the session.

        Raises:
            InterfaceError: Another thread reads it.
        """
        if self._reading:
            raise InterfaceError("another thread reads a stream of this session: give each a session of its own")
        self.close()

    def _read(self) -> bool:
        """Reads the next part; false when there is none."""
        if not self._incoming.open:
            self._incoming.check_complete()
            return False
        self._reading = True
        try:
            part = self._call.next()
        except Error as error:
            raise self._incoming.failed(error) from None
        finally:
            self._reading = False
        if part is None:
            self._incoming.ended()
            return False
        try:
            self._items = iter(self._incoming.feed(part))
        except BaseException:
            # Rows are missing: nobody is to take what follows for the rest.
            self.close()
            raise
        return True


class Stream(_Incoming[Row]):
    """The rows of a statement, as they are read. Iterating gives them; as a context manager it is closed at the end."""

    def __init__(self, core: RowStream, call: _Streaming) -> None:
        super().__init__(core, call)
        self._core = core

    @property
    def columns(self) -> Sequence[Column]:
        """Its columns; none when the statement returns no rows."""
        return self._core.columns

    @property
    def command_tag(self) -> str | None:
        """PostgreSQL's; `None` before the end."""
        return self._core.command_tag

    def fetchmany(self, size: int) -> list[Row]:
        """The next rows, so many or all that are left.

        Raises:
            InterfaceError: It has failed or was closed before.
            Error: The result is not complete.
        """
        rows = list(itertools.islice(self._items, size))
        while len(rows) < size and self._read():
            rows += itertools.islice(self._items, size - len(rows))
        return rows


class CopyOut(_Incoming[bytes]):
    """The data of a COPY, cut anywhere. Iterating gives it; as a context manager it is closed at the end."""

    def __init__(self, core: CopyStream, call: _Streaming) -> None:
        super().__init__(core, call)
        self._core = core

    @property
    def byte_count(self) -> int | None:
        """How many bytes there were; `None` before the end."""
        return self._core.byte_count


class Listener:
    """Notifications as they come, until it is closed or the broker stops. Iterating gives them."""

    def __init__(self, call: _Streaming) -> None:
        self._call = call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Notification | Missed]:
        """What comes. `Missed` says that what depends on notifications is to be read again.

        Raises:
            OperationalError: The broker stops: listen anew, and read again.
            BrokerUnavailable: The connection is lost: as before.
        """
        while (message := self._call.next()) is not None:
            told = notified(message)
            if told is not None:
                yield told

    def close(self) -> None:
        """Ends it."""
        self._call.cancel()


class _Pump:
    """The messages of a COPY FROM STDIN. Where the data fails, they stop before their end."""

    def __init__(self, data: CopyData) -> None:
        self._data = data
        self.error: BaseException | None = None

    def messages(self, target: bulk_pb2.CopyInTarget) -> Iterator[bulk_pb2.CopyInRequest]:
        """The target, the data, the end."""
        yield bulk_pb2.CopyInRequest(target=target)
        try:
            for data in pieces(self._data):
                for start in range(0, len(data), PIECE_BYTES):
                    yield bulk_pb2.CopyInRequest(data=bytes(data[start : start + PIECE_BYTES]))
        except Exception as error:
            self.error = error
        else:
            yield bulk_pb2.CopyInRequest(end=bulk_pb2.CopyInEnd())


class _Streaming:
    """A call of which messages come, with its span."""

    def __init__(self, call: Any, span: Span | None) -> None:
        self._call = call
        self._span = span

    def first(self) -> Any:
        """The first message.

        Raises:
            Error: The call failed.
        """
        message = self.next()
        if message is None:
            raise BrokerUnavailable("the stream ended before it began")
        return message

    def next(self) -> Any:
        """The next message, or none.

        Raises:
            Error: The call failed.
        """
        try:
            return next(self._call)
        except StopIteration:
            self._end(None)
            return None
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            self._end(failure)
            raise failure from None

    def cancel(self) -> None:
        """Ends it."""
        self._call.cancel()
        self._end(None)

    def _end(self, error: Error | None) -> None:
        if self._span:
            self._span.end(error)
            self._span = None


class _Links:
    """The channels of a connection, and its thread."""

    def __init__(self, core: BrokerCore, route: Route) -> None:
        self._core = core
        self._route = route
        self._lock = threading.Lock()
        self._closed = False
        self._channels: dict[str, grpc.Channel] = {}
        self._calls: dict[tuple[str, Method[Any]], Callable[..., Any]] = {}
        self._keeper: _Keeper | None = None

    def drive(self, steps: Steps[T]) -> T:
        """Takes the steps."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._take(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return cast(T, stop.value)

    def begin_and_drive(self, session: SessionCore, steps: Steps[T]) -> T:
        """Takes the steps of a call that may begin the session, which is kept from then on."""
        before = session.grant
        try:
            return self.drive(steps)
        finally:
            if session.grant is not before and session.grant is not None:
                self._keep(session)

    def close(self) -> None:
        """Ends everything that is this process's."""
        if not self._core.is_own_process():
            return
        with self._lock:
            self._closed = True
            channels, self._channels = list(self._channels.values()), {}
            self._calls.clear()
            keeper = self._keeper
        if keeper:
            keeper.stop()
        for channel in channels:
            channel.close()

    def _take(self, step: Step) -> Any:
        if isinstance(step, Call):
            return self._make(step)
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return self._answers(step.endpoint)

    def _make(self, call: Call) -> Any:
        metadata = self._metadata()
        span = traced(call.method, call.endpoint, metadata)
        made = self._callable(call.endpoint, call.method)
        try:
            if call.method.shape is Shape.ANSWERS:
                streaming = _Streaming(made(call.request, timeout=call.timeout, metadata=metadata), span)
                return streaming, streaming.first()
            answer = made(call.request, timeout=call.timeout, metadata=metadata)
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if span:
                span.end(failure)
            raise failure from None
        except BaseException as error:
            if span and call.method.shape is not Shape.ANSWERS:
                span.end(error)
            raise
        if span:
            span.end()
        return answer

    def renew(self, call: Call, done: Callable[[Any], None]) -> None:
        """Makes a call without waiting for its answer, which `done` is given, or its error."""
        future = self._callable(call.endpoint, call.method).future(  # type: ignore[attr-defined]
            call.request, timeout=call.timeout, metadata=self._metadata()
        )

        def answered(ended: grpc.Future[Any]) -> None:
            try:
                answer = ended.result()
            except grpc.RpcError as error:
                done(from_rpc_error(error))
            except grpc.FutureCancelledError:
                return
            else:
                done(answer)

        future.add_done_callback(answered)

    def attach(
        self, call: Call, session: SessionCore, detached: Callable[[Callable[[], object], Error | None], None]
    ) -> None:
        """Opens an Attach, of which only the end is waited for: `detached` is told of it."""
        opened = self._callable(call.endpoint, call.method)(call.request, metadata=self._metadata())
        cancel = opened.cancel
        session.attached(cancel)

        def ended() -> None:
            detached(cancel, None if opened.code() is grpc.StatusCode.OK else from_rpc_error(opened))

        if not opened.add_callback(ended):
            ended()

    def _metadata(self) -> Metadata:
        token = self._route.credential()
        if isinstance(token, Awaitable):
            if inspect.iscoroutine(token):
                token.close()
            raise ProgrammingError("credentials is a coroutine function: give a plain one, or use session_broker.aio")
        return bearer(token)

    def _callable(self, endpoint: str, method: Method[Any]) -> Callable[..., Any]:
        found = self._calls.get((endpoint, method))
        if found is None:
            with self._lock:
                channel = self._channel(endpoint)
                kinds: dict[Shape, Callable[..., Any]] = {
                    Shape.UNARY: channel.unary_unary,
                    Shape.ANSWERS: channel.unary_stream,
                    Shape.REQUESTS: channel.stream_unary,
                }
                found = kinds[method.shape](
                    method.path, request_serializer=serialize, response_deserializer=method.answer.FromString
                )
                self._calls[endpoint, method] = found
        return found

    def _channel(self, endpoint: str) -> grpc.Channel:
        if self._closed:
            raise closed()
        if endpoint not in self._channels:
            self._channels[endpoint] = self._open(endpoint)
        return self._channels[endpoint]

    def _open(self, endpoint: str) -> grpc.Channel:
        if self._route.channel_credentials:
            return grpc.secure_channel(endpoint, self._route.channel_credentials, options=self._route.options)
        return grpc.insecure_channel(endpoint, options=self._route.options)

    def _answers(self, endpoint: str) -> bool:
        """Whether a server does at the endpoint. Its channel stays open: other sessions may live there."""
        if not self._route.may_call(endpoint):
            return False
        with self._lock:
            channel = self._channel(endpoint)
        ready = grpc.channel_ready_future(channel)
        try:
            ready.result(timeout=PROBE_TIMEOUT)
        except grpc.FutureTimeoutError:
            return False
        finally:
            ready.cancel()
        return True

    def _keep(self, session: SessionCore) -> None:
        with self._lock:
            if self._closed:
                return
            if self._keeper is None:
                self._keeper = _Keeper(self)
            keeper = self._keeper
        keeper.add(session)


class _Keeper:
    """The thread that renews the leases of idle sessions."""

    def __init__(self, links: _Links) -> None:
        self._links = links
        self._schedule = Schedule()
        self._wake = threading.Condition()
        self._stopped = False
        threading.Thread(target=self._work, name="session-broker-keeper", daemon=True).start()

    def add(self, session: SessionCore, again: bool = False) -> None:
        """Has a session kept until it ends, or nobody holds it."""
        with self._wake:
            if self._schedule.add(session, again):
                self._wake.notify()

    def stop(self) -> None:
        """Ends the thread."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                if self._stopped:
                    return
                due = list(self._schedule.due())
                if not due:
                    self._wake.wait(self._schedule.wait)
            while due:
                self._renew(due.pop())

    def _renew(self, session: SessionCore) -> None:
        call = session.renewal()
        if call is None:
            return
        reference = weakref.ref(session)

        def done(answer: Any) -> None:
            kept = reference()
            if kept is not None:
                kept.renewed(call, answer)

        def detached(cancel: Callable[[], object], error: Error | None) -> None:
            kept = reference()
            if kept is not None and kept.detached(cancel, error):
                self.add(kept, again=True)

        try:
            if call.method.shape is Shape.ANSWERS:
                self._links.attach(call, session, detached)
            else:
                self._links.renew(call, done)
        except Exception as error:
            session.renewed(call, error)
