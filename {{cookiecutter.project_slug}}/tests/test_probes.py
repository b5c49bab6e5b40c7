"""The listener of the probes."""

import contextlib
import http.client
import socket
from collections.abc import Iterator

import pytest
from flask import Flask

from app import probes


@contextlib.contextmanager
def probing(app: Flask) -> Iterator[int]:
    listener = probes.listen("127.0.0.1", 0)
    probes.serve(listener, app)
    yield listener.getsockname()[1]


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


def test_probes_are_answered_and_nothing_else(app: Flask) -> None:
    """The rest of the app would take connections that the plan does not count."""
    with probing(app) as port:
        assert get(port, "/livez")[0] == 200
        assert get(port, "/readyz")[0] == 200
        assert "http_request_seconds_count" in get(port, "/metrics")[1]
        for path in ("/", "/api/notes", "/livez/x"):
            assert get(port, path) == (404, "")


def test_a_silent_client_does_not_hold_up_a_probe(app: Flask) -> None:
    """Each connection has a thread of its own, and a limited time."""
    with probing(app) as port, socket.create_connection(("127.0.0.1", port)):
        assert get(port, "/livez")[0] == 200


def test_the_address_is_not_shared() -> None:
    """Two services with the same probe port would answer for each other."""
    first = probes.listen("127.0.0.1", 0)
    with first, pytest.raises(OSError, match="in use"):
        probes.listen("127.0.0.1", first.getsockname()[1])
