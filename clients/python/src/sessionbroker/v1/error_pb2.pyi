from google.protobuf import any_pb2 as _any_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PgError(_message.Message):
    __slots__ = ("severity", "sqlstate", "message", "detail", "hint", "position", "internal_position", "internal_query", "where", "schema", "table", "column", "data_type", "constraint", "file", "line", "routine")
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    SQLSTATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_POSITION_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_QUERY_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    ROUTINE_FIELD_NUMBER: _ClassVar[int]
    severity: str
    sqlstate: str
    message: str
    detail: str
    hint: str
    position: int
    internal_position: int
    internal_query: str
    where: str
    schema: str
    table: str
    column: str
    data_type: str
    constraint: str
    file: str
    line: int
    routine: str
    def __init__(self, severity: _Optional[str] = ..., sqlstate: _Optional[str] = ..., message: _Optional[str] = ..., detail: _Optional[str] = ..., hint: _Optional[str] = ..., position: _Optional[int] = ..., internal_position: _Optional[int] = ..., internal_query: _Optional[str] = ..., where: _Optional[str] = ..., schema: _Optional[str] = ..., table: _Optional[str] = ..., column: _Optional[str] = ..., data_type: _Optional[str] = ..., constraint: _Optional[str] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., routine: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class RetryAdvice(_message.Message):
    __slots__ = ("scope",)
    class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SCOPE_UNSPECIFIED: _ClassVar[RetryAdvice.Scope]
        SCOPE_NOTHING: _ClassVar[RetryAdvice.Scope]
        SCOPE_CALL: _ClassVar[RetryAdvice.Scope]
        SCOPE_TRANSACTION: _ClassVar[RetryAdvice.Scope]
        SCOPE_SESSION: _ClassVar[RetryAdvice.Scope]
        SCOPE_RESOLVE_COMMIT: _ClassVar[RetryAdvice.Scope]
    SCOPE_UNSPECIFIED: RetryAdvice.Scope
    SCOPE_NOTHING: RetryAdvice.Scope
    SCOPE_CALL: RetryAdvice.Scope
    SCOPE_TRANSACTION: RetryAdvice.Scope
    SCOPE_SESSION: RetryAdvice.Scope
    SCOPE_RESOLVE_COMMIT: RetryAdvice.Scope
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    scope: RetryAdvice.Scope
    def __init__(self, scope: _Optional[_Union[RetryAdvice.Scope, str]] = ...) -> None: ...
