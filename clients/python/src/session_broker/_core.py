"""What a client does, without doing it: the steps of each call, and what its answer means for the session.

Invariants: a numbered call whose answer was lost is repeated with its number or not at all; after a call that may still
be on its way, the session goes on only as another one, which the late call cannot reach.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import Message

from session_broker import _protocol
from session_broker._arguments import (
    Retry,
    RunArguments,
    Seconds,
    SessionArguments,
    TransactionArguments,
    begin_request,
    check_names,
    connect_options,
    session_options,
    timeout_seconds,
    transaction_options,
)
from session_broker._protocol import Call, Method, Pause, Probe, Shape, Steps, duration, seconds
from session_broker.bulk import Copied, Missed, Notification, SessionFilters, list_request
from session_broker.errors import (
    Advice,
    BrokerUnavailable,
    CommitRolledBack,
    CommitUnknown,
    EndReason,
    Error,
    InterfaceError,
    ProgrammingError,
    SessionEnded,
    SessionUnknown,
)
from session_broker.results import AtLeast, Commit, Engine, Outcome, Result, Row, Statement, TransactionState
from session_broker.values import RESULT_FORMAT, Column, check_loaders, row_decoder, to_parameter_sets, to_parameters
from sessionbroker.v1 import admin_pb2, bulk_pb2, notification_pb2, run_pb2, session_pb2, transaction_pb2, value_pb2
from sessionbroker.v1.error_pb2 import PgError
from sessionbroker.v1.session_pb2 import SessionState

# The gRPC deadline of calls that run no statement: the broker answers them at once, or PostgreSQL is in trouble.
CALL_TIMEOUT = 30.0
# Nobody waits long for the end of a session: its lease ends it too.
CLOSE_TIMEOUT = 5.0
# How long commit() itself asks what became of a commit whose answer was lost.
RESOLVE_TIME_MAX = 10.0
# How long an owner that did not answer is not asked again.
UNREACHABLE_TIME = 30.0
# The first pause before a repeat for which the broker named none, doubled each time up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

_ONCE = Retry(attempts_max=1)
_NOTHING = Commit(Outcome.NOTHING_WRITTEN)

T = TypeVar("T")
AnyStream = TypeVar("AnyStream", bound="StreamCore[Any]")

StatementLike = Statement | tuple[str, Sequence[object]] | str


@dataclass(frozen=True)
class CallOptions:
    """How a statement is run."""

    commit: bool = False
    timeout: Seconds | None = None
    max_rows: int | None = None
    statement_class: str = ""


class Attempts:
    """The attempts of one call."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._began = time.monotonic()
        self._made = 0
        self.lost = False

    @property
    def elapsed(self) -> float:
        """Seconds since the first."""
        return time.monotonic() - self._began

    def pause_after(self, error: Error, *, safe: bool, unchanged: bool) -> float | None:
        """How long to wait before the next, if there is to be one.

        `safe` says that it may be repeated when its answer was lost; `unchanged` that the transaction stands as it did
        before the call.
        """
        self._made += 1
        self.lost = self.lost or is_lost(error)
        repeatable = safe if is_lost(error) else error.advice is Advice.CALL and unchanged
        pause = error.retry_delay or backoff(self._made)
        if not repeatable or self._made >= self._retry.attempts_max or self.elapsed + pause > self._retry.time_max:
            return None
        return pause


def is_lost(error: Error) -> bool:
    """Whether the call may have reached the broker, and its answer did not come."""
    return not error.reason and error.advice is not Advice.CALL


def backoff(attempt: int) -> float:
    """The pause after the attempt of that number, counted from 1: at random between half and all of it."""
    return min(FIRST_PAUSE * 2.0 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1)


