"""What goes wrong: PEP 249's exceptions, with what the broker and PostgreSQL said about each.

The class says who has to act: `ProgrammingError` and `InterfaceError` are the program's, `DataError` and
`IntegrityError` are about the data, `OperationalError` is the world's. What to repeat is in `Error.advice`. Invariant:
no text here holds a session token, a credential or a parameter.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

import grpc
from google.rpc import error_details_pb2, status_pb2

from session_broker._protocol import seconds
from sessionbroker.v1.error_pb2 import PgError, RetryAdvice
from sessionbroker.v1.session_pb2 import CommitResponse, SessionState

__all__ = [
    "Advice",
    "BrokerUnavailable",
    "CommitRolledBack",
    "CommitUnknown",
    "DataError",
    "DatabaseError",
    "EndReason",
    "Error",
    "ExpectationFailed",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "SessionEnded",
    "SessionUnknown",
    "StatementCancelled",
    "StatementTimeout",
    "Warning",
    "from_rpc_error",
]


class Advice(enum.IntEnum):
    """What a retry has to repeat."""

    UNSPECIFIED = 0
    """The broker did not say: it was not reached, or the error is this program's own."""
    NOTHING = 1
    """The same call fails again: correct it."""
    CALL = 2
    """This call alone."""
    TRANSACTION = 3
    """The whole transaction, in this session."""
    SESSION = 4
    """The whole transaction, in a new session."""
    RESOLVE_COMMIT = 5
    """Nothing before the commit's outcome is known."""

    @classmethod
    def _missing_(cls, value: object) -> Advice:
        return cls.UNSPECIFIED


class EndReason(enum.IntEnum):
    """Why a session ended."""

    UNSPECIFIED = 0
    CLOSED = 1
    LEASE_EXPIRED = 2
    MAX_AGE = 3
    TRANSACTION_DEADLINE = 4
    DISCONNECTED = 5
    TERMINATED = 6
    DRAINED = 7
    BACKEND_LOST = 8
    IDLE_TIMEOUT = 9

    @classmethod
    def _missing_(cls, value: object) -> EndReason:
        return cls.UNSPECIFIED


class Warning(Exception):
    """PEP 249's. Never raised: PostgreSQL's warnings are in `Result.notices`."""


