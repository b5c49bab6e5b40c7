"""Listeners and options of sessions, or of an engine, count in `run` as well."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy.session import Session
from sqlalchemy import event, exc, orm
from sqlalchemy.engine import Engine

from flask_pooling import run, statements
from tests.library.conftest import engine_of
from tests.library.plain import Elsewhere, Item, Label, db
from tests.library.test_run import committed

NAMES = sa.select(Item).order_by(Item.id)


@contextmanager
def listening(target: Any, name: str, listener: Callable[..., Any], **options: Any) -> Iterator[None]:
    event.listen(target, name, listener, **options)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def names(statement: Any = NAMES) -> list[str]:
    return [row.name for row in run(statement)]


def begin(in_a_transaction: bool) -> None:
    if in_a_transaction:
        db.session.execute(sa.select(1))


both_ways = pytest.mark.parametrize("in_a_transaction", [False, True], ids=["outside", "inside"])
TARGETS: dict[str, Callable[[], Any]] = {
    "every session": lambda: orm.Session,
    "Flask-SQLAlchemy's": lambda: Session,
    "db.session": lambda: db.session,
    "the factory": lambda: db.session.session_factory,
    "this session": db.session,
}


def leave_out_deleted_rows(state: Any) -> None:
    """Do SQLAlchemy's recipe for a soft delete, and for tenants."""
    if state.is_select and not state.is_column_load and not state.is_relationship_load:
        hidden = orm.with_loader_criteria(Item, lambda model: model.name != "deleted", include_aliases=True)
        state.statement = state.statement.options(hidden)


@both_ways
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_soft_delete(plain: Flask, target: Callable[[], Any], in_a_transaction: bool) -> None:
    """The rows that the session leaves out are left out, wherever its listener is; and no longer, when it is gone."""
    alias = orm.aliased(Item)
    with plain.app_context():
        run(sa.insert(Item), [{"name": "one"}, {"name": "deleted"}])
        begin(in_a_transaction)
        with listening(target(), "do_orm_execute", leave_out_deleted_rows):
            assert names() == names(sa.select(Item.name)) == names(sa.select(alias).order_by(alias.id)) == ["one"]
            assert [tuple(row) for row in run(sa.select(sa.func.count()).select_from(Item))] == [(1,)]
        assert names() == ["one", "deleted"]


@contextmanager
def row_level_security(app: Flask) -> Iterator[None]:
    """Show a tenant the rows of its name, and nobody else any."""
    policy = "using (name = current_setting('app.tenant', true))"
    with engine_of(app).begin() as connection:
        connection.execute(sa.text("insert into items (name) values ('a'), ('b')"))
        connection.execute(sa.text("alter table items enable row level security"))
        connection.execute(sa.text("alter table items force row level security"))
        connection.execute(sa.text(f"create policy tenants on items {policy}"))
    yield


def become_a_tenant(connection: Any) -> None:
    connection.execute(sa.text("select set_config('app.tenant', 'a', true)"))


PREPARATIONS: dict[str, tuple[Callable[[], Any], str, Callable[..., None]]] = {
    **{
        name: (target, "after_begin", lambda session, transaction, connection: become_a_tenant(connection))
        for name, target in TARGETS.items()
    },
    "the session, at once": (
        lambda: db.session,
        "after_transaction_create",
        lambda session, _: become_a_tenant(session),
    ),
    "each statement": (lambda: db.session, "do_orm_execute", lambda state: become_a_tenant(state.session.connection())),
    "the engine": (lambda: db.engine, "begin", become_a_tenant),
    "all engines": (lambda: Engine, "begin", become_a_tenant),
}


@pytest.mark.postgres
@both_ways
@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_row_level_security(plain: Flask, preparation: str, in_a_transaction: bool) -> None:
    """A listener that makes a transaction a tenant's, in the session or the engine, does so for `run` as well."""
    target, name, listener = PREPARATIONS[preparation]
    with plain.app_context(), row_level_security(plain):
        assert names() == []
        with listening(target(), name, listener):
            begin(in_a_transaction)
            assert names() == ["a"]
            run(sa.insert(Item), {"name": "a"})
            assert names() == ["a", "a"]
            assert db.session().in_transaction() == in_a_transaction
            with pytest.raises(exc.ProgrammingError, match="row-level security"):
                run(sa.insert(Item), {"name": "b"})
            assert db.session().in_transaction() == in_a_transaction
            db.session.rollback()
        assert names() == []


class Overridden(Session):
    """A session of an app's own: each of its methods may do anything."""

    def execute(self, statement: Any, *args: Any, **kwargs: Any) -> Any:
        return super().execute(statement.where(Item.name != "deleted"), *args, **kwargs)


