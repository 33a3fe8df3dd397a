"""The service that the broker is compared with: FastAPI and SQLAlchemy, written as their own guides have it.

Endpoints are plain functions, which FastAPI runs in its threads; each has an ORM session for its transaction. The SQL
that comes out is what the benchmark's other clients run.
"""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = create_engine(os.environ["DATABASE_URL"])
app = FastAPI()


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "pgbench_accounts"

    aid: Mapped[int] = mapped_column(primary_key=True)
    abalance: Mapped[int]


class Change(BaseModel):
    account: int
    delta: int


class Balance(BaseModel):
    balance: int


@app.get("/accounts/{account}")
def read(account: int) -> Balance:
    with Session(engine) as session:
        balance = session.scalars(select(Account.abalance).where(Account.aid == account)).one()
    return Balance(balance=balance)


@app.post("/changes")
def change(change: Change) -> Balance:
    with Session(engine) as session, session.begin():
        balance = session.scalars(select(Account.abalance).where(Account.aid == change.account)).one()
        changed = update(Account).where(Account.aid == change.account).values(abalance=Account.abalance + change.delta)
        session.execute(changed)
    return Balance(balance=balance)
