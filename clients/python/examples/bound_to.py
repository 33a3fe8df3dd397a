"""What is behind a session: SQLAlchemy's `get_bind`, and the broker's own word."""

from __future__ import annotations

from database import SessionLocal
from sqlalchemy import Engine


def main() -> None:
    """Prints both."""
    with SessionLocal() as session:
        bind = session.get_bind()
        assert isinstance(bind, Engine)
        print(f"bound to {bind.url}, dialect {bind.dialect.name}+{bind.dialect.driver}")

        behind = session.connection().connection.driver_connection.session.get_bind()  # type: ignore[union-attr]
        print(f"engine {behind.name}: database {behind.database} as {behind.user}, PostgreSQL {behind.server_version}")


if __name__ == "__main__":
    main()