class Error(Exception):
    """The base of all that is raised here."""

    reason: str = ""
    """The broker's stable name for the error, as in its README; empty when it is not the broker's."""
    code: grpc.StatusCode | None = None
    """The gRPC status code; `None` when no call failed."""
    sqlstate: str | None = None
    """PostgreSQL's code, when PostgreSQL refused."""
    pg: PgError | None = None
    """All that PostgreSQL said: message, detail, hint, position, schema, table, column, constraint ..."""
    advice: Advice = Advice.UNSPECIFIED
    """What a retry has to repeat."""
    retry_delay: float | None = None
    """Seconds to wait before it."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """What the broker adds: `bound`, `statement_index`, `attempts` ..."""
    state: SessionState | None = None
    """Where the session stood after the call."""
    commit: CommitResponse | None = None
    """What became of the commit, when the call was to commit."""


class InterfaceError(Error):
    """An object is used as it cannot be: closed, by two threads at once, in another process."""


class DatabaseError(Error):
    """PostgreSQL or the broker refused."""


class DataError(DatabaseError):
    """A value is out of range or of a wrong form (SQLSTATE class 22)."""


class OperationalError(DatabaseError):
    """Something outside the program stands in the way: a deadlock, a limit, a server that is away."""


class IntegrityError(DatabaseError):
    """A constraint is violated (class 23)."""


class InternalError(DatabaseError):
    """PostgreSQL or the broker are in a state that they should not be in."""


class ProgrammingError(DatabaseError):
    """The statement or an argument is wrong."""


class NotSupportedError(DatabaseError):
    """PostgreSQL or the broker do not have that (class 0A)."""


class BrokerUnavailable(OperationalError):
    """No answer came from the broker.

    With the advice `CALL` nothing was sent. Otherwise it is not known whether a statement ran: roll back.
    """


class SessionEnded(OperationalError):
    """The session is over, and its transaction rolled back. Begin a new one, or roll back to have that done."""

    end_reason: EndReason = EndReason.UNSPECIFIED
    """Why it ended."""


class SessionUnknown(OperationalError):
    """The broker does not know the session: it ended long ago, or with its broker."""


class StatementTimeout(OperationalError):
    """A time limit stopped the statement; `metadata["bound"]` names it."""


class StatementCancelled(OperationalError):
    """Somebody stopped the statement."""


class ExpectationFailed(OperationalError):
    """A row count of `Broker.run` was not as expected, and nothing of it was done."""


class CommitRolledBack(OperationalError):
    """The transaction was rolled back instead of committed: repeat it."""


class CommitUnknown(OperationalError):
    """Nobody could say whether the transaction is committed."""

    commit_token: str | None = None
    """For `Broker.resolve_commit`, later or elsewhere; `None` when the program was told none."""


_BY_REASON: dict[str, type[Error]] = {
    "SESSION_UNKNOWN": SessionUnknown,
    "SESSION_ENDED": SessionEnded,
    "STATEMENT_TIMEOUT": StatementTimeout,
    "CANCELLED": StatementCancelled,
    "CALLER_LEFT": StatementCancelled,
    "EXPECTATION_FAILED": ExpectationFailed,
    "COMMIT_ROLLED_BACK": CommitRolledBack,
    "COMMIT_UNKNOWN": CommitUnknown,
    "INVALID_REQUEST": ProgrammingError,
    "RESULT_UNRETURNABLE": DataError,
    "SEQ_GAP": InternalError,
    "INTERNAL": InternalError,
}

# As psycopg 3 has them: two characters, or one.
_BY_SQLSTATE: dict[str, type[Error]] = {
    "08": OperationalError,
    "0A": NotSupportedError,
    "10": ProgrammingError,
    "20": ProgrammingError,
    "21": ProgrammingError,
    "22": DataError,
    "23": IntegrityError,
    "24": InternalError,
    "25": InternalError,
    "26": ProgrammingError,
    "27": OperationalError,
    "28": OperationalError,
    "2B": InternalError,
    "2D": InternalError,
    "2F": OperationalError,
    "34": ProgrammingError,
    "38": OperationalError,
    "39": OperationalError,
    "3B": OperationalError,
    "3D": ProgrammingError,
    "3F": ProgrammingError,
    "40": OperationalError,
    "42": ProgrammingError,
    "44": ProgrammingError,
    "53": OperationalError,
    "54": OperationalError,
    "55": OperationalError,
    "57": OperationalError,
    "58": OperationalError,
    "F": OperationalError,
    "H": OperationalError,
    "P": ProgrammingError,
    "X": InternalError,
}


def class_of_sqlstate(sqlstate: str) -> type[Error]:
    """The exception for a PostgreSQL error."""
    return _BY_SQLSTATE.get(sqlstate[:2]) or _BY_SQLSTATE.get(sqlstate[:1]) or DatabaseError


_REMEDIES = {
    Advice.CALL: "repeat the call",
    Advice.TRANSACTION: "repeat the transaction",
    Advice.SESSION: "repeat the transaction in a new session",
    Advice.RESOLVE_COMMIT: "ask what became of the commit before anything is repeated",
}


# Where nothing but gRPC has spoken.
_BY_CODE: dict[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.UNAVAILABLE: BrokerUnavailable,
    grpc.StatusCode.INTERNAL: BrokerUnavailable,
    grpc.StatusCode.UNKNOWN: BrokerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: StatementTimeout,
    grpc.StatusCode.CANCELLED: StatementCancelled,
    grpc.StatusCode.UNIMPLEMENTED: NotSupportedError,
}

# With these gRPC says that no answer came, or none that it could take.
_UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)

# How gRPC begins what it says of a call that never left: it had no connection to send it on.
_UNSENT = ("failed to connect to all addresses", "DNS resolution failed")

_PREFIXES: dict[type[Error], str] = {
    BrokerUnavailable: "no answer from the broker: ",
    StatementTimeout: "the call's deadline passed: ",
    NotSupportedError: "the server does not have this call: ",
}


class _Status(Protocol):
    """What all of gRPC's errors have."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError) -> Error:
    """The exception for a failed call, with all that its status holds."""
    status = cast(_Status, error)
    info = error_details_pb2.ErrorInfo()
    found: dict[str, Any] = {}
    for detail in _status_details(status):
        match detail.type_url.rpartition("/")[2]:
            case "google.rpc.ErrorInfo":
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
            case "google.rpc.RetryInfo":
                found["retry_delay"] = seconds(error_details_pb2.RetryInfo.FromString(detail.value).retry_delay)
            case "sessionbroker.v1.RetryAdvice":
                found["advice"] = Advice(RetryAdvice.FromString(detail.value).scope)
            case "sessionbroker.v1.PgError":
                found["pg"] = PgError.FromString(detail.value)
                found["sqlstate"] = found["pg"].sqlstate
            case "sessionbroker.v1.CommitResponse":
                found["commit"] = CommitResponse.FromString(detail.value)
            case "sessionbroker.v1.SessionState":
                found["state"] = SessionState.FromString(detail.value)
    if info.metadata:
        found["metadata"] = dict(info.metadata)
    message = status.details() or ""
    if not info.reason:
        kind = _BY_CODE.get(status.code(), OperationalError)
        if kind is BrokerUnavailable and message.startswith(_UNSENT):
            found["advice"] = Advice.CALL
        elif status.code() not in _UNANSWERED:
            found["advice"] = Advice.NOTHING
        return _made(kind, _PREFIXES.get(kind, "") + message, code=status.code(), **found)
    if info.reason == "DATABASE_ERROR":
        kind = class_of_sqlstate(found.get("sqlstate", ""))
    else:
        kind = _BY_REASON.get(info.reason, OperationalError)
    if issubclass(kind, SessionEnded):
        name = info.metadata.get("end_reason", "").removeprefix("END_REASON_")
        found["end_reason"] = EndReason.__members__.get(name, EndReason.UNSPECIFIED)
    if issubclass(kind, CommitUnknown) and "commit" in found:
        found["commit_token"] = found["commit"].commit_token or None
    remedy = _REMEDIES.get(found.get("advice", Advice.UNSPECIFIED))
    message = f"{message} [{info.reason}: {remedy}]" if remedy else f"{message} [{info.reason}]"
    return _made(kind, message, code=status.code(), reason=info.reason, **found)


def is_lost(error: Error) -> bool:
    """Whether the call may have reached the broker, and its answer did not come."""
    if error.reason or error.advice is Advice.CALL:
        return False
    return error.code in _UNANSWERED if error.code else isinstance(error, BrokerUnavailable)


def _status_details(status: _Status) -> Iterable[Any]:
    for key, value in status.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return cast("Iterable[Any]", status_pb2.Status.FromString(value).details)
    return ()


def _made(kind: type[Error], message: str, **fields: object) -> Error:
    error = kind(message)
    for name, value in fields.items():
        setattr(error, name, value)
    return error
