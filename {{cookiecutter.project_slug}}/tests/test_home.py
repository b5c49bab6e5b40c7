"""What `/` says."""

import pytest
from flask import Flask, session
from flask.testing import FlaskClient

from app import defaults

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def test_a_browser_gets_a_page(client: FlaskClient) -> None:
    """With the name, escaped, the plan in words and links that work."""
    response = client.get("/", headers={"Accept": BROWSER})
    assert response.mimetype == "text/html"
    assert "<h1>" in response.text
    assert "connections" in response.text
    assert 'href="/api/notes"' in response.text


@pytest.mark.parametrize("accept", [None, "*/*", "application/json"])
def test_anything_else_gets_json(client: FlaskClient, accept: str | None) -> None:
    """curl and clients of the API."""
    response = client.get("/", headers={"Accept": accept} if accept else {})
    assert response.get_json()["name"] == defaults.SERVICE_TITLE


def test_every_link_works(client: FlaskClient) -> None:
    """All that `/` points to is there."""
    for url in client.get("/").get_json()["links"].values():
        assert client.get(url).status_code == 200, url


def test_security_headers_are_on_every_answer(client: FlaskClient) -> None:
    """An API: nothing framed, sniffed, referred or loaded from elsewhere."""
    for path in ("/", "/nowhere", "/api/notes"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(("proxies", "seen"), [("0", "http://localhost"), ("1", "https://public.example")])
def test_forwarded_headers_count_only_behind_known_proxies(make_app: object, proxies: str, seen: str) -> None:
    """Anybody can send X-Forwarded-*; they are believed only when told how many proxies set them."""
    app: Flask = make_app(WEB_TRUSTED_PROXIES=proxies)  # type: ignore[operator]
    app.add_url_rule("/where", view_func=lambda: __import__("flask").request.host_url)
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "public.example"}
    assert app.test_client().get("/where", headers=forwarded).text == f"{seen}/"


def test_sessions_work_for_those_who_use_them(make_app: object) -> None:
    """Kept in a cookie, changed, read (an answer that depends on it says so), and removed when empty."""
    app: Flask = make_app()  # type: ignore[operator]
    app.add_url_rule("/set", "set", lambda: session.update(name="me") or "")
    app.add_url_rule("/get", "get", lambda: session.get("name", "nobody"))
    app.add_url_rule("/clear", "clear", lambda: session.pop("name"))
    client = app.test_client()
    unused = client.get("/livez")
    assert (unused.headers.get("Set-Cookie"), unused.headers.get("Vary")) == (None, None)
    first = client.get("/get")
    assert (first.text, first.headers["Vary"]) == ("nobody", "Cookie")
    assert client.get("/set").headers["Set-Cookie"].startswith("session=")
    assert client.get("/get").text == "me"
    client.get("/clear")
    assert client.get_cookie("session") is None
