"""The example resource, through HTTP only."""

import json
from typing import Any

import pytest
from flask.testing import FlaskClient

from app.notes import MAX_ID


def create(client: FlaskClient, title: str = "a title", **more: Any) -> dict[str, Any]:
    response = client.post("/api/notes", json={"title": title, **more})
    assert response.status_code == 201, response.text
    return dict(response.get_json())


def test_a_note_is_created_and_found_where_location_says(client: FlaskClient) -> None:
    """POST answers 201 with the note and its place; GET there gives the same note."""
    response = client.post("/api/notes", json={"title": "Zoë & Co <b>", "body": "line\nline"})
    assert response.status_code == 201
    note = response.get_json()
    assert set(note) == {"id", "title", "body", "created_at", "updated_at"}
    assert response.headers["Location"] == f"/api/notes/{note['id']}"
    assert client.get(response.headers["Location"]).get_json() == note
    assert (note["title"], note["body"]) == ("Zoë & Co <b>", "line\nline")
    assert note["created_at"].endswith("Z")


def test_pages_follow_each_other_without_gap_or_repeat(client: FlaskClient) -> None:
    """`next` is the `after` of the following page, and null on the last one."""
    ids = [create(client, f"note {number}")["id"] for number in range(5)]
    first = client.get("/api/notes?limit=2").get_json()
    second = client.get(f"/api/notes?limit=2&after={first['next']}").get_json()
    third = client.get(f"/api/notes?limit=2&after={second['next']}").get_json()
    seen = [note["id"] for page in (first, second, third) for note in page["items"]]
    assert seen == ids
    assert third["next"] is None


def test_a_page_that_is_exactly_full_is_the_last(client: FlaskClient) -> None:
    """There is no empty page at the end."""
    create(client)
    create(client)
    assert client.get("/api/notes?limit=2").get_json()["next"] is None


def test_put_replaces_the_whole_note(client: FlaskClient) -> None:
    """A field that PUT leaves out is empty afterwards. The id and the time of creation stay."""
    before = create(client, "old", body="old body")
    after = client.put(f"/api/notes/{before['id']}", json={"title": "new"}).get_json()
    assert (after["title"], after["body"]) == ("new", "")
    assert (after["id"], after["created_at"]) == (before["id"], before["created_at"])
    assert after["updated_at"] > before["updated_at"]
    assert client.get(f"/api/notes/{before['id']}").get_json() == after


def test_a_deleted_note_is_gone(client: FlaskClient) -> None:
    """DELETE answers 204 once, and 404 from then on."""
    place = f"/api/notes/{create(client)['id']}"
    assert client.delete(place).status_code == 204
    assert client.delete(place).status_code == 404
    assert client.get(place).status_code == 404


@pytest.mark.parametrize("method", ["get", "put", "delete"])
@pytest.mark.parametrize("note_id", ["0", str(MAX_ID), str(MAX_ID + 1), "9" * 40, "-1", "one"])
def test_what_is_no_note_is_404(client: FlaskClient, method: str, note_id: str) -> None:
    """An id that no row can have is not found; it does not reach the database as an error."""
    assert client.open(f"/api/notes/{note_id}", method=method, json={"title": "x"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "title"),
        ({"title": ""}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"title": None}, "title"),
        ({"title": 5}, "title"),
        ({"title": "nul \x00"}, "title"),
        ({"title": "x", "body": "nul \x00"}, "body"),
        ({"title": "x", "body": "x" * 10_001}, "body"),
        ({"title": "x", "body": ["x"]}, "body"),
        ({"title": "x", "id": 7}, "id"),
        ([], ""),
        ("text", ""),
        (None, ""),
        ({"title": "half of a pair \ud800"}, "title"),
    ],
)
def test_what_does_not_fit_is_422_and_names_the_field(client: FlaskClient, body: Any, field: str) -> None:
    """Nothing is stored, and the answer says which field."""
    as_json: Any = {"data": json.dumps(body), "content_type": "application/json"}
    note = create(client)
    for response in (client.post("/api/notes", **as_json), client.put(f"/api/notes/{note['id']}", **as_json)):
        assert response.status_code == 422
        assert field in response.get_json()["errors"]
    assert client.get("/api/notes").get_json()["items"] == [note]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=-1", f"after={MAX_ID + 1}", "offset=3"])
def test_a_page_that_makes_no_sense_is_422(client: FlaskClient, query: str) -> None:
    """Also a parameter that does not exist: a client that pages by `offset` must not get page one for ever."""
    response = client.get(f"/api/notes?{query}")
    assert response.status_code == 422
    assert query.partition("=")[0] in response.get_json()["errors"]
