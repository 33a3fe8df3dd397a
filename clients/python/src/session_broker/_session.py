"""A session: what is known of it, the steps of its calls, and what their answers mean for it.

Invariants: a numbered call whose answer was lost is repeated with its number or not at all; after a call that may still
be on its way, the session goes on only as another one, which the late call cannot reach.
"""

from __future__ import annotations

import copy
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from session_broker import _protocol
from session_broker._arguments import (
    Retry,
    Seconds,
    SessionArguments,
    TransactionArguments,
    begin_request,
    timeout_seconds,
    transaction_options,
)
from session_broker._broker import CALL_TIMEOUT, BrokerCore, unknown_commit
from session_broker._protocol import Call, Method, Shape, Steps, seconds
from session_broker._retry import Attempts
from session_broker._statements import (
    CallOptions,
    StatementLike,
    batch_request,
    copy_context,
    execute_request,
    reading,
    result_of,
    stream_request,
)
from session_broker._streams import AnyError, CopyStream, RowStream, StreamCore
from session_broker.bulk import Copied
from session_broker.errors import (
    Advice,
    BrokerUnavailable,
    CommitRolledBack,
    CommitUnknown,
    Error,
    InterfaceError,
    ProgrammingError,
    SessionEnded,
    SessionUnknown,
    is_lost,
)
from session_broker.results import Commit, Engine, Outcome, Result, TransactionState
from session_broker.values import check_loaders
from sessionbroker.v1 import bulk_pb2, session_pb2, transaction_pb2
from sessionbroker.v1.session_pb2 import SessionState

# Nobody waits long for the end of a session: its lease ends it too.
CLOSE_TIMEOUT = 5.0
# How long commit() itself asks what became of a commit whose answer was lost.
RESOLVE_TIME_MAX = 10.0

_ONCE = Retry(attempts_max=1)
_NOTHING = Commit(Outcome.NOTHING_WRITTEN)

AnyStream = TypeVar("AnyStream", bound="StreamCore[Any]")


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
    lease_ttl: float
    seq: int = 0


