"""Threads of one process, each with a connection of its own."""

import threading

import sqlalchemy as sa
from flask import Flask

from app.extensions import db
from app.models import Note


def test_threads_see_each_others_commits_only(app: Flask) -> None:
    """Four threads, ten rows each, forty rows at the end; and nobody sees what is not committed."""

    def write() -> None:
        for _ in range(10):
            with app.app_context():
                db.session.add(Note(title="x"))
                db.session.commit()

    def count() -> int:
        with app.app_context():  # another session, so another connection
            return db.session.scalar(sa.select(sa.func.count()).select_from(Note)) or 0

    with app.app_context():
        db.session.add(Note(title="not committed"))
        db.session.flush()
        if db.engine.pool.__class__ is sa.NullPool or db.engine.pool.size() > 1:  # type: ignore[attr-defined]
            assert count() == 0
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count() == 40
