"""A client of session-broker: PostgreSQL sessions over gRPC.

    with session_broker.connect("localhost:50051") as broker, broker.session() as session:
        session.execute("UPDATE accounts SET balance = balance - $1 WHERE id = $2", [amount, 1])

`session_broker.aio` is the same for asyncio, `session_broker.dbapi` is DB-API 2.0, `session_broker.sqlalchemy` has the
dialects.
"""

from session_broker._arguments import (
    ConnectOptions,
    IsolationLevel,
    Keepalives,
    Retry,
    RunArguments,
    SessionArguments,
    SessionOptions,
    TransactionArguments,
)
from session_broker._channel import TLS, ConnectArguments
from session_broker._sync import Broker, CopyOut, Listener, Session, Stream, connect
from session_broker.bulk import Copied, CopyOptions, Missed, Notification, SessionFilters
from session_broker.errors import (
    Advice,
    BrokerUnavailable,
    CommitRolledBack,
    CommitUnknown,
    DatabaseError,
    DataError,
    EndReason,
    Error,
    ExpectationFailed,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    SessionEnded,
    SessionUnknown,
    StatementCancelled,
    StatementTimeout,
    Warning,
)
from session_broker.results import AtLeast, Commit, Engine, Outcome, Result, Statement, TransactionState
from session_broker.values import Column, Json, Jsonb, Multirange, Range
from sessionbroker.v1.admin_pb2 import SessionOverview
from sessionbroker.v1.error_pb2 import PgError
from sessionbroker.v1.session_pb2 import GetSessionResponse, SessionState

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Advice",
    "AtLeast",
    "Broker",
    "BrokerUnavailable",
    "Column",
    "Commit",
    "CommitRolledBack",
    "CommitUnknown",
    "ConnectArguments",
    "ConnectOptions",
    "Copied",
    "CopyOptions",
    "CopyOut",
    "DataError",
    "DatabaseError",
    "EndReason",
    "Engine",
    "Error",
    "ExpectationFailed",
    "GetSessionResponse",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "IsolationLevel",
    "Json",
    "Jsonb",
    "Keepalives",
    "Listener",
    "Missed",
    "Multirange",
    "NotSupportedError",
    "Notification",
    "OperationalError",
    "Outcome",
    "PgError",
    "ProgrammingError",
    "Range",
    "Result",
    "Retry",
    "RunArguments",
    "Session",
    "SessionArguments",
    "SessionEnded",
    "SessionFilters",
    "SessionOptions",
    "SessionOverview",
    "SessionState",
    "SessionUnknown",
    "Statement",
    "StatementCancelled",
    "StatementTimeout",
    "Stream",
    "TransactionArguments",
    "TransactionState",
    "Warning",
    "connect",
]