class BrokerCore:
    """A broker's address, and what is asked of it without a session."""

    def __init__(self, target: str, retry: Retry, follow_owner: bool, arguments: SessionArguments) -> None:
        begin_request(arguments)
        self.target = target
        self.retry = retry
        self.arguments = arguments
        self._process = os.getpid()
        self._run_defaults = {k: v for k, v in arguments.items() if k in RunArguments.__annotations__}
        self._follow_owner = follow_owner
        self._unreachable: dict[str, float] = {}
        self._reachable: set[str] = set()

    def check_process(self) -> None:
        """Refuses another process: a channel's threads do not survive a fork.

        Raises:
            InterfaceError: This is not the process that made it.
        """
        if not self.is_own_process():
            raise InterfaceError(
                "this connection was used before the process forked: call session_broker.connect() in the child"
            )

    def is_own_process(self) -> bool:
        """Whether this is the process that made it."""
        return os.getpid() == self._process

    def session(self, overrides: SessionArguments) -> SessionCore:
        """A session with these arguments over the connection's own."""
        return SessionCore(self, SessionArguments(**{**self.arguments, **overrides}))

    def repeat(
        self,
        method: Method[Any],
        request: Message,
        *,
        safe: bool,
        timeout: float | None = CALL_TIMEOUT,
        endpoint: str = "",
        attempts: Attempts | None = None,
        unchanged: Callable[[Error], bool] = lambda _: True,
    ) -> Steps[Any]:
        """Makes a call, again where that is safe."""
        attempts = attempts or Attempts(self.retry)
        while True:
            remaining = None if timeout is None else max(timeout - attempts.elapsed, 0.001)
            try:
                return (yield Call(method, request, endpoint or self.target, remaining))
            except Error as error:
                pause = attempts.pause_after(error, safe=safe, unchanged=unchanged(error))
                if pause is None or (timeout is not None and attempts.elapsed + pause >= timeout):
                    raise
            yield Pause(pause)

    def owner(self, endpoint: str) -> Steps[str]:
        """Where calls on a session go that lives at `endpoint`: there, if it answers."""
        host = endpoint.rpartition(":")[0].strip("[]")
        if not self._follow_owner or not host or host in ("0.0.0.0", "::") or endpoint == self.target:
            return self.target
        if endpoint in self._reachable:
            return endpoint
        if time.monotonic() < self._unreachable.get(endpoint, 0.0):
            return self.target
        if (yield Probe(endpoint)):
            self._reachable.add(endpoint)
            return endpoint
        self._unreachable[endpoint] = time.monotonic() + UNREACHABLE_TIME
        return self.target

    def lost_owner(self, endpoint: str) -> None:
        """The owner did not answer: sessions that begin from now on ask anew whether it does."""
        self._reachable.discard(endpoint)

    def run(
        self,
        statements: Sequence[StatementLike],
        attempts_max: int,
        idempotency_key: str | None,
        options: CallOptions,
        arguments: RunArguments,
    ) -> Steps[list[Result]]:
        """A whole transaction in one call."""
        check_names(arguments, RunArguments, "run")
        merged = cast(RunArguments, {**self._run_defaults, **arguments})
        request = run_pb2.RunRequest(
            engine=merged.get("engine", ""),
            options=session_options(merged),
            statements=[_run_statement(index, statement) for index, statement in enumerate(statements)],
            max_rows=options.max_rows or 0,
            profile=merged.get("profile", ""),
            attempts_max=attempts_max,
            idempotency_key=idempotency_key or "",
        )
        setattr(request, "class", options.statement_class)
        if "connect_options" in merged:
            request.connect_options.CopyFrom(connect_options(merged["connect_options"]))
        read_only = merged.get("read_only", False)
        safe, timeout = bool(idempotency_key) or read_only, timeout_seconds(options.timeout)
        attempts = Attempts(self.retry)
        try:
            answer = yield from self.repeat(_protocol.RUN, request, safe=safe, timeout=timeout, attempts=attempts)
        except Error as error:
            if read_only or not attempts.lost or error.commit is not None:
                raise
            raise _unknown("run", None, error) from error
        loaders = self.arguments.get("loaders", {})
        commit = Commit.of(answer.commit)
        return [_result(result, loaders, packed=False, commit=commit) for result in answer.results]

    def resolve_commit(self, commit_token: str, wait: float | None) -> Steps[Outcome]:
        """What became of a transaction."""
        request = session_pb2.ResolveCommitRequest(commit_token=commit_token)
        if wait is not None:
            request.wait.CopyFrom(duration(wait))
        answer = yield from self.repeat(
            _protocol.RESOLVE_COMMIT, request, safe=True, timeout=CALL_TIMEOUT + (wait or 0)
        )
        return Outcome(answer.outcome)

    def sessions(self, filters: SessionFilters) -> Steps[list[admin_pb2.SessionOverview]]:
        """The broker's live sessions, page by page."""
        request = list_request(filters)
        found: list[admin_pb2.SessionOverview] = []
        while True:
            answer = yield from self.repeat(_protocol.LIST_SESSIONS, request, safe=True)
            found += answer.sessions
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    def terminate(self, session_id: str, reason: str) -> Steps[EndReason]:
        """Ends a session of whoever's."""
        request = admin_pb2.TerminateSessionRequest(session_id=session_id, reason=reason)
        answer = yield from self.repeat(_protocol.TERMINATE_SESSION, request, safe=True)
        return EndReason(answer.end_reason)

    def listen(self, channels: Sequence[str], engine: str | None, profile: str | None) -> Steps[Any]:
        """A stream of notifications, which begins when the broker listens."""
        request = notification_pb2.ListenRequest(
            engine=self.arguments.get("engine", "") if engine is None else engine,
            profile=self.arguments.get("profile", "") if profile is None else profile,
            channels=channels,
        )
        call, _ = yield from self.repeat(_protocol.LISTEN, request, safe=True, timeout=None)
        return call


