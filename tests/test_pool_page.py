"""The pool page in a real browser, small and wide, light and dark, by keyboard, and while the service is in trouble."""

import time
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from serving import ask, free_port, postgres, run, served
from test_monitoring import LEAST, VIEWS, Trouble, clients

SIZES = {"narrow": (390, 844), "wide": (1280, 900)}
STATE = "document.getElementById('state').textContent"


@pytest.fixture(scope="module")
def service(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a service in production, whose page is one port further."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "troubled.py").write_text(VIEWS)
    with postgres(installed, folder / "data", "paged") as url:
        environ = LEAST | {"DATABASE_URL": url, "PYTHONPATH": str(folder)}
        assert run("APP_ENV=production .venv/bin/python -m flask db upgrade", installed, **environ).returncode == 0
        port = free_port()
        # A pool that stays full is logged with its traceback.
        command = "exec .venv/bin/python -m gunicorn troubled:app"
        with served(command, installed, port, mistakes=True, **environ):
            yield port


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    with chromium.opened() as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_obeys_its_own_policy(service: int, browser: chromium.Page, size: str, scheme: str):
    """Nothing sticks out, nothing is in the console, and the colours are those that were asked for."""
    browser.console.clear()
    browser.open(f"http://127.0.0.1:{service + 1}/pool", *SIZES[size], scheme)
    browser.wait_for(f"{STATE} === 'serving'")
    assert browser.console == []
    assert browser.ask("document.documentElement.scrollWidth") == SIZES[size][0]
    colour = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) > 3 * 128) == (scheme == "light")
    plan = browser.ask("document.getElementById('sum').textContent")
    assert plan == "2 instances ×1 worker ×2 connections=4 of87 usable"
    assert browser.ask("document.querySelectorAll('#slots i').length") == 2


def test_by_keyboard(service: int, browser: chromium.Page):
    """Tab reaches the one button, and Enter stops the page and lets it go on."""
    browser.open(f"http://127.0.0.1:{service + 1}/pool")
    browser.wait_for(f"{STATE} === 'serving'")
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.id") == "pause"
    assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for pressed, text in (("true", "Resume"), ("false", "Pause")):
        browser.press("Enter", 13, "\r")
        assert browser.ask("document.activeElement.getAttribute('aria-pressed')") == pressed
        assert browser.ask("document.activeElement.textContent") == text


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (Trouble(set(), "/slow", clients=3), "every slot is busy"),
        (Trouble(set(), "/two", clients=2), "threads wait for a connection"),
    ],
)
def test_it_moves_under_load(service: int, browser: chromium.Page, trouble: Trouble, says: str):
    """It draws what the service does, within a few seconds, and says what is wrong in words."""
    browser.console.clear()
    browser.open(f"http://127.0.0.1:{service + 1}/pool")
    with clients(trouble, service):
        browser.wait_for(f"{STATE} === '{says}'")
        browser.wait_for("document.querySelectorAll('#slots i.busy').length === 2")
        browser.wait_for("document.querySelector('#lineBusy').getAttribute('points').split(' ').length > 3")
        browser.wait_for("new Set(document.querySelector('#lineBusy').points).size > 1")
    browser.wait_for(f"{STATE} === 'serving'")
    assert browser.console == []


def test_it_shows_a_worker_that_hangs(service: int, browser: chromium.Page):
    """Both slots are red; after the worker was replaced, it says that one was."""
    browser.open(f"http://127.0.0.1:{service + 1}/pool")
    with clients(Trouble(set(), "/hang", clients=2, again=False), service):
        browser.wait_for(f"{STATE} === 'every slot is past WEB_TIMEOUT'")
        assert browser.ask("document.querySelectorAll('#slots i.over').length") == 2
        browser.wait_for(f"{STATE} === 'serving'")
    facts = browser.ask("document.getElementById('facts').textContent")
    assert "requests past WEB_TIMEOUT2" in facts
    assert "workers replaced (hung)1" in facts


def test_the_main_port_has_no_page(service: int):
    for path in ("/pool", "/pool.json"):
        assert ask(f"http://127.0.0.1:{service}", path)[0] == 404


def test_in_development_it_is_beside_the_app(installed: Path, browser: chromium.Page):
    """With reload, as `make run` has it."""
    with served("make run", installed, free_port()) as address:
        browser.console.clear()
        browser.open(f"{address}/pool")
        browser.wait_for(f"{STATE} === 'serving'")
        time.sleep(1.5)
        assert browser.console == []