class Commits(Session):
    committed = 0

    def commit(self) -> None:
        type(self).committed += 1
        super().commit()


def use(monkeypatch: pytest.MonkeyPatch, **session_options: Any) -> None:
    """Use a session class as `SQLAlchemy(session_options=...)` does."""
    monkeypatch.setattr(db, "session", db._make_scoped_session(session_options))


@both_ways
def test_a_session_class_of_ones_own(plain: Flask, monkeypatch: pytest.MonkeyPatch, in_a_transaction: bool) -> None:
    """The methods that it overrides are called."""
    use(monkeypatch, class_=Overridden)
    with plain.app_context():
        with db.engine.begin() as connection:
            connection.execute(sa.insert(Item), [{"name": "one"}, {"name": "deleted"}])
        if in_a_transaction:
            db.session.connection()
        assert names() == ["one"]
        assert db.session().in_transaction() == in_a_transaction
        db.session.remove()


@both_ways
def test_a_session_class_chooses_the_database(
    two: Flask, monkeypatch: pytest.MonkeyPatch, in_a_transaction: bool
) -> None:
    """By its `get_bind`: a replica, a tenant's database."""
    use(monkeypatch, class_=type("Routed", (Session,), {"get_bind": lambda self, *_, **__: db.engines["other"]}))
    with two.app_context():
        if in_a_transaction:
            db.session.connection()
        assert names() == names(sa.select(Elsewhere)) == ["other"]
        db.session.remove()


def test_a_factory_that_is_no_sessionmaker(plain: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session in a test's transaction, by SQLAlchemy's recipe: what `run` writes is rolled back with it."""
    with plain.app_context(), db.engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(sa.insert(Item), {"name": "first"})
        make: Any = lambda: orm.Session(connection, join_transaction_mode="create_savepoint")  # noqa: E731
        recipe: Any = orm.scoped_session(make)
        monkeypatch.setattr(db, "session", recipe)
        run(sa.insert(Item), {"name": "one"})
        assert names() == ["first", "one"]
        recipe.remove()
        transaction.rollback()
        assert committed(plain) == []


def test_execution_options_of_sessions(plain: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the constructor's, or are set later with `configure`."""
    seen: list[Any] = []
    for configured in (False, True):
        use(monkeypatch, **({} if configured else {"execution_options": {"tenant": "a"}}))
        with plain.app_context():
            names()
            if configured:
                db.session.remove()
                db.session.configure(execution_options={"tenant": "a"})

            def look(connection: Any, *args: Any) -> None:
                seen.append(connection.get_execution_options().get("tenant"))

            with listening(db.engine, "before_execute", look):
                names()
            db.session.remove()
    assert seen == ["a", "a"]


def test_the_sessions_transaction_is_ended(plain: Flask) -> None:
    """By a commit, which its listeners see, or, after an error, by a rollback. The connection is back in its pool."""
    ended: list[str] = []
    with (
        plain.app_context(),
        listening(db.session, "after_commit", lambda session: ended.append("commit")),
        listening(db.session, "after_rollback", lambda session: ended.append("rollback")),
    ):
        run(sa.insert(Item), {"name": "one"})
        assert committed(plain) == ["one"]
        with pytest.raises(exc.IntegrityError):
            run(sa.insert(Item), {"id": 1, "name": "two"})
        assert ended == ["commit", "rollback"]
        assert not db.session().in_transaction()
        assert not isinstance(db.engine.pool, sa.QueuePool) or db.engine.pool.checkedout() == 0


def test_all_events_of_a_statement_are_looked_at(plain: Flask) -> None:
    """Those that fire when a session runs a statement in a transaction of its own, found by trying all there are."""
    every = [name for name in dir(orm.SessionEvents) if not name.startswith("_") and name != "dispatch"]
    fired: set[str] = set()
    written = [sa.insert(Item).values(name="one"), sa.update(Item).values(name="two"), sa.delete(Item)]
    sent: Any
    for sent in [*written, sa.select(Item.name), sa.text("select nonsense")]:
        with plain.app_context():
            session = db.session()
            for name in every:
                event.listen(session, name, lambda *_, name=name: fired.update({name}))
            try:
                session.execute(sent)
                session.commit()
            except exc.DBAPIError:
                session.rollback()
    assert fired == set(statements.SESSION_EVENTS)


# --- the engine ------------------------------------------------------------------------------------------------------

LEVEL = sa.text("select current_setting('transaction_isolation') level, current_setting('transaction_read_only') read")
ENGINES: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "nothing": ({}, ("read committed", "off")),
    "the engine's level": ({"isolation_level": "SERIALIZABLE"}, ("serializable", "off")),
    "an option": ({"execution_options": {"isolation_level": "REPEATABLE READ"}}, ("repeatable read", "off")),
    "read-only": ({"execution_options": {"postgresql_readonly": True}}, ("read committed", "on")),
    "the server's parameter": (
        {"connect_args": {"options": "-c default_transaction_isolation=serializable"}},
        ("serializable", "off"),
    ),
    "a cursor": ({"execution_options": {"stream_results": True}}, ("read committed", "off")),
}


