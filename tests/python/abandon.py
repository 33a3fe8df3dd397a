"""Begins a session with a lease of a second, updates both accounts without committing, prints the session's token, and
waits to be killed: between two calls, in the middle of a statement, or with a stream attached.

Usage: abandon.py HOST:PORT before-commit|in-a-statement|attached
"""

import sys

import grpc
from google.protobuf.duration_pb2 import Duration
from sessionbroker.v1 import session_pb2 as pb
from sessionbroker.v1 import session_pb2_grpc

address, where = sys.argv[1:]
broker = session_pb2_grpc.SessionServiceStub(grpc.insecure_channel(address))
token = broker.BeginSession(pb.BeginSessionRequest(lease_ttl=Duration(seconds=1))).session_token
broker.Execute(pb.ExecuteRequest(session_token=token, sql="UPDATE accounts SET balance = 100 + (id * 2 - 3) * 50"))
if where == "attached":
    events = broker.Attach(pb.AttachRequest(session_token=token))
    assert next(events).state.attached
print(token, flush=True)
if where == "in-a-statement":
    broker.Execute(pb.ExecuteRequest(session_token=token, sql="SELECT pg_sleep(60)"))
sys.stdin.read()
