from google.protobuf import duration_pb2 as _duration_pb2
from sessionbroker.v1 import session_pb2 as _session_pb2
from sessionbroker.v1 import transaction_pb2 as _transaction_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListSessionsRequest(_message.Message):
    __slots__ = ("principal", "engine", "profile", "transaction_state", "labels", "idle_longer_than", "transaction_longer_than", "session_id", "page_size", "page_token")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_STATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    IDLE_LONGER_THAN_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_LONGER_THAN_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    principal: str
    engine: str
    profile: str
    transaction_state: _transaction_pb2.TransactionState
    labels: _containers.ScalarMap[str, str]
    idle_longer_than: _duration_pb2.Duration
    transaction_longer_than: _duration_pb2.Duration
    session_id: str
    page_size: int
    page_token: str
    def __init__(self, principal: _Optional[str] = ..., engine: _Optional[str] = ..., profile: _Optional[str] = ..., transaction_state: _Optional[_Union[_transaction_pb2.TransactionState, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., idle_longer_than: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., transaction_longer_than: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., session_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token", "blockers_complete")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BLOCKERS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionOverview]
    next_page_token: str
    blockers_complete: bool
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionOverview, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., blockers_complete: bool = ...) -> None: ...

class SessionOverview(_message.Message):
    __slots__ = ("session_id", "principal", "engine", "profile", "labels", "state", "age", "idle_time", "transaction_age", "statement_age", "backend_pid", "host", "blocked_by", "one_shot")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIME_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_AGE_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_AGE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_BY_FIELD_NUMBER: _ClassVar[int]
    ONE_SHOT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    principal: str
    engine: str
    profile: str
    labels: _containers.ScalarMap[str, str]
    state: _session_pb2.SessionState
    age: _duration_pb2.Duration
    idle_time: _duration_pb2.Duration
    transaction_age: _duration_pb2.Duration
    statement_age: _duration_pb2.Duration
    backend_pid: int
    host: str
    blocked_by: _containers.RepeatedCompositeFieldContainer[BlockingBackend]
    one_shot: bool
    def __init__(self, session_id: _Optional[str] = ..., principal: _Optional[str] = ..., engine: _Optional[str] = ..., profile: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., state: _Optional[_Union[_session_pb2.SessionState, _Mapping]] = ..., age: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., idle_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., transaction_age: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., statement_age: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., backend_pid: _Optional[int] = ..., host: _Optional[str] = ..., blocked_by: _Optional[_Iterable[_Union[BlockingBackend, _Mapping]]] = ..., one_shot: bool = ...) -> None: ...

class BlockingBackend(_message.Message):
    __slots__ = ("blocker", "session_id")
    BLOCKER_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    blocker: _session_pb2.Blocker
    session_id: str
    def __init__(self, blocker: _Optional[_Union[_session_pb2.Blocker, _Mapping]] = ..., session_id: _Optional[str] = ...) -> None: ...

class TerminateSessionRequest(_message.Message):
    __slots__ = ("session_id", "reason")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    reason: str
    def __init__(self, session_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class TerminateSessionResponse(_message.Message):
    __slots__ = ("session", "end_reason", "is_over")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    IS_OVER_FIELD_NUMBER: _ClassVar[int]
    session: SessionOverview
    end_reason: _session_pb2.EndReason
    is_over: bool
    def __init__(self, session: _Optional[_Union[SessionOverview, _Mapping]] = ..., end_reason: _Optional[_Union[_session_pb2.EndReason, str]] = ..., is_over: bool = ...) -> None: ...

class ListEnginesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineOverview]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineOverview, _Mapping]]] = ...) -> None: ...

class EngineOverview(_message.Message):
    __slots__ = ("name", "database", "user", "server_version", "pool", "reachable", "unreachable_cause", "is_default", "profiles")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_CAUSE_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    database: str
    user: str
    server_version: str
    pool: _session_pb2.PoolStatistics
    reachable: bool
    unreachable_cause: str
    is_default: bool
    profiles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., database: _Optional[str] = ..., user: _Optional[str] = ..., server_version: _Optional[str] = ..., pool: _Optional[_Union[_session_pb2.PoolStatistics, _Mapping]] = ..., reachable: bool = ..., unreachable_cause: _Optional[str] = ..., is_default: bool = ..., profiles: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("live_sessions",)
    LIVE_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    live_sessions: int
    def __init__(self, live_sessions: _Optional[int] = ...) -> None: ...
