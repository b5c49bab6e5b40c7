"""The listener of the probes."""

import contextlib
import http.client
import socket
from collections.abc import Iterator

import pytest
from flask import Flask

from flask_pooling import probes

pytestmark = pytest.mark.sqlite  # once is enough


@contextlib.contextmanager
def probing(app: Flask) -> Iterator[int]:
    listener = probes.listen("127.0.0.1", 0)
    probes.serve(listener, app.extensions["flask_pooling"].probe_app)
    yield listener.getsockname()[1]


def get(port: int, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_probes_are_answered_and_nothing_else(plain: Flask) -> None:
    """The rest of the app would take connections that the plan does not count."""
    with probing(plain) as port:
        assert get(port, "/livez")[0] == 200
        assert get(port, "/readyz")[0] == 200
        assert "http_request_seconds_count" in get(port, "/metrics")[1]
        for path in ("/", "/items", "/livez/x"):
            assert get(port, path)[0] == 404


def test_a_silent_client_does_not_hold_up_a_probe(plain: Flask) -> None:
    """Each connection has a thread of its own, and a limited time."""
    with probing(plain) as port, socket.create_connection(("127.0.0.1", port)):
        assert get(port, "/livez")[0] == 200


def test_the_address_is_not_shared() -> None:
    """Two services with the same probe port would answer for each other."""
    first = probes.listen("127.0.0.1", 0)
    with first, pytest.raises(OSError, match="in use"):
        probes.listen("127.0.0.1", first.getsockname()[1])