@pytest.mark.postgres
@pytest.mark.parametrize("given", ENGINES)
def test_the_level_of_an_engine_is_kept(plain: Flask, given: str) -> None:
    """AUTOCOMMIT weakens nothing that an engine was given, and a write is committed."""
    options, expected = ENGINES[given]
    engine = sa.create_engine(engine_of(plain).url, poolclass=sa.NullPool, **options)
    begun: list[bool] = []
    with plain.app_context(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(db.engines, None, engine)
        assert [tuple(row) for row in run(LEVEL)] == [expected]
        with listening(engine, "do_execute", lambda cursor, *_: begun.append(cursor.connection.autocommit)):
            names()
        assert begun == [given == "nothing"]
        if given == "a cursor":
            return  # which SQLAlchemy would also use for a write
        if given != "read-only":
            run(sa.insert(Item), {"name": "one"})
            assert committed(plain) == names() == ["one"]
        else:
            with pytest.raises(exc.InternalError, match="read-only"):
                run(sa.insert(Item), {"name": "one"})


@pytest.mark.postgres
def test_the_level_of_a_role_is_kept(plain: Flask) -> None:
    """And so is that of a database."""
    with plain.app_context():
        with db.engine.begin() as connection:
            connection.execute(sa.text("alter role current_user set default_transaction_isolation = 'serializable'"))
        db.engine.dispose()
        try:
            assert [row.level for row in run(LEVEL)] == ["serializable"]
        finally:
            with db.engine.begin() as connection:
                connection.execute(sa.text("alter role current_user reset default_transaction_isolation"))
            db.engine.dispose()


# --- names -----------------------------------------------------------------------------------------------------------

LISTENERS: dict[str, dict[str, Any]] = {"connection": {}, "session": {"do_orm_execute": lambda state: None}}
SELECTED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "model": (lambda: sa.select(Label), {"id": 1, "text": "a", "later": "later", "twice": 2}),
    "alias": (lambda: sa.select(orm.aliased(Label)), {"id": 1, "text": "a", "later": "later"}),
    "attributes": (lambda: sa.select(Label.text, Label.later), {"text": "a", "later": "later"}),
    "label": (lambda: sa.select(Label.text.label("named"), sa.literal(3).label("three")), {"named": "a", "three": 3}),
    "table": (lambda: sa.select(Label.__table__.c.label_text), {"label_text": "a"}),
    "with another": (lambda: sa.select(Label, Item.name).join(Item, Item.id == Label.id), {"text": "a", "name": "one"}),
    "where": (lambda: sa.select(Label).where(Label.text == "a").order_by(Label.twice).limit(1), {"text": "a"}),
    "update": (lambda: sa.update(Label).values(text="b").returning(Label.text, Label.id), {"text": "b", "id": 1}),
    "insert": (lambda: sa.insert(Label).values(text="b").returning(Label.text), {"text": "b"}),
    "delete": (lambda: sa.delete(Label).returning(Label.text), {"text": "a"}),
    "from a statement": (
        lambda: sa.select(Item).from_statement(sa.text("select id, name from items")),
        {"id": 1, "name": "one"},
    ),
}


@both_ways
@pytest.mark.parametrize("listener", LISTENERS)
@pytest.mark.parametrize("selected", SELECTED)
def test_rows_have_the_names_of_attributes(plain: Flask, selected: str, listener: str, in_a_transaction: bool) -> None:
    """Not of columns: a renamed one, one that is loaded later, and an expression. And so have the parameters."""
    select, expected = SELECTED[selected]
    with plain.app_context():
        run(sa.insert(Label), {"text": "a"})
        run(sa.insert(Item), {"name": "one"})
        begin(in_a_transaction)
        for name, function in LISTENERS[listener].items():
            event.listen(db.session(), name, function)
        (row,) = run(select())
        assert {name: row._mapping[name] for name in expected} == expected
        renamed = sa.update(Label).where(Label.text == sa.bindparam("old")).values(text=sa.bindparam("new"))
        assert run(renamed, {"old": "x", "new": "c"}) == []
