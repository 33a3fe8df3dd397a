"""Statements on their way out, and results on their way in, as the protocol's messages have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from session_broker._arguments import Seconds
from session_broker.errors import Advice, DataError, Error, ProgrammingError
from session_broker.results import AtLeast, Commit, Result, Row, Statement
from session_broker.values import RESULT_FORMAT, Column, Loaders, row_decoder, to_parameter_sets, to_parameters
from sessionbroker.v1 import bulk_pb2, run_pb2, session_pb2, value_pb2

StatementLike = Statement | tuple[str, Sequence[object]] | str


@dataclass(frozen=True)
class CallOptions:
    """How a statement is run."""

    commit: bool = False
    timeout: Seconds | None = None
    max_rows: int | None = None
    statement_class: str = ""


def execute_request(sql: str, params: Sequence[object], options: CallOptions) -> session_pb2.ExecuteRequest:
    """One statement.

    Raises:
        ProgrammingError: A parameter cannot be sent.
    """
    request = session_pb2.ExecuteRequest(
        sql=sql,
        parameters=to_parameters(params),
        commit=options.commit,
        result_format=RESULT_FORMAT,
        max_rows=options.max_rows or 0,
    )
    setattr(request, "class", options.statement_class)
    return request


def stream_request(sql: str, params: Sequence[object], options: CallOptions) -> session_pb2.ExecuteStreamRequest:
    """One statement, for its rows as they come.

    Raises:
        ProgrammingError: A parameter cannot be sent.
    """
    request = session_pb2.ExecuteStreamRequest(
        sql=sql,
        parameters=to_parameters(params),
        commit=options.commit,
        result_format=RESULT_FORMAT,
        max_rows=options.max_rows or 0,
    )
    setattr(request, "class", options.statement_class)
    return request


def batch_request(statements: Sequence[StatementLike], options: CallOptions) -> session_pb2.ExecuteBatchRequest:
    """Many statements.

    Raises:
        ProgrammingError: A parameter cannot be sent.
    """
    request = session_pb2.ExecuteBatchRequest(
        statements=[batch_statement(index, statement) for index, statement in enumerate(statements)],
        commit=options.commit,
        max_rows=options.max_rows or 0,
    )
    setattr(request, "class", options.statement_class)
    return request


def copy_context(context: bulk_pb2.CopyContext, options: CallOptions) -> bulk_pb2.CopyContext:
    """Says how a COPY is run."""
    context.commit = options.commit
    setattr(context, "class", options.statement_class)
    return context


def result_of(message: Any, loaders: Loaders, *, packed: bool, commit: Commit | None) -> Result:
    """The result that a message holds."""
    columns: Sequence[value_pb2.Column] = message.columns
    rows: list[Row] = []
    if columns and message.row_count:
        decode = row_decoder(columns, packed, loaders)
        rows = decode(message.packed_rows if packed else message.rows)
    described = [Column.of(column) for column in columns]
    return Result(described, rows, message.row_count, message.command_tag, list(message.notices), commit)


@contextlib.contextmanager
def reading(commit: session_pb2.CommitResponse | None) -> Iterator[None]:
    """Has an error of reading a result say that its transaction is committed.

    Raises:
        DataError: A result of a commit cannot be read.
    """
    try:
        yield
    except Exception as error:
        if commit is None:
            raise
        why = str(error) if isinstance(error, Error) else f"{type(error).__name__} in a loader"
        told = DataError(f"the transaction is committed, but its result cannot be read: {why}")
        told.commit, told.advice = commit, Advice.NOTHING
        raise told from error


def _statement_of(statement: StatementLike) -> Statement:
    if isinstance(statement, Statement):
        return statement
    return Statement(statement) if isinstance(statement, str) else Statement(*statement)


def batch_statement(index: int, given: StatementLike) -> session_pb2.BatchStatement:
    """A statement of a batch.

    Raises:
        ProgrammingError: It expects something, or a parameter cannot be sent.
    """
    statement = _statement_of(given)
    if statement.expect is not None:
        raise ProgrammingError(f"statements[{index}].expect: a batch expects nothing, Broker.run() does")
    return session_pb2.BatchStatement(
        sql=statement.sql, parameters=to_parameters(statement.params), parameter_sets=_parameter_sets(statement)
    )


def run_statement(given: StatementLike) -> run_pb2.RunStatement:
    """A statement of a whole transaction.

    Raises:
        ProgrammingError: A parameter cannot be sent.
    """
    statement = _statement_of(given)
    made = run_pb2.RunStatement(
        sql=statement.sql, parameters=to_parameters(statement.params), parameter_sets=_parameter_sets(statement)
    )
    if isinstance(statement.expect, AtLeast):
        made.expectation.at_least = statement.expect.rows
    elif statement.expect is not None:
        made.expectation.exactly = statement.expect
    return made


def _parameter_sets(statement: Statement) -> list[session_pb2.ParameterSet]:
    sets = to_parameter_sets(statement.parameter_sets)
    return [session_pb2.ParameterSet(parameters=parameters) for parameters in sets]
