"""Come in, and see who else is there."""

from flask import Blueprint, jsonify, request
from flask_login import current_user, login_required, login_user

from members import db
from members.models import Member

bp = Blueprint("members", __name__)


@bp.post("/join")
def join():
    member = Member(name=request.form["name"])
    db.session.add(member)
    db.session.commit()
    login_user(member)
    return "", 201


@bp.get("/count")
def count():
    return str(db.session.query(Member).count())


@bp.get("/members")
@login_required
def members():
    return jsonify(me=current_user.name, members=[each.name for each in db.session.scalars(db.select(Member))])
