"""The broker's calls as data: methods, and the steps that the two shells take.

A generator of steps yields what is to be done, is sent what came of it or has the error thrown in, and returns the
result. The shells of `_sync` and `aio` take the steps, blocking and awaiting. Invariant: nothing here waits, or knows a
channel.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from sessionbroker.v1 import admin_pb2, bulk_pb2, notification_pb2, run_pb2, session_pb2

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Message)


class Shape(enum.Enum):
    """How many messages go either way."""

    UNARY = enum.auto()
    ANSWERS = enum.auto()
    REQUESTS = enum.auto()


@dataclass(frozen=True, eq=False)
class Method(Generic[Answer]):
    """One of the broker's calls."""

    service: str
    name: str
    answer: type[Answer]
    """The message that answers it, or of which its answer has many."""
    shape: Shape = Shape.UNARY

    @property
    def path(self) -> str:
        """Its HTTP/2 path."""
        return f"/{self.service}/{self.name}"


_SESSION = "sessionbroker.v1.SessionService"
_TRANSACTION = "sessionbroker.v1.TransactionService"
_BULK = "sessionbroker.v1.BulkService"
_NOTIFICATION = "sessionbroker.v1.NotificationService"
_ADMIN = "sessionbroker.v1.AdminService"

BEGIN_SESSION = Method(_SESSION, "BeginSession", session_pb2.BeginSessionResponse)
EXECUTE = Method(_SESSION, "Execute", session_pb2.ExecuteResponse)
EXECUTE_STREAM = Method(_SESSION, "ExecuteStream", session_pb2.ExecuteStreamResponse, Shape.ANSWERS)
EXECUTE_BATCH = Method(_SESSION, "ExecuteBatch", session_pb2.ExecuteBatchResponse)
COMMIT = Method(_SESSION, "Commit", session_pb2.CommitResponse)
ROLLBACK = Method(_SESSION, "Rollback", session_pb2.RollbackResponse)
CREATE_SAVEPOINT = Method(_SESSION, "CreateSavepoint", session_pb2.CreateSavepointResponse)
RELEASE_SAVEPOINT = Method(_SESSION, "ReleaseSavepoint", session_pb2.ReleaseSavepointResponse)
CANCEL = Method(_SESSION, "Cancel", session_pb2.CancelResponse)
CLOSE = Method(_SESSION, "Close", session_pb2.CloseResponse)
KEEP_ALIVE = Method(_SESSION, "KeepAlive", session_pb2.KeepAliveResponse)
ATTACH = Method(_SESSION, "Attach", session_pb2.AttachResponse, Shape.ANSWERS)
GET_SESSION = Method(_SESSION, "GetSession", session_pb2.GetSessionResponse)
RESOLVE_COMMIT = Method(_SESSION, "ResolveCommit", session_pb2.ResolveCommitResponse)
RUN = Method(_TRANSACTION, "Run", run_pb2.RunResponse)
COPY_IN = Method(_BULK, "CopyIn", bulk_pb2.CopyInResponse, Shape.REQUESTS)
COPY_OUT = Method(_BULK, "CopyOut", bulk_pb2.CopyOutResponse, Shape.ANSWERS)
LISTEN = Method(_NOTIFICATION, "Listen", notification_pb2.ListenResponse, Shape.ANSWERS)
LIST_SESSIONS = Method(_ADMIN, "ListSessions", admin_pb2.ListSessionsResponse)
TERMINATE_SESSION = Method(_ADMIN, "TerminateSession", admin_pb2.TerminateSessionResponse)


@dataclass(slots=True)
class Call:
    """Make a call at an endpoint, with a gRPC deadline of so many seconds.

    The answer is sent back; of one in many messages the shell's call and the first of them.
    """

    method: Method[Any]
    request: Any = field(repr=False)
    """The message, or where the messages come from."""
    endpoint: str
    timeout: float | None = None


@dataclass(slots=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(slots=True)
class Probe:
    """Tell whether a server answers at the endpoint: true or false is sent back."""

    endpoint: str


Step: TypeAlias = Call | Pause | Probe
Steps: TypeAlias = Generator[Step, Any, T]


def duration(value: float | timedelta) -> Duration:
    """A protobuf Duration of so many seconds."""
    delta = value if isinstance(value, timedelta) else timedelta(seconds=value)
    made = Duration()
    made.FromTimedelta(delta)
    return made


def seconds(value: Duration) -> float:
    """The seconds of a protobuf Duration."""
    return value.seconds + value.nanos / 1e9
