"""A broker: what is asked of it without a session, and how calls to it are repeated.

Invariant: whole transactions are never repeated here, but for those that carry a key.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from google.protobuf.message import Message

from session_broker import _protocol
from session_broker._arguments import (
    Retry,
    RunArguments,
    SessionArguments,
    begin_request,
    check_names,
    connect_options,
    session_options,
    timeout_seconds,
)
from session_broker._protocol import Call, Method, Pause, Probe, Shape, Steps, duration
from session_broker._retry import Attempts
from session_broker._statements import (
    CallOptions,
    StatementLike,
    reading,
    result_of,
    run_statement,
)
from session_broker.bulk import Missed, Notification, SessionFilters, list_request
from session_broker.errors import (
    Advice,
    CommitUnknown,
    DataError,
    EndReason,
    Error,
    InterfaceError,
)
from session_broker.results import Commit, Outcome, Result
from sessionbroker.v1 import admin_pb2, notification_pb2, run_pb2, session_pb2

# The gRPC deadline of calls that run no statement: the broker answers them at once, or PostgreSQL is in trouble.
CALL_TIMEOUT = 30.0
# How long an owner that did not answer is not asked again.
UNREACHABLE_TIME = 30.0

# The largest request that a broker takes.
REQUEST_BYTES_MAX = 16 * 1024 * 1024

# Answers of who lets callers in, before what they ask is looked at.
_NOT_LET_IN = ("UNAUTHENTICATED", "FORBIDDEN")


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
        if method.shape is not Shape.REQUESTS and request.ByteSize() > REQUEST_BYTES_MAX:
            raise DataError(
                f"the request has {request.ByteSize()} bytes, and a broker takes 16 MiB ({REQUEST_BYTES_MAX}): "
                "send less at a time, or use copy_in"
            )
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
            statements=[run_statement(statement) for statement in statements],
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
            was_answered = error.reason and error.advice is not Advice.CALL and error.reason not in _NOT_LET_IN
            if read_only or not attempts.lost or (idempotency_key and was_answered):
                raise
            raise unknown_commit("keyed run" if idempotency_key else "run", None, error) from error
        loaders = self.arguments.get("loaders", {})
        commit = Commit.of(answer.commit)
        with reading(answer.commit):
            return [result_of(result, loaders, packed=False, commit=commit) for result in answer.results]

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


_REMEDIES = {
    "run": "look at what it was to write; with an idempotency_key it would have been repeated",
    "keyed run": "repeat it with the same idempotency_key",
    "commit": "look at what it was to write",
    "statement": "look at what it was to write",
    "stream": "look at what it was to write",
}


def unknown_commit(what: str, token: str | None, cause: Error) -> CommitUnknown:
    """The error of a commit of which nobody could say what became."""
    remedy = "ask Broker.resolve_commit() with its commit_token" if token else _REMEDIES[what]
    error = CommitUnknown(f"nobody could say whether the {what} is committed: {remedy} ({cause})")
    error.advice, error.code, error.reason, error.commit = Advice.RESOLVE_COMMIT, cause.code, cause.reason, cause.commit
    error.commit_token = token
    return error