def notified(message: notification_pb2.ListenResponse) -> Notification | Missed | None:
    """What a message of Listen says; nothing for what this client does not know."""
    if message.HasField("notification"):
        told = message.notification
        return Notification(told.channel, told.payload, told.backend_pid)
    return Missed() if message.HasField("missed") else None


@dataclass(frozen=True)
class _Doubt:
    """Why a transaction cannot go on but by rolling back."""

    why: str
    on_its_way: bool
    """The call may reach the broker late: nothing that comes after it may run in the same session."""


_LOST = _Doubt("the answer to a statement was lost", True)
_LEFT = _Doubt("a statement was left before its answer came", True)
_STREAM_CLOSED = _Doubt("a stream was closed before its end", False)


@dataclass
class _Grant:
    """A session as the broker granted it."""

    token: str = field(repr=False)
    id: str
    endpoint: str
    seq: int = 0


class SessionCore:
    """A session: what is known of it, and the steps of its calls.

    It is granted at its first call, and again after `rollback` when the broker's has ended or a call of it was left.
    """

    def __init__(self, broker: BrokerCore, arguments: SessionArguments) -> None:
        self._broker = broker
        self._request = begin_request(arguments)
        self.timeout = timeout_seconds(arguments.get("timeout"))
        self.attach = arguments.get("attach", False)
        self.loaders = arguments.get("loaders", {})
        check_loaders(self.loaders)
        self.grant: _Grant | None = None
        self.state: SessionState | None = None
        self.closed = False
        self.renew_at = 0.0
        self.renew_after = 1.0
        self._turn = threading.Lock()
        self._streams = False
        self._ended: Error | None = None
        self._doubt: _Doubt | None = None
        self._commit = _NOTHING
        self._commit_lost: tuple[str | None] | None = None
        self._next_transaction: transaction_pb2.TransactionOptions | None = None
        self._engine: Engine | None = None

    # What is known.

    @property
    def transaction(self) -> TransactionState:
        """Where the transaction stands."""
        return TransactionState(self.state.transaction_state) if self.state else TransactionState.NONE

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._turn.locked()

    def renewal(self) -> Call | None:
        """The call that keeps the session, if it is to be kept."""
        if not self.grant or self._ended or self.closed:
            return None
        request = session_pb2.KeepAliveRequest(session_token=self.grant.token)
        return Call(_protocol.KEEP_ALIVE, request, self.grant.endpoint, CLOSE_TIMEOUT)

    def renewed(self, answer: session_pb2.KeepAliveResponse | Error) -> None:
        """Takes note of a renewal, which came beside the session's calls: it moves no state."""
        if isinstance(answer, SessionEnded | SessionUnknown):
            self.renew_at = float("inf")
        elif isinstance(answer, Error):
            self.renew_at = time.monotonic()
        else:
            self._renew_after(answer.state)

    def _note(self, state: SessionState) -> None:
        self.state = state
        self._renew_after(state)

    def _renew_after(self, state: SessionState) -> None:
        self.renew_after = seconds(state.renew_after)
        self.renew_at = time.monotonic() + self.renew_after

    # Whose turn it is.

    def take_turn(self) -> None:
        """Begins a call.

        Raises:
            InterfaceError: The session is closed, in use, or another process's.
        """
        self._broker.check_process()
        if not self._turn.acquire(blocking=False):
            if self._streams:
                raise InterfaceError("a stream of this session is open: read it to its end, or close it")
            raise InterfaceError("the session is in use by another thread or task: give each a session of its own")
        if self.closed:
            self._turn.release()
            raise InterfaceError("the session is closed: begin another with Broker.session()")

    def end_turn(self) -> None:
        """Ends a call."""
        self._turn.release()

    def abandon(self) -> None:
        """Lets the session go without a call: its lease ends it."""
        self.closed = True

    # Calls.

    def execute(self, sql: str, params: Sequence[object], options: CallOptions) -> Steps[Result]:
        """One statement."""
        self.take_turn()
        try:
            request = session_pb2.ExecuteRequest(
                sql=sql,
                parameters=to_parameters(params),
                commit=options.commit,
                result_format=RESULT_FORMAT,
                max_rows=options.max_rows or 0,
            )
            setattr(request, "class", options.statement_class)
            answer = yield from self._numbered(_protocol.EXECUTE, request, options.timeout)
            committed = self._committed(answer)
            return _result(answer, self.loaders, packed=True, commit=committed)
        finally:
            self.end_turn()

    def batch(self, statements: Sequence[StatementLike], options: CallOptions) -> Steps[list[Result]]:
        """Many statements."""
        self.take_turn()
        try:
            request = session_pb2.ExecuteBatchRequest(
                statements=[_batch_statement(index, statement) for index, statement in enumerate(statements)],
                commit=options.commit,
                max_rows=options.max_rows or 0,
            )
            setattr(request, "class", options.statement_class)
            answer = yield from self._numbered(_protocol.EXECUTE_BATCH, request, options.timeout)
            committed = self._committed(answer)
            return [_result(result, self.loaders, packed=False, commit=committed) for result in answer.results]
        finally:
            self.end_turn()

    def stream(self, sql: str, params: Sequence[object], options: CallOptions) -> Steps[tuple[RowStream, Any]]:
        """A statement whose rows come as they are read. Its turn lasts until the stream ends.

        Returns the stream and the shell's call.
        """
        self.take_turn()
        try:
            request = session_pb2.ExecuteStreamRequest(
                sql=sql,
                parameters=to_parameters(params),
                commit=options.commit,
                result_format=RESULT_FORMAT,
                max_rows=options.max_rows or 0,
            )
            setattr(request, "class", options.statement_class)
            call, first = yield from self._statement(_protocol.EXECUTE_STREAM, request, options.timeout)
            return self._streaming(RowStream(self, options.commit), first), call
        finally:
            if not self._streams:
                self.end_turn()

    def copy_in(
        self,
        target: bulk_pb2.CopyInTarget,
        messages: Callable[[bulk_pb2.CopyInTarget], Any],
        options: CallOptions,
    ) -> Steps[Copied]:
        """COPY FROM STDIN. `messages` makes the shell's request of the target."""
        self.take_turn()
        try:
            context = _copy_context(target.context, options)
            yield from self._begin()
            answer = yield from self._statement(_protocol.COPY_IN, messages(target), options.timeout, context=context)
            return Copied(answer.row_count, answer.byte_count, self._committed(answer), list(answer.notices))
        finally:
            self.end_turn()

    def copy_out(self, request: bulk_pb2.CopyOutRequest, options: CallOptions) -> Steps[tuple[CopyStream, Any]]:
        """COPY TO STDOUT: the stream, and the shell's call."""
        self.take_turn()
        try:
            context = _copy_context(request.context, options)
            call, first = yield from self._statement(_protocol.COPY_OUT, request, options.timeout, context=context)
            return self._streaming(CopyStream(self, options.commit), first), call
        finally:
            if not self._streams:
                self.end_turn()

    def _streaming(self, stream: AnyStream, first: Any) -> AnyStream:
        """Has the stream begin, and keep its turn until it ends."""
        stream.begin(first)
        self._streams = True
        return stream

    def begin(self, options: TransactionArguments) -> None:
        """Notes how the next transaction begins."""
        if self.transaction is not TransactionState.NONE:
            raise ProgrammingError("a transaction is open: begin() is for the next one, after commit or rollback")
        self._next_transaction = transaction_options(**options)

    def commit(self) -> Steps[Commit]:
        """Ends the transaction."""
        self.take_turn()
        try:
            if not self._commit_lost:
                self._check_usable()
                if self.transaction is TransactionState.NONE:
                    return self._commit
            return (yield from self._settled())
        finally:
            self.end_turn()

    def _settled(self) -> Steps[Commit]:
        """Commits, and asks what became of it where nobody answers."""
        was_lost, token = self._commit_lost is not None, _token(self.state)
        if self._commit_lost:
            (token,) = self._commit_lost
        attempts = Attempts(self._broker.retry)
        # Whatever interrupts this, the next commit() asks on.
        self._commit_lost = (token,)
        try:
            if self._ended:
                raise self._ended
            request = session_pb2.CommitRequest(session_token=self._granted().token)
            answer = yield from self._ask(_protocol.COMMIT, request, safe=True, attempts=attempts)
        except Error as error:
            if isinstance(error, CommitUnknown):
                token = error.commit_token or token
            elif _is_told(error) or not (was_lost or attempts.lost):
                self._commit_lost = None
                raise
            self._commit_lost = (token,)
            return (yield from self._resolved(token, error))
        self._commit_lost = None
        self._commit = Commit.of(answer)
        return self._commit

    def _resolved(self, token: str | None, cause: Error) -> Steps[Commit]:
        """Asks by the commit token. The broker's session may hang: it is left when all is known."""
        if not token:
            raise _unknown("commit", None, cause) from cause
        try:
            outcome = yield from self._broker.resolve_commit(token, RESOLVE_TIME_MAX)
        except Error as error:
            raise _unknown("commit", token, error) from cause
        if outcome not in (Outcome.COMMITTED, Outcome.ROLLED_BACK):
            raise _unknown("commit", token, cause) from cause
        transaction_id = self.state.transaction_id if self.state else 0
        self._commit_lost = None
        self._forget()
        if outcome is Outcome.ROLLED_BACK:
            rolled_back = CommitRolledBack(
                "the commit's answer was lost, and the transaction was rolled back: repeat it"
            )
            rolled_back.advice = Advice.SESSION
            raise rolled_back from cause
        self._commit = Commit(outcome, token, transaction_id)
        return self._commit

    def rollback(self, savepoint: str | None = None) -> Steps[None]:
        """Ends the transaction without its writes, or goes back to a savepoint. Makes the session usable again."""
        self.take_turn()
        try:
            if savepoint is not None:
                yield from self._rollback_to(savepoint)
                return
            self._next_transaction = self._commit_lost = None
            self._commit = _NOTHING
            if not self.grant:
                return
            if self._ended or (self._doubt and self._doubt.on_its_way):
                yield from self._leave()
            elif self._doubt or self.transaction is not TransactionState.NONE:
                request = session_pb2.RollbackRequest(session_token=self.grant.token)
                try:
                    yield from self._ask(_protocol.ROLLBACK, request, safe=True)
                    self._doubt = None
                except (BrokerUnavailable, SessionEnded, SessionUnknown):
                    self._forget()
        finally:
            self.end_turn()

    def _rollback_to(self, savepoint: str) -> Steps[None]:
        if not self._doubt or self._doubt.on_its_way:
            self._check_usable()
        request = session_pb2.RollbackRequest(session_token=self._granted().token, savepoint=savepoint)
        yield from self._ask(_protocol.ROLLBACK, request, safe=True)
        self._doubt = None

    def create_savepoint(self, name: str) -> Steps[None]:
        """Sets a savepoint."""
        self.take_turn()
        try:
            request = session_pb2.CreateSavepointRequest(name=name)
            yield from self._statement(_protocol.CREATE_SAVEPOINT, request, None)
        finally:
            self.end_turn()

    def release_savepoint(self, name: str) -> Steps[None]:
        """Forgets a savepoint."""
        self.take_turn()
        try:
            request = session_pb2.ReleaseSavepointRequest(name=name)
            yield from self._statement(_protocol.RELEASE_SAVEPOINT, request, None)
        finally:
            self.end_turn()

    def cancel(self) -> Steps[bool]:
        """Stops the running statement. Waits for no turn."""
        self._broker.check_process()
        if not self.grant:
            return False
        request = session_pb2.CancelRequest(session_token=self.grant.token)
        try:
            answer = yield from self._broker.repeat(
                _protocol.CANCEL, request, safe=True, endpoint=self.grant.endpoint, timeout=CALL_TIMEOUT
            )
        except Error as error:
            if error.reason == "NOTHING_TO_CANCEL":
                return False
            raise
        return bool(answer.cancelled)

    def info(self) -> Steps[session_pb2.GetSessionResponse]:
        """What is behind the session. Waits for no turn, but to begin it."""
        self._broker.check_process()
        if not self.grant:
            self.take_turn()
            try:
                yield from self._begin()
            finally:
                self.end_turn()
        grant = self._granted()
        request = session_pb2.GetSessionRequest(session_token=grant.token)
        answer = yield from self._broker.repeat(_protocol.GET_SESSION, request, safe=True, endpoint=grant.endpoint)
        self._engine = Engine(answer.engine, answer.database, answer.user, answer.server_version)
        return answer  # type: ignore[no-any-return]

    def engine(self) -> Steps[Engine]:
        """The engine, asked for once."""
        if not self._engine:
            yield from self.info()
        assert self._engine is not None
        return self._engine

    def close(self) -> Steps[None]:
        """Ends the session. What was not committed is rolled back."""
        if self.closed:
            return
        self.take_turn()
        try:
            self.closed = True
            yield from self._leave()
        finally:
            self.end_turn()

    # How calls are made.

    def _granted(self) -> _Grant:
        if not self.grant:
            raise ProgrammingError("the session has no transaction: execute something first")
        return self.grant

    def _check_usable(self) -> None:
        if self._ended:
            raise copy.copy(self._ended)
        if self._commit_lost:
            raise ProgrammingError("the last commit's outcome is not known: call commit() again to ask, or rollback()")
        if self._doubt:
            raise ProgrammingError(f"{self._doubt.why}: call rollback(), and repeat the transaction")

    def _begin(self) -> Steps[_Grant]:
        """Has the session granted, unless it is."""
        self._check_usable()
        if self.grant:
            return self.grant
        self._request.request_id = uuid.uuid4().hex
        answer = yield from self._broker.repeat(_protocol.BEGIN_SESSION, self._request, safe=True)
        endpoint = yield from self._broker.owner(answer.owner_endpoint)
        self.grant = _Grant(answer.session_token, answer.session_id, endpoint)
        self._note(answer.state)
        return self.grant

    def _leave(self) -> Steps[None]:
        """Ends the broker's session as far as it can be reached."""
        grant, ended = self.grant, self._ended
        self._forget()
        if not grant or ended:
            return
        request = session_pb2.CloseRequest(session_token=grant.token)
        try:
            yield from self._broker.repeat(
                _protocol.CLOSE, request, safe=True, timeout=CLOSE_TIMEOUT, endpoint=grant.endpoint
            )
        except Error:
            return

    def _forget(self) -> None:
        self.grant = self.state = self._ended = self._doubt = None
        self._streams = False

    def _numbered(self, method: Method[Any], request: Any, timeout: Seconds | None) -> Steps[Any]:
        """A statement that can be repeated by its number."""
        grant = yield from self._begin()
        grant.seq += 1
        request.seq = grant.seq
        try:
            return (yield from self._statement(method, request, timeout, safe=True))
        except Error as error:
            # An earlier call ran nothing, and so did not count. This one ran nothing either.
            if error.reason != "SEQ_GAP":
                raise
            grant.seq = request.seq = int(error.metadata["expected"])
        return (yield from self._statement(method, request, timeout, safe=True))

    def _statement(
        self,
        method: Method[Any],
        request: Any,
        timeout: Seconds | None,
        *,
        safe: bool = False,
        context: Any = None,
    ) -> Steps[Any]:
        """A call that may begin a transaction. `context` is what of the request says whose it is."""
        context = request if context is None else context
        grant = yield from self._begin()
        context.session_token = grant.token
        timeout = self.timeout if timeout is None else timeout_seconds(timeout)
        if self._next_transaction is not None and self.transaction is TransactionState.NONE:
            if context is not request:
                raise ProgrammingError("begin() is for a transaction that a statement begins: COPY cannot carry it")
            request.transaction_options.CopyFrom(self._next_transaction)
        self._commit = _NOTHING
        commits = getattr(context, "commit", False)
        # What a request was read from is not there a second time.
        attempts = Attempts(_ONCE if method.shape is Shape.REQUESTS else self._broker.retry)
        # Whatever interrupts this, the call may be on its way.
        self._doubt = _LEFT
        try:
            answer = yield from self._ask(method, request, timeout=timeout, safe=safe, attempts=attempts)
        except Error as error:
            in_doubt = attempts.lost and not self._was_looked_at(error)
            self._doubt = _LOST if in_doubt else None
            if commits and attempts.lost and (in_doubt or self._ended):
                raise _unknown("statement", _token(self.state), error) from error
            if in_doubt:
                error.advice = Advice.SESSION
            raise
        self._doubt = self._next_transaction = None
        return answer

    def _was_looked_at(self, error: Error) -> bool:
        """Whether the session itself answered, who knows what it ran; or is over, with all that was in it."""
        return bool(self._ended) or (error.state is not None and error.advice is not Advice.CALL)

    def _ask(
        self,
        method: Method[Any],
        request: Message,
        *,
        safe: bool,
        timeout: float | None = CALL_TIMEOUT,
        attempts: Attempts | None = None,
    ) -> Steps[Any]:
        """A call on the session, and what its answer says of it."""
        grant = self._granted()
        before = self.transaction

        def unchanged(error: Error) -> bool:
            if error.state is None:
                return error.reason != "DATABASE_ERROR"
            return TransactionState(error.state.transaction_state) is before

        try:
            answer = yield from self._broker.repeat(
                method,
                request,
                safe=safe,
                timeout=timeout,
                endpoint=grant.endpoint,
                attempts=attempts,
                unchanged=unchanged,
            )
        except Error as error:
            if error.state is not None:
                self._note(error.state)
            if isinstance(error, SessionEnded | SessionUnknown):
                self._ended = error
            elif not error.reason and grant.endpoint != self._broker.target:
                self._broker.lost_owner(grant.endpoint)
            raise
        if method.shape is not Shape.ANSWERS and answer.HasField("state"):
            self._note(answer.state)
        return answer

    def _committed(self, answer: Any) -> Commit | None:
        if not answer.HasField("commit"):
            return None
        self._commit = Commit.of(answer.commit)
        return self._commit


