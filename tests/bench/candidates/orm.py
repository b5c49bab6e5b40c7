"""Flask and Flask-SQLAlchemy as most people write them: models, the default session, and one of three pools."""

import os
from datetime import UTC, datetime

import sqlalchemy as sa
from flask import Flask, jsonify, request, url_for
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


def now():
    return datetime.now(UTC)


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(200))
    body: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), default=now)
    updated_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), default=now, onupdate=now)

    def as_dict(self):
        return {
            "id": self.id,
            "title": self.title,
            "body": self.body,
            "created_at": self.created_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
        }


def guide():
    """Make the guide's app with its settings, which Flask-SQLAlchemy has ignored since 3.0: the pool is 5 + 10."""
    return create_app(SQLALCHEMY_POOL_SIZE=20, SQLALCHEMY_MAX_OVERFLOW=0)


def preping():
    """Make an app with Flask-SQLAlchemy's defaults, and the one option that everybody adds."""
    return create_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_pre_ping": True})


def nullpool():
    """Make an app with a connection for each request."""
    return create_app(SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.NullPool})


def create_app(**config):
    app = Flask(__name__)
    app.config.from_mapping(SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"], **config)
    db.init_app(app)

    @app.get("/api/notes/<int:note_id>")
    def read(note_id):
        return jsonify(db.get_or_404(Note, note_id).as_dict())

    @app.get("/api/notes")
    def page():
        limit, after = request.args.get("limit", 20, int), request.args.get("after", 0, int)
        wanted = sa.select(Note).where(Note.id > after).order_by(Note.id).limit(limit + 1)
        notes = db.session.scalars(wanted).all()
        items = [note.as_dict() for note in notes[:limit]]
        return jsonify(items=items, next=items[-1]["id"] if len(notes) > limit else None)

    @app.post("/api/notes")
    def create():
        given = request.get_json()
        note = Note(title=given["title"], body=given.get("body", ""))
        db.session.add(note)
        db.session.flush()
        answer = note.as_dict()  # before the commit, or it would be read again
        db.session.commit()
        return jsonify(answer), 201, {"Location": url_for("read", note_id=answer["id"])}

    @app.get("/slow")
    def slow():
        db.session.execute(sa.text("select pg_sleep(0.05)"))
        return {"slept": 0.05}

    return app
