"""Transfers without committing, says so, and waits to be killed. Usage: abandon.py HOST:PORT"""

import sys

import grpc
from google.protobuf.duration_pb2 import Duration
from sessionbroker.v1 import session_pb2 as pb
from sessionbroker.v1 import session_pb2_grpc

broker = session_pb2_grpc.SessionServiceStub(grpc.insecure_channel(sys.argv[1]))
token = broker.BeginSession(pb.BeginSessionRequest(lease_ttl=Duration(seconds=1))).session_token
broker.Execute(pb.ExecuteRequest(session_token=token, sql="UPDATE accounts SET balance = 100 + (id * 2 - 3) * 50"))
print("transferred", flush=True)
sys.stdin.read()
