"""gunicorn.conf.py: every name is gunicorn's, and the numbers are the plan's."""

import logging
import secrets
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.config import KNOWN_SETTINGS
from gunicorn.http import get_parser
from gunicorn.workers.sync import SyncWorker
from serving import ROOT, free_port, run

from app.config import Settings
from gunicorn_worker import CollectingWorker

ROOM = {"DB_MAX_CONNECTIONS": "100", "APP_INSTANCES": "2"}  # whatever was baked


def load(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], *words: str) -> Any:
    """gunicorn's own view of the configuration, as if it had been started with these words."""
    for name in ("PROMETHEUS_MULTIPROC_DIR", "APP_ENV", "DATABASE_URL", "SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nonexistent")  # no folder is made
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gunicorn", *words])
    return WSGIApplication()


def names_in_the_file() -> set[str]:
    """What the file defines, without its imports and what it keeps to itself."""
    module = vars(sys.modules["__config__"])
    return {
        name
        for name, value in module.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType | type) and name != "Any"
    }


@pytest.mark.sqlite
def test_every_name_is_a_setting_of_gunicorns(monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str]) -> None:
    """gunicorn ignores names that it does not know, so a misspelt one would have no effect."""
    load(monkeypatch, plain_environ)
    names = names_in_the_file()
    assert "worker_connections" in names
    assert names <= {setting.name for setting in KNOWN_SETTINGS}


@pytest.mark.sqlite
@pytest.mark.parametrize("more", [{}, {"WEB_WORKER_CLASS": "sync"}, {"WEB_CONCURRENCY": "2", "WEB_THREADS": "7"}])
def test_gunicorn_runs_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str], more: dict[str, str]
) -> None:
    """The same plan that sized the pools."""
    environ = plain_environ | ROOM | more
    plan = Settings.from_env(environ).plan
    cfg = load(monkeypatch, environ).cfg
    assert (cfg.workers, cfg.threads) == (plan.workers, plan.threads)
    assert cfg.worker_connections == plan.threads
    worker = {"sync": SyncWorker, "gthread": CollectingWorker}[plan.worker_class]
    assert cfg.worker_class is worker
    assert cfg.keepalive == 0
    assert (cfg.preload_app, cfg.reload) == (True, False)
    assert cfg.max_requests_jitter >= cfg.max_requests / 2
    assert cfg.control_socket_disable


@pytest.mark.sqlite
def test_development_reloads_and_does_not_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn's reloader and preload exclude each other."""
    cfg = load(monkeypatch, {"APP_ENV": "development"}).cfg
    assert (cfg.preload_app, cfg.reload) == (False, True)


@pytest.mark.sqlite
def test_gunicorn_believes_no_proxy_by_itself(monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str]) -> None:
    """Not one on this machine either, as it would by default: WEB_TRUSTED_PROXIES alone says who is believed."""
    cfg = load(monkeypatch, plain_environ).cfg
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https\r\n\r\n")
        request = next(get_parser(cfg, ours, ("127.0.0.1", 1)))
    assert request.scheme == "http"


@pytest.mark.sqlite
@pytest.mark.parametrize(("words", "enabled"), [([], False), (["--access-logfile", "-"], True)])
def test_gunicorn_puts_no_access_line_together_unless_told_to(
    monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str], words: list[str], enabled: bool
) -> None:
    """The app logs its requests itself, and gunicorn's line would cost as much again."""
    cfg = load(monkeypatch, plain_environ, *words).cfg
    assert cfg.logger_class.access_log_enabled.fget(types.SimpleNamespace(cfg=cfg)) is enabled


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workers", "9"], "set WEB_CONCURRENCY=9 instead"),
        (["--threads", "40"], "set WEB_THREADS=40 instead"),
        (["--worker-class", "sync"], "set WEB_WORKER_CLASS=sync instead"),
        (["--timeout", "10"], "set WEB_TIMEOUT=10 instead"),
        (["--graceful-timeout", "1"], "set WEB_GRACEFUL_TIMEOUT=1 instead"),
    ],
)
def test_overrides_on_the_command_line_are_refused(
    monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str], words: list[str], says: str
) -> None:
    """They would change one side of the sum; the message names the variable that changes both."""
    app = load(monkeypatch, plain_environ, *words)
    server = types.SimpleNamespace(cfg=app.cfg)
    with pytest.raises(SystemExit, match=says):
        app.cfg.on_starting(server)


@pytest.mark.sqlite
def test_gunicorn_cmd_args_are_no_way_around(monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str]) -> None:
    """They are read after the file, too."""
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--workers 9")
    app = load(monkeypatch, plain_environ)
    with pytest.raises(SystemExit, match="WEB_CONCURRENCY=9"):
        app.cfg.on_starting(types.SimpleNamespace(cfg=app.cfg))


@pytest.mark.sqlite
def test_a_worker_more_by_signal_is_refused(
    monkeypatch: pytest.MonkeyPatch, plain_environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """TTIN adds a worker, and with it a pool that was not planned."""
    cfg = load(monkeypatch, plain_environ).cfg
    planned = Settings.from_env(plain_environ).plan.workers
    server = types.SimpleNamespace(num_workers=planned + 1, log=logging.getLogger("test"))
    cfg.nworkers_changed(server, planned + 1, planned)
    assert server.num_workers == planned
    assert "WEB_CONCURRENCY" in caplog.text
    server.num_workers = planned - 1
    cfg.nworkers_changed(server, planned - 1, planned)
    assert server.num_workers == planned - 1


@pytest.mark.sqlite
def test_bad_settings_stop_gunicorn_with_all_of_them(tmp_path: Path) -> None:
    """One message, no traceback."""
    done = run(["gunicorn"], {"DB_POOL_SIZE": "twenty", "SECRET_KEY": secrets.token_hex(32)}, tmp_path)
    assert done.returncode == 1
    assert "DB_POOL_SIZE='twenty'" in done.stderr
    assert "DATABASE_URL is not set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.postgres
@pytest.mark.direct
def test_a_plan_that_the_server_cannot_hold_stops_the_start(environ: dict[str, str], tmp_path: Path) -> None:
    """Planned for a server of 1000 connections, found one of 100."""
    wrong = {"DB_MAX_CONNECTIONS": "1000", "APP_INSTANCES": "50", "PORT": str(free_port())}
    done = run(["gunicorn"], environ | wrong, tmp_path)
    assert done.returncode == 1
    assert "the plan does not fit the database" in done.stderr
    assert "> 87 (max_connections 100" in done.stderr
