from google.protobuf import duration_pb2 as _duration_pb2
from sessionbroker.v1 import error_pb2 as _error_pb2
from sessionbroker.v1 import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CopyFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COPY_FORMAT_UNSPECIFIED: _ClassVar[CopyFormat]
    COPY_FORMAT_TEXT: _ClassVar[CopyFormat]
    COPY_FORMAT_CSV: _ClassVar[CopyFormat]
    COPY_FORMAT_BINARY: _ClassVar[CopyFormat]
COPY_FORMAT_UNSPECIFIED: CopyFormat
COPY_FORMAT_TEXT: CopyFormat
COPY_FORMAT_CSV: CopyFormat
COPY_FORMAT_BINARY: CopyFormat

class CopyContext(_message.Message):
    __slots__ = ("session_token", "engine", "profile", "options", "commit", "timeout")
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    session_token: str
    engine: str
    profile: str
    options: _session_pb2.SessionOptions
    commit: bool
    timeout: _duration_pb2.Duration
    def __init__(self, session_token: _Optional[str] = ..., engine: _Optional[str] = ..., profile: _Optional[str] = ..., options: _Optional[_Union[_session_pb2.SessionOptions, _Mapping]] = ..., commit: bool = ..., timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., **kwargs) -> None: ...

class CopyOptions(_message.Message):
    __slots__ = ("format", "header", "delimiter", "null", "quote", "escape")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DELIMITER_FIELD_NUMBER: _ClassVar[int]
    NULL_FIELD_NUMBER: _ClassVar[int]
    QUOTE_FIELD_NUMBER: _ClassVar[int]
    ESCAPE_FIELD_NUMBER: _ClassVar[int]
    format: CopyFormat
    header: bool
    delimiter: str
    null: str
    quote: str
    escape: str
    def __init__(self, format: _Optional[_Union[CopyFormat, str]] = ..., header: bool = ..., delimiter: _Optional[str] = ..., null: _Optional[str] = ..., quote: _Optional[str] = ..., escape: _Optional[str] = ...) -> None: ...

class CopyInRequest(_message.Message):
    __slots__ = ("target", "data", "end")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    target: CopyInTarget
    data: bytes
    end: CopyInEnd
    def __init__(self, target: _Optional[_Union[CopyInTarget, _Mapping]] = ..., data: _Optional[bytes] = ..., end: _Optional[_Union[CopyInEnd, _Mapping]] = ...) -> None: ...

class CopyInEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CopyInTarget(_message.Message):
    __slots__ = ("context", "table", "columns", "options")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    context: CopyContext
    table: str
    columns: _containers.RepeatedScalarFieldContainer[str]
    options: CopyOptions
    def __init__(self, context: _Optional[_Union[CopyContext, _Mapping]] = ..., table: _Optional[str] = ..., columns: _Optional[_Iterable[str]] = ..., options: _Optional[_Union[CopyOptions, _Mapping]] = ...) -> None: ...

class CopyInResponse(_message.Message):
    __slots__ = ("row_count", "byte_count", "commit", "state", "notices")
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    row_count: int
    byte_count: int
    commit: _session_pb2.CommitResponse
    state: _session_pb2.SessionState
    notices: _containers.RepeatedCompositeFieldContainer[_error_pb2.PgError]
    def __init__(self, row_count: _Optional[int] = ..., byte_count: _Optional[int] = ..., commit: _Optional[_Union[_session_pb2.CommitResponse, _Mapping]] = ..., state: _Optional[_Union[_session_pb2.SessionState, _Mapping]] = ..., notices: _Optional[_Iterable[_Union[_error_pb2.PgError, _Mapping]]] = ...) -> None: ...

class CopyOutRequest(_message.Message):
    __slots__ = ("context", "table", "query", "columns", "options")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    context: CopyContext
    table: str
    query: str
    columns: _containers.RepeatedScalarFieldContainer[str]
    options: CopyOptions
    def __init__(self, context: _Optional[_Union[CopyContext, _Mapping]] = ..., table: _Optional[str] = ..., query: _Optional[str] = ..., columns: _Optional[_Iterable[str]] = ..., options: _Optional[_Union[CopyOptions, _Mapping]] = ...) -> None: ...

class CopyOutResponse(_message.Message):
    __slots__ = ("data", "trailer")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TRAILER_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    trailer: CopyOutTrailer
    def __init__(self, data: _Optional[bytes] = ..., trailer: _Optional[_Union[CopyOutTrailer, _Mapping]] = ...) -> None: ...

class CopyOutTrailer(_message.Message):
    __slots__ = ("row_count", "byte_count", "commit", "state", "notices")
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    row_count: int
    byte_count: int
    commit: _session_pb2.CommitResponse
    state: _session_pb2.SessionState
    notices: _containers.RepeatedCompositeFieldContainer[_error_pb2.PgError]
    def __init__(self, row_count: _Optional[int] = ..., byte_count: _Optional[int] = ..., commit: _Optional[_Union[_session_pb2.CommitResponse, _Mapping]] = ..., state: _Optional[_Union[_session_pb2.SessionState, _Mapping]] = ..., notices: _Optional[_Iterable[_Union[_error_pb2.PgError, _Mapping]]] = ...) -> None: ...
