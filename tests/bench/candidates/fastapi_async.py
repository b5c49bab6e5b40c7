"""A user's choice for speed: FastAPI, SQLAlchemy's async ORM and asyncpg, with the same connections."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

engine = create_async_engine(
    sa.make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg"),
    pool_size=int(os.environ["BENCH_THREADS"]),
    max_overflow=0,
)
sessions = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


class Base(DeclarativeBase):
    pass


def now() -> datetime:
    return datetime.now(UTC)


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(200))
    body: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), default=now)
    updated_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), default=now, onupdate=now)


class NoteIn(BaseModel):
    title: str = Field(min_length=1, max_length=200)
    body: str = ""


class NoteOut(NoteIn):
    model_config = ConfigDict(from_attributes=True)

    id: int
    created_at: datetime
    updated_at: datetime


class Page(BaseModel):
    items: list[NoteOut]
    next: int | None


async def session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(session)]


@app.get("/api/notes/{note_id}")
async def read(note_id: int, session: Session) -> NoteOut:
    note = await session.get(Note, note_id)
    if note is None:
        raise HTTPException(404)
    return NoteOut.model_validate(note)


@app.get("/api/notes")
async def page(session: Session, limit: int = 20, after: int = 0) -> Page:
    notes = (await session.scalars(sa.select(Note).where(Note.id > after).order_by(Note.id).limit(limit + 1))).all()
    items = [NoteOut.model_validate(note) for note in notes[:limit]]
    return Page(items=items, next=items[-1].id if len(notes) > limit else None)


@app.post("/api/notes", status_code=201)
async def create(given: NoteIn, session: Session, response: Response) -> NoteOut:
    note = Note(title=given.title, body=given.body)
    session.add(note)
    await session.commit()
    response.headers["Location"] = f"/api/notes/{note.id}"
    return NoteOut.model_validate(note)


@app.get("/slow")
async def slow(session: Session) -> dict[str, float]:
    await session.execute(sa.text("select pg_sleep(0.05)"))
    return {"slept": 0.05}
