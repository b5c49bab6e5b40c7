"""The page at `/` in a real browser, which alone knows whether the page and its security headers get along."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import CLEAN, ask, free_port, served

# Chromium's sandbox refuses root; the rest keeps a fresh profile from asking its maker for this and that.
CHROMIUM = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
Browse = Callable[[str], tuple[str, list[str]]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Load a page: the document as the browser has it then, and what it wrote to the console."""

    def browse(url: str) -> tuple[str, list[str]]:
        result = subprocess.run(
            [*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", url],
            env=CLEAN | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        return result.stdout, re.findall(r"^\[[^\]]*:CONSOLE:?[^\]]*\] (.*)", result.stderr, re.MULTILINE)

    return browse


def test_the_console_is_heard(browse: Browse):
    """The browser reports what a page must not do, so that silence below means something."""
    policy = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'">"""
    _, console = browse(f"data:text/html,{policy}<style>p {{}}</style>")
    assert len(console) == 1
    assert "violates the following Content Security Policy" in console[0]


def test_the_page(installed: Path, browse: Browse):
    """It shows what it is and the plan, links to what is there, and breaks no rule of its own headers."""
    with served("make run", installed, free_port()) as address:
        page, console = browse(f"{address}/")
        assert console == []
        assert "<h1>My Service</h1>" in page
        facts = ask(address, "/", accept="application/json")[1]
        assert f"<code>{facts['plan']}</code>" in page
        assert re.fullmatch(r"\d+ instances x \d+ workers x \(\d+ \+ \d+\) = \d+ of \d+ connections .*", facts["plan"])
        links = re.findall(r'<a href="([^"]+)">', page)
        assert sorted(links) == sorted(facts["links"].values())
        assert [ask(address, link)[0] for link in links] == [200] * 5
