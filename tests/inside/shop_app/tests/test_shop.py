"""The shop's own suite, in memory. It begins with empty tables, and leaves none."""

import pytest

from shop import create_app
from shop.models import db


@pytest.fixture
def app():
    app = create_app({"TESTING": True, "SQLALCHEMY_DATABASE_URI": "sqlite:///:memory:"})
    with app.app_context():
        db.drop_all()
        db.create_all()
    yield app
    with app.app_context():
        db.drop_all()


def test_products(app):
    client = app.test_client()
    assert client.get("/").get_json() == []
    assert client.post("/", data={"name": "Bread"}).status_code == 201
    assert client.get("/").get_json() == ["Bread"]


def test_init_db(app):
    assert "Initialized" in app.test_cli_runner().invoke(args=["init-db"]).output
    assert app.test_client().get("/about").get_json() == {"about": '{"colour":"red"}', "level": "SERIALIZABLE"}


def test_config():
    assert not create_app().testing