class StreamCore(Generic[T]):
    """A result on its way. Its session's turn is its own until it ends."""

    def __init__(self, session: SessionCore, commits: bool) -> None:
        self._session = session
        self._commits = commits
        self._first: Sequence[T] = ()
        self.row_count: int | None = None
        self.commit: Commit | None = None
        self.notices: list[PgError] = []
        self.open = True

    def begin(self, first: Any) -> None:
        """Takes the first part."""
        self._first = self.feed(first)

    def begun(self) -> Sequence[T]:
        """What the first part held."""
        return self._first

    def feed(self, part: Any) -> Sequence[T]:
        """What a part holds."""
        raise NotImplementedError

    def _close(self, trailer: Any) -> None:
        self.row_count = trailer.row_count
        self.notices += trailer.notices
        self.commit = self._session._committed(trailer)
        self._session._note(trailer.state)

    @property
    def complete(self) -> bool:
        """Whether the trailer has come."""
        return self.row_count is not None

    def failed(self, error: Error) -> Error:
        """Ends it with an error: what it means for the session, and what the caller is to be told."""
        session = self._session
        if error.state is not None:
            session._note(error.state)
        if isinstance(error, SessionEnded | SessionUnknown):
            session._ended = error
        elif not error.reason:
            session._doubt = _LOST
            if self._commits:
                error = _unknown("stream", _token(session.state), error)
        self._end()
        return error

    def ended(self) -> None:
        """Ends it, or what is left of it.

        Raises:
            BrokerUnavailable: The call ended without its trailer: the result is not complete.
        """
        self._end()
        if not self.complete:
            self._session._doubt = _LOST
            raise BrokerUnavailable("the stream ended before its trailer: the result is not complete")

    def left(self) -> None:
        """Ends it before its end: the broker stops the statement, and its transaction has failed."""
        if self.open and not self.complete:
            self._session._doubt = _STREAM_CLOSED
        self._end()

    def _end(self) -> None:
        if self.open:
            self.open = False
            self._session._streams = False
            self._session.end_turn()


