"""The example resource: notes that are created, listed page by page, read, changed and deleted.

Reads are single statements, so they use `run`: one round trip. Writes use `db.session`, as in any Flask-SQLAlchemy app.
"""

from datetime import datetime
from typing import Annotated, Any

from flask import Blueprint, Response, abort, request, url_for
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import bindparam, select

from app.errors import valid
from app.extensions import db
from app.models import Note
from flask_pooling import run

MAX_ID = 2**63 - 1
MAX_PAGE = 100

# Built once, with a place for each value: building a statement takes longer than sending it.
ONE_NOTE = select(Note).where(Note.id == bindparam("note_id"))
ONE_PAGE = select(Note).where(Note.id > bindparam("after")).order_by(Note.id).limit(bindparam("limit"))

bp = Blueprint("notes", __name__, url_prefix="/api/notes")


def storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("Postgres stores no NUL character")
    return text


Text = Annotated[str, AfterValidator(storable)]


class NoteIn(BaseModel):
    """The JSON that a client sends."""

    model_config = ConfigDict(extra="forbid")

    title: Text = Field(min_length=1, max_length=200)
    # Limited, since a thread builds a page of 100 notes in memory.
    body: Text = Field("", max_length=10_000)


class NoteOut(BaseModel):
    """The JSON that a client gets."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    title: str
    body: str
    created_at: datetime
    updated_at: datetime


class NotesOut(BaseModel):
    """One page of notes. `next` is the `after` of the next page, and null on the last one."""

    items: list[NoteOut]
    next: int | None


class Page(BaseModel):
    """The page that a client asks for."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=MAX_PAGE)
    after: int = Field(0, ge=0, le=MAX_ID)


def answer(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), mimetype="application/json")


@bp.url_value_preprocessor
def find_no_larger_id(endpoint: str | None, values: dict[str, Any] | None) -> None:
    """Answer 404 if the id is too large for the column, which would be an error in the database."""
    if values and values.get("note_id", 0) > MAX_ID:
        abort(404, f"There is no note {values['note_id']}.")


@bp.get("")
def page() -> Response:
    """List one page, oldest notes first."""
    wanted = valid(Page, request.args.to_dict())
    rows = run(ONE_PAGE, {"after": wanted.after, "limit": wanted.limit + 1})
    notes = rows[: wanted.limit]
    following = notes[-1].id if len(rows) > len(notes) else None
    return answer(NotesOut.model_validate({"items": notes, "next": following}))


@bp.post("")
def create() -> tuple[Response, int, dict[str, str]]:
    note = Note(**valid(NoteIn, request.get_json()).model_dump())
    db.session.add(note)
    db.session.flush()  # the note gets its id; after the commit it would be read once more
    created = NoteOut.model_validate(note)
    db.session.commit()
    return answer(created), 201, {"Location": url_for("notes.read", note_id=created.id)}


@bp.get("/<int:note_id>")
def read(note_id: int) -> Response:
    rows = run(ONE_NOTE, {"note_id": note_id})
    return answer(NoteOut.model_validate(rows[0])) if rows else abort(404, f"There is no note {note_id}.")


@bp.put("/<int:note_id>")
def change(note_id: int) -> Response:
    note = db.get_or_404(Note, note_id, description=f"There is no note {note_id}.")
    for name, value in valid(NoteIn, request.get_json()).model_dump().items():
        setattr(note, name, value)
    db.session.flush()
    changed = NoteOut.model_validate(note)
    db.session.commit()
    return answer(changed)


@bp.delete("/<int:note_id>")
def remove(note_id: int) -> tuple[str, int]:
    db.session.delete(db.get_or_404(Note, note_id, description=f"There is no note {note_id}."))
    db.session.commit()
    return "", 204
