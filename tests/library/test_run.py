"""`run`: a transaction of its own in one round trip, or a part of the session's."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.orm import aliased

from flask_pooling import run
from tests.library.conftest import engine_of
from tests.library.plain import Book, Elsewhere, Item, Shelf, db

NAMES = sa.select(Item.name).order_by(Item.id)


def committed(app: Flask, names: str = "select name from items order by id", bind_key: str | None = None) -> list[Any]:
    """Return what another connection sees."""
    with sa.create_engine(engine_of(app, bind_key).url, poolclass=sa.NullPool).connect() as connection:
        return list(connection.scalars(sa.text(names)))


# --- one statement ---------------------------------------------------------------------------------------------------


def test_a_write_is_committed_by_itself(plain: Flask) -> None:
    """Without a word to the session, which stays outside of any transaction."""
    with plain.app_context():
        assert run(sa.insert(Item), {"name": "one"}) == []
        assert not db.session().in_transaction()
        assert committed(plain) == ["one"]
        assert [row.name for row in run(NAMES)] == ["one"]


def test_rows_have_columns(plain: Flask) -> None:
    """As `Model.column` names them."""
    with plain.app_context():
        run(sa.insert(Item), [{"name": "one"}, {"name": "two"}])
        rows = run(sa.select(Item).where(Item.name == sa.bindparam("wanted")), {"wanted": "two"})
        assert [(row.id, row.name) for row in rows] == [(2, "two")]
        (row,) = run(sa.insert(Item).returning(Item.id), {"name": "three"})
        assert row.id == 3


MANY = [{"id": number, "name": "many"} for number in range(1, 2500)]


@pytest.mark.parametrize("statement", [sa.insert(Item), sa.insert(Item).returning(Item.id)])
def test_many_rows_are_one_transaction(plain: Flask, statement: Any) -> None:
    """They go in several parts, and all are there or none is."""
    with plain.app_context():
        with pytest.raises(IntegrityError):
            run(statement, [*MANY, MANY[0]])
        assert committed(plain, "select count(*) from items") == [0]
        run(statement, MANY)
        assert committed(plain, "select count(*) from items") == [len(MANY)]


REFUSED: dict[str, Any] = {
    "yield_per": NAMES.execution_options(yield_per=1),
    "stream_results": NAMES.execution_options(stream_results=True),
}


@pytest.mark.parametrize("in_a_transaction", [False, True])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_rows_cannot_have_is_refused(plain: Flask, reason: str, in_a_transaction: bool) -> None:
    """With the reason: a cursor of the server would need a transaction. Nothing is sent."""
    with plain.app_context():
        if in_a_transaction:
            db.session.execute(sa.select(1))
        with pytest.raises(ArgumentError, match=reason):
            run(REFUSED[reason])
        assert run(NAMES) == []
        assert run(NAMES.execution_options(yield_per=None, stream_results=False)) == []


def test_objects_are_refused_where_a_session_would_give_them(plain: Flask) -> None:
    """A row of columns is what there is outside of the session; what was written is rolled back."""
    returning = sa.insert(Item).values(name="one").returning(Item)
    with plain.app_context():
        assert [row.name for row in run(returning)] == ["one"]
        with pytest.raises(ArgumentError, match="name the columns"), db.session.begin():
            run(returning)
        assert [row.name for row in run(NAMES)] == ["one"]


def test_a_relationship_adds_no_rows(plain: Flask) -> None:
    """One that is loaded by a join would be there once for each of its rows, and a limit would not hold."""
    with plain.app_context():
        run(sa.insert(Shelf), [{"id": 1}, {"id": 2}])
        run(sa.insert(Book), [{"shelf_id": 1}, {"shelf_id": 1}])
        assert [tuple(row) for row in run(sa.select(Shelf).order_by(Shelf.id).limit(1))] == [(1,)]
        assert len(run(sa.select(Shelf.id, Book.id).join(Book))) == 2


def test_an_error_leaves_the_connection_in_order(plain: Flask) -> None:
    """It is back in the pool, and the next statement works."""
    with plain.app_context():
        for _ in range(3):
            with pytest.raises(DBAPIError):
                run(sa.text("select nonsense"))
        run(sa.insert(Item), {"name": "one"})
        assert [row.name for row in run(NAMES)] == ["one"]
        assert pool_is_idle(db.engine)


def pool_is_idle(engine: Engine) -> bool:
    return not isinstance(engine.pool, sa.QueuePool) or engine.pool.checkedout() == 0


def test_others_on_the_same_connection_are_in_transactions(plain: Flask) -> None:
    """AUTOCOMMIT does not stay on the connection that `run` had."""
    insert = "insert into items (name) values ('gone')"
    with plain.app_context():
        run(NAMES)
        with pytest.raises(ZeroDivisionError), db.engine.begin() as connection:
            connection.execute(sa.text(insert))
            raise ZeroDivisionError
        run(NAMES)
        raw = db.engine.raw_connection()
        raw.cursor().execute(insert)
        raw.rollback()
        raw.close()
        run(NAMES)
        db.session.execute(sa.text(insert))
        db.session.rollback()
        assert committed(plain) == []


# --- inside a transaction of the session -----------------------------------------------------------------------------


def test_it_sees_what_the_session_wrote(plain: Flask) -> None:
    """Also what is only added, and not yet flushed."""
    with plain.app_context():
        db.session.add(Item(name="one"))
        assert [row.name for row in run(NAMES)] == ["one"]
        assert committed(plain) == []
        db.session.commit()
        assert committed(plain) == ["one"]


def test_it_is_rolled_back_with_the_session(plain: Flask) -> None:
    """It is a part of the transaction."""
    with plain.app_context():
        db.session.execute(sa.select(1))
        run(sa.insert(Item), {"name": "one"})
        db.session.rollback()
        assert committed(plain) == []


def test_it_is_rolled_back_with_a_savepoint(plain: Flask) -> None:
    """`begin_nested` counts too."""
    with plain.app_context():
        db.session.add(Item(name="stays"))
        with pytest.raises(ZeroDivisionError), db.session.begin_nested():
            run(sa.insert(Item), {"name": "goes"})
            raise ZeroDivisionError
        db.session.commit()
        assert committed(plain) == ["stays"]


@pytest.mark.postgres
def test_it_takes_no_second_connection(make_plain: Callable[..., Flask]) -> None:
    """Four POSTs on a pool of four: each has flushed before any of them calls `run`. None waits for another one."""
    app = make_plain(WEB_THREADS=4, DB_CONNECT_TIMEOUT=2, DB_POOL_TIMEOUT=2)
    all_have_flushed = threading.Barrier(4)

    def add() -> str:
        db.session.add(Item(name="x"))
        db.session.flush()
        all_have_flushed.wait(10)
        count = run(sa.select(sa.func.count()).select_from(Item))[0][0]
        db.session.commit()
        return str(count)

    app.add_url_rule("/add", view_func=add, methods=["POST"])
    with app.app_context():
        db.create_all(bind_key=None)
    try:
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda: answers.append(app.test_client().post("/add").text)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert min(answers) == "1"  # its own row, and those of others once they are committed
        assert len(answers) == 4
        assert all(answer.isdecimal() for answer in answers)
    finally:
        with app.app_context():
            db.drop_all(bind_key=None)


def test_a_session_that_is_bound_to_a_connection_keeps_it(plain: Flask) -> None:
    """As tests do that roll back at the end (SQLAlchemy's recipe)."""
    with plain.app_context(), db.engine.connect() as connection, connection.begin() as transaction:
        connection.execute(sa.insert(Item), {"name": "one"})
        db.session.configure(bind=connection)
        try:
            with plain.app_context(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(db.session()), "get_bind", lambda self, *args, **kwargs: connection)
                assert [row.name for row in run(NAMES)] == ["one"]
        finally:
            db.session.configure(bind=None)
            transaction.rollback()


def test_a_connection_in_the_place_of_an_engine_is_used(plain: Flask) -> None:
    """Another way to roll back after each test: inside the transaction that the test has begun."""
    with plain.app_context(), db.engine.connect() as connection, pytest.MonkeyPatch.context() as patch:
        connection.begin()
        connection.execute(sa.insert(Item), {"name": "one"})
        patch.setitem(db.engines, None, connection)
        assert [row.name for row in run(NAMES)] == ["one"]
        connection.rollback()
        assert run(NAMES) == []


def test_a_session_of_the_owners_chooses_the_database(two: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `get_bind` of one's own is asked, as for any other statement: for a replica, or a tenant."""
    monkeypatch.setattr(
        db.session.session_factory.class_, "get_bind", lambda self, **_: db.engines["other"], raising=False
    )
    with two.app_context():
        assert [row.name for row in run(NAMES)] == ["other"]


# --- several databases -----------------------------------------------------------------------------------------------

other_items = Elsewhere.__table__
SELECTS: dict[str, Callable[[], Any]] = {
    "orm": lambda: sa.select(Elsewhere),
    "column": lambda: sa.select(Elsewhere.name),
    "core": lambda: sa.select(other_items.c.name),
    "alias": lambda: sa.select(aliased(Elsewhere)),
    "alias of a table": lambda: sa.select(other_items.alias().c.name),
    "union": lambda: sa.union(sa.select(other_items.c.name), sa.select(other_items.c.name)),
    "subquery": lambda: sa.select(sa.select(Elsewhere.name).subquery().c.name),
    "cte": lambda: sa.select(sa.select(Elsewhere.name).cte().c.name),
    "scalar subquery": lambda: sa.select(sa.select(Elsewhere.name).limit(1).scalar_subquery().label("name")),
    "where": lambda: sa.select(sa.literal("other").label("name")).where(sa.exists(sa.select(Elsewhere.id))),
    "join": lambda: sa.select(Elsewhere.name).join((twin := aliased(Elsewhere)), twin.id == Elsewhere.id),
    "from a statement": lambda: sa.select(Elsewhere).from_statement(sa.select(other_items)),
}


@pytest.mark.parametrize("in_a_transaction", [False, True])
@pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS)
def test_a_read_goes_to_the_database_of_its_table(
    two: Flask, select: Callable[[], Any], in_a_transaction: bool
) -> None:
    """Both have a table of that name, so the wrong one would answer too."""
    with two.app_context():
        if in_a_transaction:
            db.session.execute(sa.select(Item))
        assert [row.name for row in run(select())] == ["other"]
        assert [row.name for row in run(sa.select(Item))] == ["first"]


@pytest.mark.parametrize("in_a_transaction", [False, True])
@pytest.mark.parametrize("table", [Elsewhere, other_items], ids=["orm", "core"])
def test_a_write_goes_to_the_database_of_its_table(two: Flask, table: Any, in_a_transaction: bool) -> None:
    """Insert, update and delete; and what is not committed is not seen."""

    def other() -> list[str]:
        if in_a_transaction:
            db.session.commit()
        return committed(two, bind_key="other")

    with two.app_context():
        if in_a_transaction:
            db.session.execute(sa.select(Item))
        run(sa.insert(table), {"name": "new"})
        assert other() == ["other", "new"]
        run(sa.update(table).values(name="changed"))
        assert other() == ["changed", "changed"]
        run(sa.delete(table))
        assert other() == []
        assert committed(two) == ["first"]


def test_the_session_reads_a_bind_in_every_method(two: Flask) -> None:
    """Nothing of ours stands between Flask-SQLAlchemy and its binds."""
    two.add_url_rule(
        "/other", view_func=lambda: str(db.session.scalar(sa.select(Elsewhere.name))), methods=["GET", "POST"]
    )
    assert [two.test_client().open("/other", method=method).text for method in ("GET", "POST")] == ["other"] * 2


# --- round trips -----------------------------------------------------------------------------------------------------


@contextmanager
def messages(engine: Engine, log: Path) -> Iterator[list[str]]:
    """Record what libpq sends to the server meanwhile, an entry for each message that asks for an answer."""
    sent: list[str] = []
    with log.open("w") as file:
        traced: list[Any] = []

        def trace(connection: Any, *_: Any) -> None:
            connection.pgconn.trace(file.fileno())
            traced.append(connection)

        sa.event.listen(engine, "checkout", trace)
        yield sent
        sa.event.remove(engine, "checkout", trace)
        for connection in traced:
            connection.pgconn.untrace()
    sent += [line for line in log.read_text().splitlines() if re.search(r"\tF\t\d+\t(Query|Sync)\b", line)]


def add_by_the_session() -> None:
    db.session.add(Item(name="x"))
    db.session.commit()


def read_by_the_session() -> None:
    db.session.scalars(sa.select(Item)).all()
    db.session.rollback()


def borrow_a_connection() -> None:
    with db.engine.connect():
        pass


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize(
    ("action", "round_trips"),
    [
        (lambda: run(sa.select(Item).where(Item.id == 1)), 1),
        (lambda: run(sa.select(Item).order_by(Item.id).limit(20)), 1),
        (lambda: run(sa.insert(Item), {"name": "x"}), 1),
        (add_by_the_session, 3),
        (read_by_the_session, 3),
        (borrow_a_connection, 0),  # the liveness check costs none
    ],
)
def test_round_trips(plain: Flask, tmp_path: Path, action: Callable[[], object], round_trips: int) -> None:
    """Counted in libpq."""
    with plain.app_context():
        action()  # the first time may prepare, and opens the connection
        with messages(db.engine, tmp_path / "trace") as sent:
            action()
    assert len(sent) == round_trips, sent