class RowStream(StreamCore[Row]):
    """The rows of a statement."""

    columns: Sequence[Column] = ()
    command_tag: str | None = None
    _decode: Callable[[bytes], list[Row]] | None = None

    def feed(self, part: session_pb2.ExecuteStreamResponse) -> Sequence[Row]:
        """The rows of a part."""
        if part.HasField("chunk"):
            self.notices += part.chunk.notices
            return self._decode(part.chunk.packed_rows) if self._decode and part.chunk.row_count else ()
        if part.HasField("trailer"):
            self.command_tag = part.trailer.command_tag
            self._close(part.trailer)
        elif part.header.columns:
            columns = list(part.header.columns)
            self.columns = [Column.of(column) for column in columns]
            self._decode = row_decoder(columns, True, self._session.loaders)
        return ()


class CopyStream(StreamCore[bytes]):
    """The data of a COPY."""

    byte_count: int | None = None

    def feed(self, part: bulk_pb2.CopyOutResponse) -> Sequence[bytes]:
        """The data of a part."""
        if part.HasField("data"):
            return (part.data,)
        if part.HasField("trailer"):
            self.byte_count = part.trailer.byte_count
            self._close(part.trailer)
        return ()


def _copy_context(context: bulk_pb2.CopyContext, options: CallOptions) -> bulk_pb2.CopyContext:
    context.commit = options.commit
    setattr(context, "class", options.statement_class)
    return context


