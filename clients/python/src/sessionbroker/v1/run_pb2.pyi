from sessionbroker.v1 import connect_pb2 as _connect_pb2
from sessionbroker.v1 import session_pb2 as _session_pb2
from sessionbroker.v1 import value_pb2 as _value_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunRequest(_message.Message):
    __slots__ = ("engine", "options", "connect_options", "statements", "max_rows", "profile", "attempts_max", "idempotency_key")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CONNECT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    STATEMENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_MAX_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    engine: str
    options: _session_pb2.SessionOptions
    connect_options: _connect_pb2.ConnectOptions
    statements: _containers.RepeatedCompositeFieldContainer[RunStatement]
    max_rows: int
    profile: str
    attempts_max: int
    idempotency_key: str
    def __init__(self, engine: _Optional[str] = ..., options: _Optional[_Union[_session_pb2.SessionOptions, _Mapping]] = ..., connect_options: _Optional[_Union[_connect_pb2.ConnectOptions, _Mapping]] = ..., statements: _Optional[_Iterable[_Union[RunStatement, _Mapping]]] = ..., max_rows: _Optional[int] = ..., profile: _Optional[str] = ..., attempts_max: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., **kwargs) -> None: ...

class RunStatement(_message.Message):
    __slots__ = ("sql", "parameters", "parameter_sets", "expectation")
    SQL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SETS_FIELD_NUMBER: _ClassVar[int]
    EXPECTATION_FIELD_NUMBER: _ClassVar[int]
    sql: str
    parameters: _containers.RepeatedCompositeFieldContainer[_value_pb2.Parameter]
    parameter_sets: _containers.RepeatedCompositeFieldContainer[_session_pb2.ParameterSet]
    expectation: Expectation
    def __init__(self, sql: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[_value_pb2.Parameter, _Mapping]]] = ..., parameter_sets: _Optional[_Iterable[_Union[_session_pb2.ParameterSet, _Mapping]]] = ..., expectation: _Optional[_Union[Expectation, _Mapping]] = ...) -> None: ...

class Expectation(_message.Message):
    __slots__ = ("exactly", "at_least")
    EXACTLY_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    exactly: int
    at_least: int
    def __init__(self, exactly: _Optional[int] = ..., at_least: _Optional[int] = ...) -> None: ...

class RunResponse(_message.Message):
    __slots__ = ("results", "commit", "attempts", "replayed")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[_session_pb2.StatementResult]
    commit: _session_pb2.CommitResponse
    attempts: int
    replayed: bool
    def __init__(self, results: _Optional[_Iterable[_Union[_session_pb2.StatementResult, _Mapping]]] = ..., commit: _Optional[_Union[_session_pb2.CommitResponse, _Mapping]] = ..., attempts: _Optional[int] = ..., replayed: bool = ...) -> None: ...
