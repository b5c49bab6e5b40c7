"""An afternoon's work of an owner, as the manuals of Flask, Flask-SQLAlchemy and Flask-Login have it."""

from flask import Blueprint, Response, jsonify, redirect, render_template_string, request, stream_with_context, url_for
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from markupsafe import Markup
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app.extensions import db
from app.models import UtcDateTime, utc_now
from flask_pooling import run

login_manager = LoginManager()
bp = Blueprint("members", __name__, url_prefix="/members")
public = Blueprint("public", __name__, url_prefix="/public")


class Member(UserMixin, db.Model):
    __tablename__ = "members"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    joined_at: Mapped[UtcDateTime] = mapped_column(UtcDateTime, default=utc_now)
    books: Mapped[list["Book"]] = relationship(back_populates="owner", cascade="all, delete-orphan")


class Book(db.Model):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    owner_id: Mapped[int] = mapped_column(ForeignKey("members.id", ondelete="CASCADE"))
    owner: Mapped[Member] = relationship(back_populates="books")


class Report(db.Model):
    """In another database, in a table of the same name as the example's."""

    __bind_key__ = "reports"
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


@login_manager.user_loader
def load_user(member_id):
    return db.session.get(Member, int(member_id))


@bp.before_request
@login_required
def guard():
    """Let members in, and nobody else."""


@bp.get("/books")
def books():
    return jsonify([book.title for book in current_user.books])


@bp.post("/books")
def add_book():
    db.session.add(Book(title=request.form["title"], owner=current_user))
    db.session.commit()
    return redirect(url_for("members.books"))


@bp.delete("/me")
def leave():
    db.session.delete(current_user._get_current_object())
    db.session.commit()
    return "", 204


@public.post("/login")
def login():
    member = db.session.scalar(select(Member).filter_by(name=request.form["name"]))
    if member is None:
        member = Member(name=request.form["name"])
        db.session.add(member)
        db.session.commit()
    login_user(member, remember=True)
    return redirect(url_for("members.books"))


@public.get("/books")
def count():
    return jsonify(run(text("select count(*) from books"))[0][0])


@public.get("/form")
def form():
    page = '<link rel="stylesheet" href="{{ url_for("static", filename="style.css") }}"><form method="post"></form>'
    return render_template_string(page), {"Referrer-Policy": "same-origin"}


@public.route("/reports", methods=["GET", "POST"])
def reports():
    """List the bind's rows, by the session and by `run`, in every method."""
    if request.method == "POST":
        db.session.add(Report(title=request.form["title"]))
        db.session.commit()
    return jsonify(session=[each.title for each in db.session.scalars(select(Report))],
                   run=[row.title for row in run(select(Report))])  # fmt: skip


@public.get("/stream")
def stream():
    def rows():
        yield from (f"{number}\n" for number in db.session.scalars(text("select 1 union all select 2")))

    return Response(stream_with_context(rows()), mimetype="text/plain")


@public.get("/markup")
def markup():
    return jsonify(b=1, a=Markup("<b>bold</b>"))


@public.get("/fails")
def fails():
    return 1 / 0
