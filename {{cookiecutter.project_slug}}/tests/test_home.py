"""The page at `/`."""

import pytest
from flask.testing import FlaskClient
from markupsafe import escape

from app import defaults

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def test_a_browser_gets_a_page(client: FlaskClient, database_kind: str) -> None:
    """With the name, escaped. In production, which is on Postgres, the plan's numbers are not shown."""
    response = client.get("/", headers={"Accept": BROWSER})
    assert response.mimetype == "text/html"
    assert f"<h1>{escape(defaults.SERVICE_TITLE)}</h1>" in response.text
    assert ("connections each" in response.text) == (database_kind == "sqlite")


@pytest.mark.parametrize("accept", [None, "*/*", "application/json"])
def test_anything_else_gets_json(client: FlaskClient, accept: str | None) -> None:
    """curl and clients of the API."""
    response = client.get("/", headers={"Accept": accept} if accept else {})
    assert response.get_json()["name"] == defaults.SERVICE_TITLE


def test_every_link_works(client: FlaskClient) -> None:
    """All that `/` points to is there."""
    for url in client.get("/").get_json()["links"].values():
        assert client.get(url).status_code == 200, url
