"""The members."""

from flask_login import UserMixin

from members import db, login


class Member(UserMixin, db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String(64), unique=True, nullable=False)


@login.user_loader
def load(member_id):
    return db.session.get(Member, int(member_id))