class SessionCore:
    """A session: what is known of it, and the steps of its calls.

    It is granted at its first call, and again after `rollback` when the broker's has ended or a call of it was left.
    """

    def __init__(self, broker: BrokerCore, overrides: SessionArguments) -> None:
        arguments = SessionArguments(**{**broker.arguments, **overrides})
        self._broker = broker
        self._request = begin_request(arguments)
        self.timeout = timeout_seconds(arguments.get("timeout"))
        self._attach = arguments.get("attach", False)
        self._attachment: tuple[Callable[[], object], weakref.finalize[..., SessionCore]] | None = None
        self.loaders = arguments.get("loaders", {})
        check_loaders(self.loaders)
        self.grant: _Grant | None = None
        self.state: SessionState | None = None
        self.closed = False
        self.renew_at = 0.0
        self.renew_after = 1.0
        self._lease_until = 0.0
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

    @property
    def attaches(self) -> bool:
        """Whether an Attach is to be opened."""
        return self._attach and self._attachment is None

    @property
    def retry_after(self) -> float:
        """How long after a renewal that came to nothing it is tried again."""
        return max(min(1.0, self.renew_after), self.renew_after / 2, 0.1)

    def renewal(self) -> Call | None:
        """The call that keeps the session, if there is to be one."""
        if not self.grant or self._ended or self.closed or self._attachment or time.monotonic() > self._lease_until:
            return None
        if self._attach:
            return Call(
                _protocol.ATTACH, session_pb2.AttachRequest(session_token=self.grant.token), self.grant.endpoint
            )
        request = session_pb2.KeepAliveRequest(session_token=self.grant.token)
        return Call(_protocol.KEEP_ALIVE, request, self.grant.endpoint, CLOSE_TIMEOUT)

    def attached(self, cancel: Callable[[], object]) -> None:
        """Takes note of an Attach, which ends with the session, or when nobody holds it."""
        at_end = weakref.finalize(self, cancel)
        at_end.atexit = False
        self._attachment = cancel, at_end

    def detached(self, cancel: Callable[[], object], error: Error | None) -> bool:
        """Takes note that an Attach has ended, or was refused. True when it is to be tried again, a little later."""
        if self._attachment and self._attachment[0] == cancel:
            self._attachment[1].detach()
            self._attachment = None
        self._not_renewed(error)
        self.renew_at = time.monotonic() + min(1.0, self.renew_after)
        return not isinstance(error, SessionEnded | SessionUnknown) and self.renewal() is not None

    def _detach(self) -> None:
        if self._attachment:
            _, end = self._attachment
            self._attachment = None
            end()

    def renewed(self, call: Call, answer: session_pb2.KeepAliveResponse | Exception) -> None:
        """Takes note of a renewal, which came beside the session's calls: it moves no state."""
        if not self.grant or call.request.session_token != self.grant.token:
            return
        if isinstance(answer, SessionEnded | SessionUnknown):
            self._lease_until = 0.0
        elif isinstance(answer, Exception):
            self._not_renewed(answer)
            self.renew_at = time.monotonic() + self.retry_after
        else:
            self._renew_after(answer.state)

    def _not_renewed(self, error: Exception | None) -> None:
        """A renewal has failed. Where it may have arrived, the lease may have begun anew."""
        if self.grant and (not isinstance(error, Error) or is_lost(error)):
            self._lease_until = time.monotonic() + self.grant.lease_ttl

    def note(self, state: SessionState) -> None:
        """Takes note of where the session stands."""
        self.state = state
        self._renew_after(state)

    def _renew_after(self, state: SessionState) -> None:
        self.renew_after = seconds(state.renew_after)
        now = time.monotonic()
        self.renew_at = now + self.renew_after
        if self.grant:
            self._lease_until = now + self.grant.lease_ttl

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
        self._detach()

    # Calls.

    def execute(self, sql: str, params: Sequence[object], options: CallOptions) -> Steps[Result]:
        """One statement."""
        self.take_turn()
        try:
            request = execute_request(sql, params, options)
            answer = yield from self._numbered(_protocol.EXECUTE, request, options.timeout)
            committed = self.committed(answer)
            with reading(answer.commit if committed else None):
                return result_of(answer, self.loaders, packed=True, commit=committed)
        finally:
            self.end_turn()

    def batch(self, statements: Sequence[StatementLike], options: CallOptions) -> Steps[list[Result]]:
        """Many statements."""
        self.take_turn()
        try:
            request = batch_request(statements, options)
            answer = yield from self._numbered(_protocol.EXECUTE_BATCH, request, options.timeout)
            committed = self.committed(answer)
            with reading(answer.commit if committed else None):
                return [result_of(result, self.loaders, packed=False, commit=committed) for result in answer.results]
        finally:
            self.end_turn()

    def stream(self, sql: str, params: Sequence[object], options: CallOptions) -> Steps[tuple[RowStream, Any]]:
        """A statement whose rows come as they are read. Its turn lasts until the stream ends.

        Returns the stream and the shell's call.
        """
        self.take_turn()
        try:
            request = stream_request(sql, params, options)
            call, first = yield from self._statement(_protocol.EXECUTE_STREAM, request, options.timeout)
            return self._streaming(RowStream(self, options.commit), call, first), call
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
            context = copy_context(target.context, options)
            yield from self._begin()
            answer = yield from self._statement(_protocol.COPY_IN, messages(target), options.timeout, context=context)
            return Copied(answer.row_count, answer.byte_count, self.committed(answer), list(answer.notices))
        finally:
            self.end_turn()

    def copy_out(self, request: bulk_pb2.CopyOutRequest, options: CallOptions) -> Steps[tuple[CopyStream, Any]]:
        """COPY TO STDOUT: the stream, and the shell's call."""
        self.take_turn()
        try:
            context = copy_context(request.context, options)
            call, first = yield from self._statement(_protocol.COPY_OUT, request, options.timeout, context=context)
            return self._streaming(CopyStream(self, options.commit), call, first), call
        finally:
            if not self._streams:
                self.end_turn()

    def _streaming(self, stream: AnyStream, call: Any, first: Any) -> AnyStream:
        """Has the stream begin, and keep its turn until it ends."""
        try:
            stream.begin(first)
        except BaseException:
            call.cancel()
            self._doubt = _STREAM_CLOSED
            raise
        self._streams = True
        return stream

    def end_stream(self, error: AnyError, commits: bool) -> AnyError:
        """Takes the turn back from a stream that has ended; gives what the caller is to be told."""
        told: Any = error
        self._commit_lost = None
        if error is not None:
            self._note_error(error)
            if is_lost(error):
                self._doubt = _LOST
                error.advice = Advice.SESSION
            if commits and is_lost(error):
                told = self._lost_commit("stream", error)
            elif commits and isinstance(error, CommitUnknown):
                self._commit_lost = (error.commit_token,)
        self._streams = False
        self.end_turn()
        return cast(AnyError, told)

    def leave_stream(self, complete: bool, commits: bool) -> None:
        """Takes the turn back from a stream that is closed. Before its end it may have committed, or not."""
        if not complete:
            self._doubt = _STREAM_CLOSED
        self._commit_lost = (_token(self.state),) if commits and not complete else None
        self._streams = False
        self.end_turn()

    def begin(self, options: TransactionArguments) -> None:
        """Notes how the next transaction begins."""
        if self.transaction is not TransactionState.NONE:
            raise ProgrammingError("a transaction is open: begin() is for the next one, after commit or rollback")
        self._next_transaction = transaction_options(**options) if options else None

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
        lost = self._commit_lost
        token = lost[0] if lost else _token(self.state)
        if self._doubt:
            # The call that was to commit may not have arrived. Without its session it cannot any more.
            cause = BrokerUnavailable(self._doubt.why)
            yield from self._leave()
            return (yield from self._resolved(token, cause))
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
            elif _is_told(error) or not (lost or attempts.lost):
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
            raise unknown_commit("commit", None, cause) from cause
        try:
            outcome = yield from self._broker.resolve_commit(token, RESOLVE_TIME_MAX)
        except Error as error:
            raise unknown_commit("commit", token, error) from cause
        if outcome not in (Outcome.COMMITTED, Outcome.ROLLED_BACK):
            raise unknown_commit("commit", token, cause) from cause
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
                yield from self._rolled_back(self.grant)
        finally:
            self.end_turn()

    def _rolled_back(self, grant: _Grant) -> Steps[None]:
        before = self._doubt
        request = session_pb2.RollbackRequest(session_token=grant.token)
        # Whatever interrupts this, the transaction may go on.
        self._doubt = _LEFT
        try:
            yield from self._ask(_protocol.ROLLBACK, request, safe=True)
        except Error as error:
            # Without its session the transaction is rolled back too, by the lease at the latest.
            if not isinstance(error, BrokerUnavailable | SessionEnded | SessionUnknown) and not is_lost(error):
                self._doubt = before
                raise
            self._forget()
        self._doubt = None

    def _rollback_to(self, savepoint: str) -> Steps[None]:
        before = self._doubt
        if not before or before.on_its_way or self._commit_lost:
            self._check_usable()
        request = session_pb2.RollbackRequest(session_token=self._granted().token, savepoint=savepoint)
        self._doubt = _LEFT
        try:
            yield from self._ask(_protocol.ROLLBACK, request, safe=True)
        except Error as error:
            self._doubt = _LOST if is_lost(error) else before
            raise
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
        # Whatever interrupts this, the session is known, and can be closed.
        ttl = seconds(answer.lease_ttl)
        grant = self.grant = _Grant(answer.session_token, answer.session_id, self._broker.target, ttl)
        self.note(answer.state)
        grant.endpoint = yield from self._broker.owner(answer.owner_endpoint)
        return grant

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
        self._detach()
        self.grant = self.state = self._ended = self._doubt = None

    def _numbered(self, method: Method[Any], request: Any, timeout: Seconds | None) -> Steps[Any]:
        """A statement that can be repeated by its number."""
        grant = yield from self._begin()
        grant.seq += 1
        request.seq = grant.seq
        try:
            return (yield from self._statement(method, request, timeout, safe=True))
        except Error as error:
            # An earlier call ran nothing, and so did not count. This one ran nothing either.
            if error.reason != "SEQ_GAP" or isinstance(error, CommitUnknown):
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
        # Whatever interrupts this, the call may be on its way, and so may its commit.
        self._doubt = _LEFT
        if commits:
            self._commit_lost = (_token(self.state),)
        try:
            answer = yield from self._ask(method, request, timeout=timeout, safe=safe, attempts=attempts)
        except Error as error:
            in_doubt = attempts.lost and not self._was_looked_at(error)
            self._doubt = _LOST if in_doubt else None
            self._commit_lost = None
            if commits and attempts.lost and (in_doubt or self._ended):
                raise self._lost_commit("statement", error) from error
            if commits and isinstance(error, CommitUnknown):
                self._commit_lost = (error.commit_token,)
            if in_doubt:
                error.advice = Advice.SESSION
            raise
        self._doubt = self._next_transaction = self._commit_lost = None
        return answer

    def _was_looked_at(self, error: Error) -> bool:
        """Whether the session itself answered, which knows what it ran; or is over, with all that was in it."""
        if error.reason == "SEQ_ANSWER_GONE":
            return False
        return bool(self._ended) or (error.state is not None and error.advice is not Advice.CALL)

    def _lost_commit(self, what: str, error: Error) -> CommitUnknown:
        """The answer to a call that was to commit is lost: the next commit() asks on."""
        token = _token(self.state)
        self._commit_lost = (token,)
        return unknown_commit(what, token, error)

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
            self._note_error(error)
            raise
        if method.shape is not Shape.ANSWERS and answer.HasField("state"):
            self.note(answer.state)
        return answer

    def _note_error(self, error: Error) -> None:
        if error.state is not None:
            self.note(error.state)
        if isinstance(error, SessionEnded | SessionUnknown):
            self._ended = error
        elif isinstance(error, BrokerUnavailable) and self.grant:
            self._broker.lost_owner(self.grant.endpoint)

    def committed(self, answer: Any) -> Commit | None:
        """Takes note of what a commit did, if there was one."""
        if not answer.HasField("commit"):
            return None
        self._commit = Commit.of(answer.commit)
        return self._commit


def _token(state: SessionState | None) -> str | None:
    return (state.commit_token or None) if state else None


def _is_told(error: Error) -> bool:
    """Whether the error says what became of the commit: it failed, or was never come to."""
    if error.commit is not None:
        return Outcome(error.commit.outcome) is Outcome.ROLLED_BACK
    return isinstance(error, SessionEnded)
