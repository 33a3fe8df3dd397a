"""The asyncio API: the names of the blocking one, with `await`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import sys
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
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
    no_credentials,
    serialize,
    traced,
)
from session_broker._protocol import CLOSE, Call, Method, Pause, Shape, Step, Steps
from session_broker._retry import backoff
from session_broker._session import SessionCore
from session_broker._statements import CallOptions, StatementLike
from session_broker._streams import CopyStream, RowStream, StreamCore
from session_broker.bulk import (
    PIECE_BYTES,
    AsyncCopyData,
    Copied,
    CopyOptions,
    Missed,
    Notification,
    SessionFilters,
    async_pieces,
    copy_options,
)
from session_broker.errors import Advice, BrokerUnavailable, EndReason, Error, InterfaceError, from_rpc_error
from session_broker.results import Commit, Engine, Outcome, Result, Row, TransactionState
from session_broker.values import Column
from sessionbroker.v1 import bulk_pb2
from sessionbroker.v1.admin_pb2 import SessionOverview
from sessionbroker.v1.error_pb2 import PgError
from sessionbroker.v1.session_pb2 import GetSessionResponse, SessionState

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from session_broker._tracing import Span

__all__ = ["Broker", "CopyOut", "Listener", "Session", "Stream", "connect"]

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
    """A connection to a broker, as `session_broker.connect`; `credentials` may be a coroutine function too.

    Raises:
        ProgrammingError: An argument is wrong, or credentials would go over a network in plain text.
        TypeError: There is no such argument.
    """
    route = Route(target, credentials, tls, plaintext_beyond_loopback, channel_options)
    return Broker(BrokerCore(target, retry or Retry(), follow_owner, session), route)


class Broker:
    """A connection to a broker, for the tasks of one event loop.

    Its sessions that are idle are kept by a task in the background, which ends with it.
    """

    def __init__(self, core: BrokerCore, route: Route) -> None:
        self._core = core
        self._links = _Links(core, route)
        self._finalizer = weakref.finalize(self, self._links.stop)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        return f"<session_broker.aio.Broker {self._core.target}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection. Sessions that are not closed are ended by their lease."""
        self._finalizer.detach()
        await self._links.close()

    def session(self, **overrides: Unpack[SessionArguments]) -> Session:
        """A session, with `connect`'s arguments or others. The broker is asked for it at its first use.

        Raises:
            ProgrammingError: An argument is wrong.
        """
        return Session(self, SessionCore(self._core, overrides), self._links)

    async def transaction(
        self, work: Callable[[Session], Awaitable[T]], *, attempts_max: int = 3, **overrides: Unpack[SessionArguments]
    ) -> T:
        """Awaits `work` with a session and commits; again from the start when the transaction is to be repeated.

        Raises:
            Error: As the last attempt raised it.
            CommitUnknown: Nobody could say whether it is committed; it is not repeated then.
        """
        for attempt in itertools.count(1):
            try:
                async with self.session(**overrides) as session:
                    return await work(session)
            except Error as error:
                if attempt >= attempts_max or error.advice not in (Advice.TRANSACTION, Advice.SESSION):
                    raise
            await asyncio.sleep(backoff(attempt))
        raise AssertionError("it counts for ever")

    async def run(
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
        """A whole transaction in one call, as `session_broker.Broker.run`.

        Raises:
            ExpectationFailed: A row count is not as expected; nothing is done.
            CommitUnknown: Nobody could say whether it is committed: repeat it with the same `idempotency_key`.
            DataError: Nothing is done; or, with `Error.commit`, it is committed, and Python cannot hold a value of its
                results.
            Error: As for `Session.execute`; nothing is done.
        """
        call = CallOptions(timeout=timeout, max_rows=max_rows, statement_class=statement_class)
        return await self._links.drive(self._core.run(statements, attempts_max, idempotency_key, call, options))

    async def resolve_commit(self, commit_token: str, wait: Seconds | None = None) -> Outcome:
        """What became of a transaction, by its commit token; waits up to 30 s while it is in progress.

        Raises:
            ProgrammingError: The token is none of this caller's.
            BrokerUnavailable: No broker answers.
            OperationalError: PostgreSQL cannot be asked.
        """
        return await self._links.drive(self._core.resolve_commit(commit_token, timeout_seconds(wait)))

    async def listen(self, *channels: str, engine: str | None = None, profile: str | None = None) -> Listener:
        """What NOTIFY sends on the channels from now on.

        Channels' names are taken as they are: NOTIFY without quotes folds them to lower case.

        Raises:
            ProgrammingError: There is no such engine or profile, or a channel's name is wrong.
            OperationalError: PostgreSQL cannot be reached, or has its maximum of listeners.
        """
        return Listener(await self._links.drive(self._core.listen(channels, engine, profile)))

    async def sessions(self, **filters: Unpack[SessionFilters]) -> list[SessionOverview]:
        """The live sessions of the broker that answers, for principals with the admin right.

        Raises:
            OperationalError: The caller has it not.
        """
        return await self._links.drive(self._core.sessions(filters))

    async def terminate(self, session_id: str, reason: str) -> EndReason:
        """Ends a session, for principals with the admin right: its transaction is rolled back. Says why it ended.

        Raises:
            SessionUnknown: There is none of that id.
            OperationalError: The caller has not the right.
        """
        return await self._links.drive(self._core.terminate(session_id, reason))


class Session:
    """A session, as `session_broker.Session`. One task at a time uses it: another hears `InterfaceError`.

    A call that is cancelled leaves its transaction in doubt: `rollback` it, as leaving the `async with` does.
    """

    def __init__(self, broker: Broker, core: SessionCore, links: _Links) -> None:
        self._broker = broker
        self._core = core
        self._links = links
        self._incoming: Stream | CopyOut | None = None

    def __repr__(self) -> str:
        return f"<session_broker.aio.Session {self.id or 'not begun'}{', closed' if self.closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.commit()
        finally:
            await self.close()

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

    async def get_bind(self) -> Engine:
        """What is behind it; the broker is asked once.

        Raises:
            Error: As for `info`.
        """
        return await self._links.begin_and_drive(self._core, self._core.engine())

    async def execute(
        self,
        sql: str,
        params: Sequence[object] = (),
        *,
        commit: bool = False,
        timeout: Seconds | None = None,
        max_rows: int | None = None,
        statement_class: str = "",
    ) -> Result:
        """Runs one statement, as `session_broker.Session.execute`.

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
        call = CallOptions(commit, timeout, max_rows, statement_class)
        return await self._links.begin_and_drive(self._core, self._core.execute(sql, params, call))

    async def stream(
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
        call = CallOptions(commit, timeout, max_rows, statement_class)
        core, streaming = await self._links.begin_and_drive(self._core, self._core.stream(sql, params, call))
        stream = self._incoming = Stream(core, streaming)
        return stream

    async def batch(
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
        call = CallOptions(commit, timeout, max_rows, statement_class)
        return await self._links.begin_and_drive(self._core, self._core.batch(statements, call))

    async def copy_in(
        self,
        table: str,
        data: AsyncCopyData,
        *,
        columns: Sequence[str] = (),
        commit: bool = False,
        timeout: Seconds | None = None,
        statement_class: str = "",
        **options: Unpack[CopyOptions],
    ) -> Copied:
        """COPY FROM STDIN into `TABLE` or `SCHEMA.TABLE`.

        `data` is bytes, a binary file, or an iterable of bytes, asynchronous or not.

        Raises:
            DataError: The data is wrong; `pg.where` says in which line.
            Error: As for `execute`. What reading `data` raises goes on as it is, and nothing is copied.
        """
        target = bulk_pb2.CopyInTarget(table=table, columns=columns, options=copy_options(options))
        pump = _Pump(data)
        call = CallOptions(commit=commit, timeout=timeout, statement_class=statement_class)
        try:
            return await self._links.begin_and_drive(self._core, self._core.copy_in(target, pump.messages, call))
        except Error:
            if pump.error is not None:
                raise pump.error from None
            raise

    async def copy_out(
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
        core, streaming = await self._links.begin_and_drive(self._core, self._core.copy_out(request, call))
        copy = self._incoming = CopyOut(core, streaming)
        return copy

    def begin(self, **options: Unpack[TransactionArguments]) -> None:
        """Says how the next transaction begins: `isolation_level`, `read_only`, `deferrable`. Nothing is sent.

        Raises:
            ProgrammingError: A transaction is open, or an option is wrong.
        """
        self._core.begin(options)

    async def commit(self) -> Commit:
        """Ends the transaction, as `session_broker.Session.commit`.

        Raises:
            CommitRolledBack, IntegrityError, OperationalError: It was rolled back instead.
            CommitUnknown: Nobody could say; `commit_token` is for `Broker.resolve_commit`.
            SessionEnded, SessionUnknown: The session was over before; nothing is committed.
        """
        return await self._links.drive(self._core.commit())

    async def rollback(self, savepoint: str | None = None) -> None:
        """Ends the transaction without its writes, as `session_broker.Session.rollback`.

        Raises:
            ProgrammingError: There is no savepoint of that name; the transaction stands as before.
            Error: With a savepoint, as for `execute`.
        """
        if self._incoming:
            await self._incoming._leave()
        await self._links.drive(self._core.rollback(savepoint))

    async def create_savepoint(self, name: str) -> None:
        """Sets a savepoint.

        Raises:
            Error: As for `execute`.
        """
        await self._links.begin_and_drive(self._core, self._core.create_savepoint(name))

    async def release_savepoint(self, name: str) -> None:
        """Forgets a savepoint, and keeps what was done since.

        Raises:
            ProgrammingError: There is none of that name.
            Error: As for `execute`.
        """
        await self._links.drive(self._core.release_savepoint(name))

    @contextlib.asynccontextmanager
    async def savepoint(self, name: str = "savepoint") -> AsyncIterator[None]:
        """A nested transaction: on an error in the block, what was done in it is undone, and the error goes on.

        Raises:
            Error: As for `execute`.
        """
        await self.create_savepoint(name)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Error):
                await self.rollback(name)
                await self.release_savepoint(name)
            raise
        await self.release_savepoint(name)

    async def cancel(self) -> bool:
        """Stops the running statement, from another task; false when none runs. Returns when it has stopped.

        Raises:
            OperationalError: PostgreSQL could not be asked.
        """
        return await self._links.drive(self._core.cancel())

    async def info(self) -> GetSessionResponse:
        """What is behind the session: engine, database, user, server version, backend, pool.

        Raises:
            SessionUnknown: It ended long ago.
            BrokerUnavailable: No answer came.
        """
        return await self._links.begin_and_drive(self._core, self._core.info())

    async def close(self) -> None:
        """Ends the session; what was not committed is rolled back. A second time it does nothing.

        Raises:
            InterfaceError: Another task uses it.
        """
        if self._incoming:
            await self._incoming._leave()
        await self._links.drive(self._core.close())

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

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

    async def __aiter__(self) -> AsyncIterator[T]:
        """What has not been read yet.

        Raises:
            InterfaceError: It has failed or was closed before.
            Error: The result is not complete.
        """
        while True:
            for item in self._items:
                yield item
            if not await self._read():
                return

    async def close(self) -> None:
        """Ends it. Before its end that stops the statement, and the transaction has failed.

        Where it was to commit, it may have: `Session.commit` tells.
        """
        self._call.cancel()
        self._incoming.left()

    async def _leave(self) -> None:
        """Ends it for the session.

        Raises:
            InterfaceError: Another task reads it.
        """
        if self._reading:
            raise InterfaceError("another task reads a stream of this session: give each a session of its own")
        await self.close()

    async def _read(self) -> bool:
        """Reads the next part; false when there is none."""
        if not self._incoming.open:
            self._incoming.check_complete()
            return False
        self._reading = True
        try:
            part = await self._call.next()
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
            await self.close()
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

    async def fetchmany(self, size: int) -> list[Row]:
        """The next rows, so many or all that are left.

        Raises:
            InterfaceError: It has failed or was closed before.
            Error: The result is not complete.
        """
        rows = list(itertools.islice(self._items, size))
        while len(rows) < size and await self._read():
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[Notification | Missed]:
        """What comes. `Missed` says that what depends on notifications is to be read again.

        Raises:
            OperationalError: The broker stops: listen anew, and read again.
            BrokerUnavailable: The connection is lost: as before.
        """
        while (message := await self._call.next()) is not None:
            told = notified(message)
            if told is not None:
                yield told

    async def close(self) -> None:
        """Ends it."""
        self._call.cancel()


class _Pump:
    """The messages of a COPY FROM STDIN. Where the data fails, they stop before their end."""

    def __init__(self, data: AsyncCopyData) -> None:
        self._data = data
        self.error: BaseException | None = None

    async def messages(self, target: bulk_pb2.CopyInTarget) -> AsyncIterator[bulk_pb2.CopyInRequest]:
        """The target, the data, the end."""
        yield bulk_pb2.CopyInRequest(target=target)
        try:
            async for data in async_pieces(self._data):
                for start in range(0, len(data), PIECE_BYTES):
                    yield bulk_pb2.CopyInRequest(data=bytes(data[start : start + PIECE_BYTES]))
        except Exception as error:
            self.error = error
        else:
            yield bulk_pb2.CopyInRequest(end=bulk_pb2.CopyInEnd())


class _Streaming:
    """A call of which messages come, with its span."""

    def __init__(self, call: Any, span: Span | None, links: _Links) -> None:
        self._call = call
        self._span = span
        self._links = links
        self._interrupted = False

    async def first(self) -> Any:
        """The first message.

        Raises:
            Error: The call failed.
        """
        message = await self.next()
        if message is None:
            raise BrokerUnavailable("the stream ended before it began")
        return message

    async def next(self) -> Any:
        """The next message, or none.

        Raises:
            Error: The call failed.
        """
        if self._interrupted:
            raise BrokerUnavailable("a read of the stream was cancelled, which ended it: the result is not complete")
        try:
            message = await self._call.read()
        except asyncio.CancelledError as error:
            self._interrupted = True
            self._end(error)
            self._links.check_open(error)
            raise
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            self._end(failure)
            raise failure from None
        if message is grpc.aio.EOF:
            self._end(None)
            return None
        return message

    def cancel(self) -> None:
        """Ends it."""
        self._call.cancel()
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self._span:
            self._span.end(error)
            self._span = None


class _Links:
    """The channels of a connection, and its task."""

    def __init__(self, core: BrokerCore, route: Route) -> None:
        self._core = core
        self._route = route
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._calls: dict[tuple[str, Method[Any]], Callable[..., Any]] = {}
        self._keeper: _Keeper | None = None
        self._lasting: set[asyncio.Future[Any]] = set()

    async def drive(self, steps: Steps[T]) -> T:
        """Takes the steps."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._take(step)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return cast(T, stop.value)

    async def begin_and_drive(self, session: SessionCore, steps: Steps[T]) -> T:
        """Takes the steps of a call that may begin the session, which is kept from then on."""
        before = session.grant
        try:
            return await self.drive(steps)
        finally:
            if session.grant is not before and session.grant is not None and not self._closed:
                if self._keeper is None:
                    self._keeper = _Keeper(self)
                self._keeper.add(session)

    def stop(self) -> None:
        """Ends what runs in the background."""
        self._closed = True
        if self._keeper and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._keeper.stop)

    async def close(self) -> None:
        """Ends everything, when what has to come to its end has."""
        if self._loop is asyncio.get_running_loop():
            await self._to_its_end(self._close(list(self._lasting)))
        else:
            await self._close([])

    async def _close(self, lasting: list[asyncio.Future[Any]]) -> None:
        if lasting:
            await asyncio.wait(lasting)
        self.stop()
        channels, self._channels = list(self._channels.values()), {}
        self._calls.clear()
        for channel in channels:
            await channel.close()

    async def _take(self, step: Step) -> Any:
        if isinstance(step, Call):
            made = self.make(step)
            return await (self._to_its_end(made) if step.method is CLOSE else made)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await self._answers(step.endpoint)

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits what goes on when its task is cancelled."""
        task = asyncio.ensure_future(work)
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)
        return await asyncio.shield(task)

    def check_open(self, cancelled: asyncio.CancelledError) -> None:
        """Tells a call that ended with its connection from one whose task is cancelled.

        Raises:
            InterfaceError: The connection was closed while the call was under way.
        """
        task = asyncio.current_task()
        # Before Python 3.11 a task cannot say so.
        if self._closed and not (task and sys.version_info >= (3, 11) and task.cancelling()):
            error = closed()
            error.code = grpc.StatusCode.CANCELLED
            raise error from cancelled

    async def make(self, call: Call) -> Any:
        """Makes a call."""
        metadata = await self._metadata()
        span = traced(call.method, call.endpoint, metadata)
        made = self._callable(call.endpoint, call.method)
        sent = made(call.request, timeout=call.timeout, metadata=metadata)
        if call.method.shape is Shape.ANSWERS:
            streaming = _Streaming(sent, span, self)
            return streaming, await streaming.first()
        try:
            answer = await sent
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if span:
                span.end(failure)
            raise failure from None
        except BaseException as error:
            if span:
                span.end(error)
            if isinstance(error, asyncio.CancelledError):
                self.check_open(error)
            raise
        if span:
            span.end()
        return answer

    async def open(self, call: Call) -> Any:
        """Makes a call that is answered in many messages, and waits for none of them."""
        metadata = await self._metadata()
        return self._callable(call.endpoint, call.method)(call.request, metadata=metadata)

    async def _metadata(self) -> Metadata:
        token = self._route.credential()
        if inspect.isawaitable(token):
            try:
                token = await token
            except Exception as error:
                raise no_credentials(error) from error
        return bearer(token)

    def _callable(self, endpoint: str, method: Method[Any]) -> Callable[..., Any]:
        found = self._calls.get((endpoint, method))
        if found is None or self._loop is not asyncio.get_running_loop():
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

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if self._closed:
            raise closed()
        self._loop = self._loop or asyncio.get_running_loop()
        if self._loop is not asyncio.get_running_loop():
            raise InterfaceError("the connection belongs to another event loop: call aio.connect() in each")
        if endpoint not in self._channels:
            self._channels[endpoint] = self._open(endpoint)
        return self._channels[endpoint]

    def _open(self, endpoint: str) -> grpc.aio.Channel:
        if self._route.channel_credentials:
            return grpc.aio.secure_channel(endpoint, self._route.channel_credentials, options=self._route.options)
        return grpc.aio.insecure_channel(endpoint, options=self._route.options)

    async def _answers(self, endpoint: str) -> bool:
        """Whether a server does at the endpoint. Its channel stays open: other sessions may live there."""
        if not self._route.may_call(endpoint):
            return False
        channel = self._channel(endpoint)
        try:
            await asyncio.wait_for(channel.channel_ready(), PROBE_TIMEOUT)
        except asyncio.TimeoutError:
            return False
        return True


class _Keeper:
    """The task that renews the leases of idle sessions."""

    def __init__(self, links: _Links) -> None:
        self._links = links
        self._schedule = Schedule()
        self._wake = asyncio.Event()
        self._renewals: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._work(), name="session-broker-keeper")

    def add(self, session: SessionCore, again: bool = False) -> None:
        """Has a session kept until it ends, or nobody holds it."""
        if self._schedule.add(session, again):
            self._wake.set()

    def stop(self) -> None:
        """Ends the task."""
        for task in (self._task, *self._renewals):
            task.cancel()

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            for session in self._schedule.due():
                call = session.renewal()
                if call is not None:
                    keep = self._attach if call.method.shape is Shape.ANSWERS else self._renew
                    renewal = asyncio.create_task(keep(call, weakref.ref(session)))
                    self._renewals.add(renewal)
                    renewal.add_done_callback(self._renewals.discard)
                del session
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._schedule.wait)

    async def _attach(self, call: Call, reference: weakref.ref[SessionCore]) -> None:
        """Opens an Attach, of which only the end is waited for."""
        try:
            opened = await self._links.open(call)
        except Exception as failure:
            session = reference()
            if session is not None:
                session.renewed(call, failure)
            return
        cancel, error = opened.cancel, None
        session = reference()
        if session is None:
            cancel()
            return
        session.attached(cancel)
        del session
        try:
            while await opened.read() is not grpc.aio.EOF:
                pass
        except grpc.RpcError as failure:
            error = from_rpc_error(failure)
        session = reference()
        if session is not None and session.detached(cancel, error):
            self.add(session, again=True)

    async def _renew(self, call: Call, reference: weakref.ref[SessionCore]) -> None:
        answer: Any
        try:
            answer = await self._links.make(call)
        except Exception as error:
            answer = error
        session = reference()
        if session is not None:
            session.renewed(call, answer)