def _token(state: SessionState | None) -> str | None:
    return (state.commit_token or None) if state else None


def _is_told(error: Error) -> bool:
    """Whether the error says what became of the commit: it failed, or was never come to."""
    if error.commit is not None:
        return Outcome(error.commit.outcome) is Outcome.ROLLED_BACK
    return isinstance(error, SessionEnded)


def _unknown(what: str, token: str | None, cause: Error) -> CommitUnknown:
    asked = "ask Broker.resolve_commit() with its commit_token" if token else "look at what it was to write"
    if what == "run":
        asked = "look at what it was to write; with an idempotency_key it would have been repeated"
    error = CommitUnknown(f"nobody could say whether the {what} is committed: {asked} ({cause})")
    error.advice, error.code, error.reason, error.commit = Advice.RESOLVE_COMMIT, cause.code, cause.reason, cause.commit
    error.commit_token = token
    return error


def _result(message: Any, loaders: Any, *, packed: bool, commit: Commit | None) -> Result:
    columns: Sequence[value_pb2.Column] = message.columns
    rows: list[Row] = []
    if columns and message.row_count:
        decode = row_decoder(columns, packed, loaders)
        rows = decode(message.packed_rows if packed else message.rows)
    described = [Column.of(column) for column in columns]
    return Result(described, rows, message.row_count, message.command_tag, list(message.notices), commit)


