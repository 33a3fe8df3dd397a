from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sessionbroker.v1 import connect_pb2 as _connect_pb2
from sessionbroker.v1 import error_pb2 as _error_pb2
from sessionbroker.v1 import transaction_pb2 as _transaction_pb2
from sessionbroker.v1 import value_pb2 as _value_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_CLOSED: _ClassVar[EndReason]
    END_REASON_LEASE_EXPIRED: _ClassVar[EndReason]
    END_REASON_MAX_AGE: _ClassVar[EndReason]
    END_REASON_TRANSACTION_DEADLINE: _ClassVar[EndReason]
    END_REASON_DISCONNECTED: _ClassVar[EndReason]
    END_REASON_TERMINATED: _ClassVar[EndReason]
    END_REASON_DRAINED: _ClassVar[EndReason]
    END_REASON_BACKEND_LOST: _ClassVar[EndReason]
    END_REASON_IDLE_TIMEOUT: _ClassVar[EndReason]

class UnknownReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNKNOWN_REASON_UNSPECIFIED: _ClassVar[UnknownReason]
    UNKNOWN_REASON_OTHER_CLUSTER: _ClassVar[UnknownReason]
    UNKNOWN_REASON_OTHER_TIMELINE: _ClassVar[UnknownReason]
    UNKNOWN_REASON_DATABASE_DROPPED: _ClassVar[UnknownReason]
    UNKNOWN_REASON_SERVER_CRASHED: _ClassVar[UnknownReason]
    UNKNOWN_REASON_TOO_OLD: _ClassVar[UnknownReason]
    UNKNOWN_REASON_IN_RECOVERY: _ClassVar[UnknownReason]
END_REASON_UNSPECIFIED: EndReason
END_REASON_CLOSED: EndReason
END_REASON_LEASE_EXPIRED: EndReason
END_REASON_MAX_AGE: EndReason
END_REASON_TRANSACTION_DEADLINE: EndReason
END_REASON_DISCONNECTED: EndReason
END_REASON_TERMINATED: EndReason
END_REASON_DRAINED: EndReason
END_REASON_BACKEND_LOST: EndReason
END_REASON_IDLE_TIMEOUT: EndReason
UNKNOWN_REASON_UNSPECIFIED: UnknownReason
UNKNOWN_REASON_OTHER_CLUSTER: UnknownReason
UNKNOWN_REASON_OTHER_TIMELINE: UnknownReason
UNKNOWN_REASON_DATABASE_DROPPED: UnknownReason
UNKNOWN_REASON_SERVER_CRASHED: UnknownReason
UNKNOWN_REASON_TOO_OLD: UnknownReason
UNKNOWN_REASON_IN_RECOVERY: UnknownReason

class SessionState(_message.Message):
    __slots__ = ("transaction_state", "lease_remaining", "session_remaining", "transaction_remaining", "renew_after", "draining", "transaction_id", "commit_token", "idle_remaining", "attached")
    TRANSACTION_STATE_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_FIELD_NUMBER: _ClassVar[int]
    SESSION_REMAINING_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_REMAINING_FIELD_NUMBER: _ClassVar[int]
    RENEW_AFTER_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    COMMIT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    IDLE_REMAINING_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    transaction_state: _transaction_pb2.TransactionState
    lease_remaining: _duration_pb2.Duration
    session_remaining: _duration_pb2.Duration
    transaction_remaining: _duration_pb2.Duration
    renew_after: _duration_pb2.Duration
    draining: bool
    transaction_id: int
    commit_token: str
    idle_remaining: _duration_pb2.Duration
    attached: bool
    def __init__(self, transaction_state: _Optional[_Union[_transaction_pb2.TransactionState, str]] = ..., lease_remaining: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., session_remaining: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., transaction_remaining: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., renew_after: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., draining: bool = ..., transaction_id: _Optional[int] = ..., commit_token: _Optional[str] = ..., idle_remaining: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., attached: bool = ...) -> None: ...

