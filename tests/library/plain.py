"""A Flask-SQLAlchemy app that is not this project's: the machinery is tested on it, whatever becomes of `app/`."""

import time
from typing import Any, ClassVar

import sqlalchemy as sa
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship

import flask_pooling
from flask_pooling import DatabaseUrl, NullPool, QueuePool, run

NAME = "plain"  # what its connections are called


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class Item(db.Model):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Shelf(db.Model):
    """Its books come with it, by a join."""

    __tablename__ = "shelves"

    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list["Book"]] = relationship(lazy="joined")


class Book(db.Model):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(sa.ForeignKey("shelves.id"))


class Label(db.Model):
    """Its attributes are not its columns."""

    __tablename__ = "labels"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column("label_text")
    later: Mapped[str] = mapped_column(deferred=True, default="later")
    twice: Mapped[int] = column_property(id * 2)


class Elsewhere(db.Model):
    """In another database, in a table of the same name."""

    __tablename__ = "items"
    __bind_key__ = "other"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Settings(flask_pooling.Settings):
    service_name: ClassVar[str] = NAME

    database_url: DatabaseUrl = sa.make_url("sqlite:///plain.db")

    @property
    def in_production(self) -> bool:
        return True


def create_app(*, process: str | None = None, binds: dict[str, Any] | None = None, **config: Any) -> Flask:
    """Make the app. :param binds: by name, the URL of a database, or all options of its engine."""
    settings = Settings.load()
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.database_url
    app.config["SQLALCHEMY_BINDS"] = binds or {}
    app.config.from_mapping(config)
    flask_pooling.init_app(app, db, settings, pools=(QueuePool, NullPool), process=process)
    app.add_url_rule("/items", view_func=items)
    app.add_url_rule("/items", view_func=add_item, methods=["POST"])
    app.add_url_rule("/sleep", view_func=sleep)
    app.add_url_rule("/think", view_func=think)
    return app


def items() -> list[str]:
    return [row.name for row in run(sa.select(Item).order_by(Item.id))]


def add_item() -> tuple[str, int]:
    """Write, and ask for something else in between, as a view does that checks a quota."""
    db.session.add(Item(name=request.get_data(as_text=True)))
    db.session.flush()
    count = run(sa.select(sa.func.count()).select_from(Item))[0][0]
    db.session.commit()
    return str(count), 201


def sleep() -> str:
    """Run a query that takes a while."""
    return str(len(run(sa.text("select pg_sleep(0.02)"))))


def think() -> str:
    """Answer without the database."""
    time.sleep(float(request.args["seconds"]))
    return ""