def _statement_of(statement: StatementLike) -> Statement:
    if isinstance(statement, Statement):
        return statement
    return Statement(statement) if isinstance(statement, str) else Statement(*statement)


def _batch_statement(index: int, given: StatementLike) -> session_pb2.BatchStatement:
    statement = _statement_of(given)
    if statement.expect is not None:
        raise ProgrammingError(f"statements[{index}].expect: a batch expects nothing, Broker.run() does")
    return session_pb2.BatchStatement(
        sql=statement.sql, parameters=to_parameters(statement.params), parameter_sets=_parameter_sets(statement)
    )


def _run_statement(index: int, given: StatementLike) -> run_pb2.RunStatement:
    statement = _statement_of(given)
    made = run_pb2.RunStatement(
        sql=statement.sql, parameters=to_parameters(statement.params), parameter_sets=_parameter_sets(statement)
    )
    if isinstance(statement.expect, AtLeast):
        made.expectation.at_least = statement.expect.rows
    elif statement.expect is not None:
        made.expectation.exactly = statement.expect
    return made


def _parameter_sets(statement: Statement) -> list[session_pb2.ParameterSet]:
    sets = to_parameter_sets(statement.parameter_sets)
    return [session_pb2.ParameterSet(parameters=parameters) for parameters in sets]
