"""Uses a connection, forks, and says what the child hears."""

from __future__ import annotations

import os
import sys

import session_broker

broker = session_broker.connect(sys.argv[1])
session = broker.session()
session.execute("SELECT 1")
child = os.fork()
if child == 0:
    try:
        session.execute("SELECT 1")
    except session_broker.Error as error:
        print(f"child: {type(error).__name__}", flush=True)
    session.abandon()
    broker.close()
    del session, broker
    sys.exit()
_, status = os.waitpid(child, 0)
print(f"child: {status}")
print(f"parent: {session.execute('SELECT 2').scalar()}")
session.close()
broker.close()
