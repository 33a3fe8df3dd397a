"""Routes over sessions of the broker: ``uvicorn app:app`` in this directory, then ``curl localhost:8000/accounts/1``.

The tables are those of ``session-broker dev``.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from database import get_session
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from sqlalchemy import CheckConstraint, Numeric, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """The tables."""


class Account(Base):
    """A row of accounts."""

    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("balance >= 0"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    balance: Mapped[Decimal] = mapped_column(Numeric(12, 2))


class AccountRead(BaseModel):
    """What the routes answer."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    owner: str
    balance: Decimal


class Transfer(BaseModel):
    """Who pays how much to whom."""

    source: PositiveInt
    target: PositiveInt
    amount: Annotated[Decimal, Field(gt=0, decimal_places=2)]


app = FastAPI()
Database = Annotated[Session, Depends(get_session)]


@app.get("/accounts/{account_id}")
def read_account(account_id: int, session: Database) -> AccountRead:
    """One account."""
    account = session.get(Account, account_id)
    if account is None:
        raise HTTPException(404, "there is no such account")
    return AccountRead.model_validate(account)


@app.post("/transfers")
def transfer(order: Transfer, session: Database) -> list[AccountRead]:
    """Moves money, or nothing."""
    wanted = select(Account).where(Account.id.in_([order.source, order.target])).order_by(Account.id).with_for_update()
    accounts = {account.id: account for account in session.scalars(wanted)}
    if accounts.keys() != {order.source, order.target}:
        raise HTTPException(404, "there is no such account")
    accounts[order.source].balance -= order.amount
    accounts[order.target].balance += order.amount
    try:
        session.commit()
    except IntegrityError:
        raise HTTPException(409, "the account does not have so much") from None
    return [AccountRead.model_validate(account) for account in accounts.values()]
