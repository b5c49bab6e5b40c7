"""The example resource: notes that are created, listed page by page, read, changed and deleted.

Each view is one statement, so each is run as a transaction of its own: one round trip. The statements are built once,
at import, on the table's columns, since there are no objects to track in a request that is one statement.
"""

from typing import Any, cast

from flask import Blueprint, Response, jsonify, request, url_for
from marshmallow import RAISE, Schema, ValidationError, fields, validate
from sqlalchemy import Table, bindparam, delete, insert, select, update
from werkzeug.exceptions import NotFound

from app.extensions import run
from app.models import MAX_BODY, MAX_ID, MAX_TITLE, Note

MAX_PAGE = 100

bp = Blueprint("notes", __name__, url_prefix="/api/notes")

TABLE = cast("Table", Note.__table__)
THIS = TABLE.c.id == bindparam("note_id")
GET = select(TABLE).where(THIS)
PAGE = select(TABLE).where(TABLE.c.id > bindparam("after")).order_by(TABLE.c.id).limit(bindparam("limit"))
CREATE = insert(TABLE).returning(TABLE)
CHANGE = update(TABLE).where(THIS).returning(TABLE)
DELETE = delete(TABLE).where(THIS).returning(TABLE.c.id)


def storable(text: str) -> None:
    """Postgres takes no NUL in text."""
    if "\x00" in text:
        raise ValidationError("Contains a character that cannot be stored.")


class NoteSchema(Schema):
    title = fields.String(required=True, validate=[validate.Length(1, MAX_TITLE), storable])
    body = fields.String(load_default="", validate=[validate.Length(0, MAX_BODY), storable])


class PageSchema(Schema):
    limit = fields.Integer(load_default=20, validate=validate.Range(1, MAX_PAGE))
    after = fields.Integer(load_default=0, validate=validate.Range(0, MAX_ID))


note_schema = NoteSchema(unknown=RAISE)
page_schema = PageSchema(unknown=RAISE)


def given() -> dict[str, Any]:
    """The note in the request's body."""
    return dict(note_schema.load(request.get_json()))


@bp.url_value_preprocessor
def no_larger_than_an_id(endpoint: str | None, values: dict[str, Any] | None) -> None:
    """What is too large for the column is nobody's id: not found, where Postgres would raise."""
    if values and values.get("note_id", 0) > MAX_ID:
        raise NotFound(f"There is no note {values['note_id']}.")


def only(rows: list[dict[str, Any]], note_id: int) -> dict[str, Any]:
    """The one row, or 404."""
    if not rows:
        raise NotFound(f"There is no note {note_id}.")
    return rows[0]


@bp.get("")
def page() -> Response:
    """One page, oldest first: `next` is the `after` of the page that follows, null on the last one."""
    wanted = page_schema.load(request.args.to_dict())
    rows = run(PAGE, {"after": wanted["after"], "limit": wanted["limit"] + 1})
    items = rows[: wanted["limit"]]
    return jsonify(items=items, next=items[-1]["id"] if len(rows) > len(items) else None)


@bp.post("")
def create() -> tuple[Response, int, dict[str, str]]:
    note = run(CREATE, given())[0]
    return jsonify(note), 201, {"Location": url_for("notes.read", note_id=note["id"])}


@bp.get("/<int:note_id>")
def read(note_id: int) -> Response:
    return jsonify(only(run(GET, {"note_id": note_id}), note_id))


@bp.put("/<int:note_id>")
def change(note_id: int) -> Response:
    return jsonify(only(run(CHANGE, {"note_id": note_id, **given()}), note_id))


@bp.delete("/<int:note_id>")
def remove(note_id: int) -> tuple[str, int]:
    only(run(DELETE, {"note_id": note_id}), note_id)
    return "", 204
