"""A transfer between two accounts, as a caller in Python makes it. Usage: session.py HOST:PORT"""

import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sessionbroker.v1 import session_pb2 as pb
from sessionbroker.v1 import session_pb2_grpc, transaction_pb2, value_pb2


def parameter(**kind):
    return value_pb2.Parameter(value=value_pb2.Value(**kind))


def reason(error):
    """The stable reason in an error's details."""
    for detail in rpc_status.from_call(error).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    raise AssertionError("an error without ErrorInfo")


def main(address):
    with grpc.insecure_channel(address) as channel:
        broker = session_pb2_grpc.SessionServiceStub(channel)
        begun = broker.BeginSession(pb.BeginSessionRequest(labels={"service": "transfers"}))
        token = begun.session_token
        assert begun.lease_ttl.seconds == 30

        def execute(sql, *parameters):
            return broker.Execute(pb.ExecuteRequest(session_token=token, sql=sql, parameters=parameters))

        amount = parameter(string_value="12.50")
        execute("UPDATE accounts SET balance = balance - $1 WHERE id = $2", amount, parameter(int_value=1))
        result = execute(
            "UPDATE accounts SET balance = balance + $1 WHERE id = $2 RETURNING balance", amount, parameter(int_value=2)
        )
        assert result.rows[0].values[0].string_value == "112.50", result
        assert result.columns[0].type_name == "numeric"
        assert result.state.transaction_state == transaction_pb2.TRANSACTION_STATE_OPEN
        committed = broker.Commit(pb.CommitRequest(session_token=token))
        assert committed.outcome == transaction_pb2.OUTCOME_COMMITTED
        assert committed.transaction_id > 0

        try:
            execute("INSERT INTO accounts VALUES (1, 1)")
            raise AssertionError("a duplicate key was taken")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.ALREADY_EXISTS, error
            assert reason(error) == "DATABASE_ERROR"
        broker.Rollback(pb.RollbackRequest(session_token=token))
        broker.KeepAlive(pb.KeepAliveRequest(session_token=token))
        assert broker.GetSession(pb.GetSessionRequest(session_token=token)).labels["service"] == "transfers"
        closed = broker.Close(pb.CloseRequest(session_token=token))
        assert closed.end_reason == pb.END_REASON_CLOSED
        try:
            execute("SELECT 1")
            raise AssertionError("a closed session ran a statement")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.ABORTED, error
            assert reason(error) == "SESSION_ENDED"


main(sys.argv[1])
