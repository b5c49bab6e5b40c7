"""The tables. `notes` is the example: delete it together with notes.py and its migration."""

from datetime import UTC, datetime

from sqlalchemy import BigInteger, DateTime, Integer, String, Text, TypeDecorator
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Mapped, mapped_column

from app.extensions import Base

MAX_ID = 2**63 - 1
MAX_TITLE = 200
# So that the largest page, asked for by all threads at once, fits in the memory that a worker is planned with.
MAX_BODY = 10_000


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC on every database; SQLite alone would hand back a naive one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _now() -> datetime:
    return datetime.now(UTC)


class Note(Base):
    __tablename__ = "notes"

    # SQLite numbers rows by itself for INTEGER only.
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    title: Mapped[str] = mapped_column(String(MAX_TITLE))
    body: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=_now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=_now, onupdate=_now)
