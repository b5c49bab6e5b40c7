"""The pool page and its numbers."""

import re
from collections.abc import Callable

import pytest
from flask import Flask

from tests.library.conftest import engine_of

PRIVATE = {"flask_pooling.private": True}  # as if it came in by the port of the probes


@pytest.mark.parametrize("path", ["/pool", "/pool.json"])
def test_strangers_do_not_see_it(plain: Flask, path: str) -> None:
    """In production it is on the port of the probes alone."""
    assert plain.test_client().get(path).status_code == 404
    assert plain.test_client().get(path, environ_overrides=PRIVATE).status_code == 200


def test_the_page_may_load_nothing(plain: Flask) -> None:
    """Its own style and script are inside, by a nonce that is another one each time."""
    first, second = (plain.test_client().get("/pool", environ_overrides=PRIVATE) for _ in range(2))
    policy, nonces = first.headers["Content-Security-Policy"], re.findall(r'nonce="([^"]+)"', first.text)
    assert "default-src 'none'" in policy
    assert set(re.findall(r"'nonce-([^']+)'", policy)) == set(nonces)
    assert len(nonces) == 2
    assert nonces[0] not in second.text
    assert "unsafe" not in policy
    assert not re.search(r"(?:src|href)=\"(?!data:,)|https?://|style=", first.text)


def test_its_numbers(make_plain: Callable[..., Flask]) -> None:
    """The plan, and what of it is in use now."""
    app = make_plain(APP_INSTANCES=2, WEB_CONCURRENCY=2, WEB_THREADS=3)

    def now() -> dict[str, float]:
        answer = app.test_client().get("/pool.json", environ_overrides=PRIVATE).json
        assert answer is not None
        plan = answer["plan"]
        assert [plan[name] for name in ("instances", "workers", "threads", "slots", "connections_peak")] == [
            2,
            2,
            3,
            6,
            12,
        ]
        found: dict[str, float] = answer["now"]
        return found

    before = now()
    with engine_of(app).connect():
        during = now()
    app.test_client().get("/nothing")
    after = now()
    assert during["db_pool_checked_out"] == before["db_pool_checked_out"] + 1
    assert during["db_connections_open"] == before["db_connections_open"] + 1
    assert after["db_pool_checked_out"] == before["db_pool_checked_out"]
    assert after["answers"] == before["answers"] + 1  # its own are not counted