class SessionOptions(_message.Message):
    __slots__ = ("isolation_level", "read_only", "deferrable", "statement_timeout", "lock_timeout", "transaction_timeout", "role", "settings")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ISOLATION_LEVEL_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    DEFERRABLE_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    LOCK_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    isolation_level: _transaction_pb2.IsolationLevel
    read_only: bool
    deferrable: bool
    statement_timeout: _duration_pb2.Duration
    lock_timeout: _duration_pb2.Duration
    transaction_timeout: _duration_pb2.Duration
    role: str
    settings: _containers.ScalarMap[str, str]
    def __init__(self, isolation_level: _Optional[_Union[_transaction_pb2.IsolationLevel, str]] = ..., read_only: bool = ..., deferrable: bool = ..., statement_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., lock_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., transaction_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., role: _Optional[str] = ..., settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BeginSessionRequest(_message.Message):
    __slots__ = ("engine", "profile", "lease_ttl", "options", "connect_options", "labels", "request_id")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CONNECT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    engine: str
    profile: str
    lease_ttl: _duration_pb2.Duration
    options: SessionOptions
    connect_options: _connect_pb2.ConnectOptions
    labels: _containers.ScalarMap[str, str]
    request_id: str
    def __init__(self, engine: _Optional[str] = ..., profile: _Optional[str] = ..., lease_ttl: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., options: _Optional[_Union[SessionOptions, _Mapping]] = ..., connect_options: _Optional[_Union[_connect_pb2.ConnectOptions, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class BeginSessionResponse(_message.Message):
    __slots__ = ("session_token", "session_id", "owner_endpoint", "lease_ttl", "expire_time", "state", "profile")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    session_id: str
    owner_endpoint: str
    lease_ttl: _duration_pb2.Duration
    expire_time: _timestamp_pb2.Timestamp
    state: SessionState
    profile: str
    def __init__(self, session_token: _Optional[str] = ..., session_id: _Optional[str] = ..., owner_endpoint: _Optional[str] = ..., lease_ttl: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., expire_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ..., profile: _Optional[str] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("session_token", "sql", "parameters", "commit", "result_format", "max_rows", "timeout", "seq", "transaction_options")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SQL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    sql: str
    parameters: _containers.RepeatedCompositeFieldContainer[_value_pb2.Parameter]
    commit: bool
    result_format: _value_pb2.ResultFormat
    max_rows: int
    timeout: _duration_pb2.Duration
    seq: int
    transaction_options: _transaction_pb2.TransactionOptions
    def __init__(self, session_token: _Optional[str] = ..., sql: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[_value_pb2.Parameter, _Mapping]]] = ..., commit: bool = ..., result_format: _Optional[_Union[_value_pb2.ResultFormat, str]] = ..., max_rows: _Optional[int] = ..., timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., seq: _Optional[int] = ..., transaction_options: _Optional[_Union[_transaction_pb2.TransactionOptions, _Mapping]] = ..., **kwargs) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("columns", "rows", "packed_rows", "row_count", "command_tag", "notices", "commit", "state")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PACKED_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_TAG_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[_value_pb2.Column]
    rows: _containers.RepeatedCompositeFieldContainer[_value_pb2.Row]
    packed_rows: bytes
    row_count: int
    command_tag: str
    notices: _containers.RepeatedCompositeFieldContainer[_error_pb2.PgError]
    commit: CommitResponse
    state: SessionState
    def __init__(self, columns: _Optional[_Iterable[_Union[_value_pb2.Column, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[_value_pb2.Row, _Mapping]]] = ..., packed_rows: _Optional[bytes] = ..., row_count: _Optional[int] = ..., command_tag: _Optional[str] = ..., notices: _Optional[_Iterable[_Union[_error_pb2.PgError, _Mapping]]] = ..., commit: _Optional[_Union[CommitResponse, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class ExecuteStreamRequest(_message.Message):
    __slots__ = ("session_token", "sql", "parameters", "commit", "result_format", "max_rows", "timeout", "transaction_options")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SQL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    sql: str
    parameters: _containers.RepeatedCompositeFieldContainer[_value_pb2.Parameter]
    commit: bool
    result_format: _value_pb2.ResultFormat
    max_rows: int
    timeout: _duration_pb2.Duration
    transaction_options: _transaction_pb2.TransactionOptions
    def __init__(self, session_token: _Optional[str] = ..., sql: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[_value_pb2.Parameter, _Mapping]]] = ..., commit: bool = ..., result_format: _Optional[_Union[_value_pb2.ResultFormat, str]] = ..., max_rows: _Optional[int] = ..., timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., transaction_options: _Optional[_Union[_transaction_pb2.TransactionOptions, _Mapping]] = ..., **kwargs) -> None: ...

class ExecuteStreamResponse(_message.Message):
    __slots__ = ("header", "chunk", "trailer")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    chunk: ResultChunk
    trailer: ResultTrailer
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., chunk: _Optional[_Union[ResultChunk, _Mapping]] = ..., trailer: _Optional[_Union[ResultTrailer, _Mapping]] = ...) -> None: ...

class ResultHeader(_message.Message):
    __slots__ = ("columns",)
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[_value_pb2.Column]
    def __init__(self, columns: _Optional[_Iterable[_Union[_value_pb2.Column, _Mapping]]] = ...) -> None: ...

class ResultChunk(_message.Message):
    __slots__ = ("rows", "packed_rows", "row_count", "notices")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PACKED_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[_value_pb2.Row]
    packed_rows: bytes
    row_count: int
    notices: _containers.RepeatedCompositeFieldContainer[_error_pb2.PgError]
    def __init__(self, rows: _Optional[_Iterable[_Union[_value_pb2.Row, _Mapping]]] = ..., packed_rows: _Optional[bytes] = ..., row_count: _Optional[int] = ..., notices: _Optional[_Iterable[_Union[_error_pb2.PgError, _Mapping]]] = ...) -> None: ...

class ResultTrailer(_message.Message):
    __slots__ = ("row_count", "command_tag", "notices", "commit", "state")
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_TAG_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    row_count: int
    command_tag: str
    notices: _containers.RepeatedCompositeFieldContainer[_error_pb2.PgError]
    commit: CommitResponse
    state: SessionState
    def __init__(self, row_count: _Optional[int] = ..., command_tag: _Optional[str] = ..., notices: _Optional[_Iterable[_Union[_error_pb2.PgError, _Mapping]]] = ..., commit: _Optional[_Union[CommitResponse, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class ExecuteBatchRequest(_message.Message):
    __slots__ = ("session_token", "statements", "commit", "max_rows", "timeout", "seq", "transaction_options")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATEMENTS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    statements: _containers.RepeatedCompositeFieldContainer[BatchStatement]
    commit: bool
    max_rows: int
    timeout: _duration_pb2.Duration
    seq: int
    transaction_options: _transaction_pb2.TransactionOptions
    def __init__(self, session_token: _Optional[str] = ..., statements: _Optional[_Iterable[_Union[BatchStatement, _Mapping]]] = ..., commit: bool = ..., max_rows: _Optional[int] = ..., timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., seq: _Optional[int] = ..., transaction_options: _Optional[_Union[_transaction_pb2.TransactionOptions, _Mapping]] = ..., **kwargs) -> None: ...

class BatchStatement(_message.Message):
    __slots__ = ("sql", "parameters", "parameter_sets")
    SQL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SETS_FIELD_NUMBER: _ClassVar[int]
    sql: str
    parameters: _containers.RepeatedCompositeFieldContainer[_value_pb2.Parameter]
    parameter_sets: _containers.RepeatedCompositeFieldContainer[ParameterSet]
    def __init__(self, sql: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[_value_pb2.Parameter, _Mapping]]] = ..., parameter_sets: _Optional[_Iterable[_Union[ParameterSet, _Mapping]]] = ...) -> None: ...

class ParameterSet(_message.Message):
    __slots__ = ("parameters",)
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[_value_pb2.Parameter]
    def __init__(self, parameters: _Optional[_Iterable[_Union[_value_pb2.Parameter, _Mapping]]] = ...) -> None: ...

class ExecuteBatchResponse(_message.Message):
    __slots__ = ("results", "commit", "state")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[StatementResult]
    commit: CommitResponse
    state: SessionState
    def __init__(self, results: _Optional[_Iterable[_Union[StatementResult, _Mapping]]] = ..., commit: _Optional[_Union[CommitResponse, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class StatementResult(_message.Message):
    __slots__ = ("columns", "rows", "row_count", "command_tag", "notices")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_TAG_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[_value_pb2.Column]
    rows: _containers.RepeatedCompositeFieldContainer[_value_pb2.Row]
    row_count: int
    command_tag: str
    notices: _containers.RepeatedCompositeFieldContainer[_error_pb2.PgError]
    def __init__(self, columns: _Optional[_Iterable[_Union[_value_pb2.Column, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[_value_pb2.Row, _Mapping]]] = ..., row_count: _Optional[int] = ..., command_tag: _Optional[str] = ..., notices: _Optional[_Iterable[_Union[_error_pb2.PgError, _Mapping]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    def __init__(self, session_token: _Optional[str] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("outcome", "commit_token", "transaction_id", "state")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    outcome: _transaction_pb2.Outcome
    commit_token: str
    transaction_id: int
    state: SessionState
    def __init__(self, outcome: _Optional[_Union[_transaction_pb2.Outcome, str]] = ..., commit_token: _Optional[str] = ..., transaction_id: _Optional[int] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("session_token", "savepoint")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    savepoint: str
    def __init__(self, session_token: _Optional[str] = ..., savepoint: _Optional[str] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    def __init__(self, state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class CreateSavepointRequest(_message.Message):
    __slots__ = ("session_token", "name", "transaction_options")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    name: str
    transaction_options: _transaction_pb2.TransactionOptions
    def __init__(self, session_token: _Optional[str] = ..., name: _Optional[str] = ..., transaction_options: _Optional[_Union[_transaction_pb2.TransactionOptions, _Mapping]] = ...) -> None: ...

class CreateSavepointResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    def __init__(self, state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class ReleaseSavepointRequest(_message.Message):
    __slots__ = ("session_token", "name")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    name: str
    def __init__(self, session_token: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ReleaseSavepointResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    def __init__(self, state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class ResolveCommitRequest(_message.Message):
    __slots__ = ("commit_token", "wait")
    COMMIT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    commit_token: str
    wait: _duration_pb2.Duration
    def __init__(self, commit_token: _Optional[str] = ..., wait: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ResolveCommitResponse(_message.Message):
    __slots__ = ("outcome", "transaction_id", "unknown_reason")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_REASON_FIELD_NUMBER: _ClassVar[int]
    outcome: _transaction_pb2.Outcome
    transaction_id: int
    unknown_reason: UnknownReason
    def __init__(self, outcome: _Optional[_Union[_transaction_pb2.Outcome, str]] = ..., transaction_id: _Optional[int] = ..., unknown_reason: _Optional[_Union[UnknownReason, str]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    def __init__(self, session_token: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("cancelled", "state")
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    state: SessionState
    def __init__(self, cancelled: bool = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    def __init__(self, session_token: _Optional[str] = ...) -> None: ...

class CloseResponse(_message.Message):
    __slots__ = ("end_reason",)
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    end_reason: EndReason
    def __init__(self, end_reason: _Optional[_Union[EndReason, str]] = ...) -> None: ...

class KeepAliveRequest(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    def __init__(self, session_token: _Optional[str] = ...) -> None: ...

class KeepAliveResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    def __init__(self, state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    def __init__(self, session_token: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("state", "heartbeat", "lease_low", "transaction_long", "blocked_by", "draining", "ended")
    STATE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    LEASE_LOW_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_LONG_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_BY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    state: SessionState
    heartbeat: Heartbeat
    lease_low: LeaseLow
    transaction_long: TransactionLong
    blocked_by: BlockedBy
    draining: Draining
    ended: Ended
    def __init__(self, state: _Optional[_Union[SessionState, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., lease_low: _Optional[_Union[LeaseLow, _Mapping]] = ..., transaction_long: _Optional[_Union[TransactionLong, _Mapping]] = ..., blocked_by: _Optional[_Union[BlockedBy, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseLow(_message.Message):
    __slots__ = ("end_reason", "remaining")
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    end_reason: EndReason
    remaining: _duration_pb2.Duration
    def __init__(self, end_reason: _Optional[_Union[EndReason, str]] = ..., remaining: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class TransactionLong(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockedBy(_message.Message):
    __slots__ = ("blockers",)
    BLOCKERS_FIELD_NUMBER: _ClassVar[int]
    blockers: _containers.RepeatedCompositeFieldContainer[Blocker]
    def __init__(self, blockers: _Optional[_Iterable[_Union[Blocker, _Mapping]]] = ...) -> None: ...

class Blocker(_message.Message):
    __slots__ = ("backend_pid", "user", "application_name", "state")
    BACKEND_PID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    backend_pid: int
    user: str
    application_name: str
    state: str
    def __init__(self, backend_pid: _Optional[int] = ..., user: _Optional[str] = ..., application_name: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ended(_message.Message):
    __slots__ = ("end_reason",)
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    end_reason: EndReason
    def __init__(self, end_reason: _Optional[_Union[EndReason, str]] = ...) -> None: ...

class InteractRequest(_message.Message):
    __slots__ = ("session_token", "begin_session", "execute", "execute_batch", "commit", "rollback", "create_savepoint", "release_savepoint", "resume")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_SESSION_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_BATCH_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    CREATE_SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    begin_session: BeginSessionRequest
    execute: ExecuteRequest
    execute_batch: ExecuteBatchRequest
    commit: CommitRequest
    rollback: RollbackRequest
    create_savepoint: CreateSavepointRequest
    release_savepoint: ReleaseSavepointRequest
    resume: bool
    def __init__(self, session_token: _Optional[str] = ..., begin_session: _Optional[_Union[BeginSessionRequest, _Mapping]] = ..., execute: _Optional[_Union[ExecuteRequest, _Mapping]] = ..., execute_batch: _Optional[_Union[ExecuteBatchRequest, _Mapping]] = ..., commit: _Optional[_Union[CommitRequest, _Mapping]] = ..., rollback: _Optional[_Union[RollbackRequest, _Mapping]] = ..., create_savepoint: _Optional[_Union[CreateSavepointRequest, _Mapping]] = ..., release_savepoint: _Optional[_Union[ReleaseSavepointRequest, _Mapping]] = ..., resume: bool = ...) -> None: ...

class InteractResponse(_message.Message):
    __slots__ = ("session_state", "begin_session", "execute", "execute_batch", "commit", "rollback", "create_savepoint", "release_savepoint", "failure")
    SESSION_STATE_FIELD_NUMBER: _ClassVar[int]
    BEGIN_SESSION_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_BATCH_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    CREATE_SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_SAVEPOINT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    session_state: SessionState
    begin_session: BeginSessionResponse
    execute: ExecuteResponse
    execute_batch: ExecuteBatchResponse
    commit: CommitResponse
    rollback: RollbackResponse
    create_savepoint: CreateSavepointResponse
    release_savepoint: ReleaseSavepointResponse
    failure: _error_pb2.Failure
    def __init__(self, session_state: _Optional[_Union[SessionState, _Mapping]] = ..., begin_session: _Optional[_Union[BeginSessionResponse, _Mapping]] = ..., execute: _Optional[_Union[ExecuteResponse, _Mapping]] = ..., execute_batch: _Optional[_Union[ExecuteBatchResponse, _Mapping]] = ..., commit: _Optional[_Union[CommitResponse, _Mapping]] = ..., rollback: _Optional[_Union[RollbackResponse, _Mapping]] = ..., create_savepoint: _Optional[_Union[CreateSavepointResponse, _Mapping]] = ..., release_savepoint: _Optional[_Union[ReleaseSavepointResponse, _Mapping]] = ..., failure: _Optional[_Union[_error_pb2.Failure, _Mapping]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_token",)
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    def __init__(self, session_token: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session_id", "engine", "database", "user", "server_version", "backend_pid", "state", "end_reason", "labels", "host", "pool", "profile")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    engine: str
    database: str
    user: str
    server_version: str
    backend_pid: int
    state: SessionState
    end_reason: EndReason
    labels: _containers.ScalarMap[str, str]
    host: str
    pool: PoolStatistics
    profile: str
    def __init__(self, session_id: _Optional[str] = ..., engine: _Optional[str] = ..., database: _Optional[str] = ..., user: _Optional[str] = ..., server_version: _Optional[str] = ..., backend_pid: _Optional[int] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ..., end_reason: _Optional[_Union[EndReason, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., host: _Optional[str] = ..., pool: _Optional[_Union[PoolStatistics, _Mapping]] = ..., profile: _Optional[str] = ...) -> None: ...

class PoolStatistics(_message.Message):
    __slots__ = ("size", "overflow_max", "open", "in_use", "idle", "waiting", "sub_pools", "opened", "login_failures")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_MAX_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SUB_POOLS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    LOGIN_FAILURES_FIELD_NUMBER: _ClassVar[int]
    size: int
    overflow_max: int
    open: int
    in_use: int
    idle: int
    waiting: int
    sub_pools: int
    opened: int
    login_failures: int
    def __init__(self, size: _Optional[int] = ..., overflow_max: _Optional[int] = ..., open: _Optional[int] = ..., in_use: _Optional[int] = ..., idle: _Optional[int] = ..., waiting: _Optional[int] = ..., sub_pools: _Optional[int] = ..., opened: _Optional[int] = ..., login_failures: _Optional[int] = ...) -> None: ...
