"""`configure(globals())` in a gunicorn.conf.py of somebody else's: every hook and setting of theirs works as gunicorn's
manual says, ours as well, and what cannot be had so is refused by name."""

import inspect
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import KNOWN_SETTINGS

from flask_pooling.gunicorn import HOOKS
from flask_pooling.settings import Settings
from tests.library.conftest import load
from tests.serving import ROOT, call, command, environment, free_port, serving, wait_until

MANUAL = {each.name: each.default for each in KNOWN_SETTINGS if each.section == "Server Hooks"}
CONFIGURE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from flask_pooling.gunicorn import configure
configure(globals(), "wsgi:app")
"""
NOTE = """
def note(name):
    with open({!r}, "a") as told:
        print(name, file=told)
"""


def hook(name: str) -> str:
    """Make a hook that says that it was called, with the parameters of gunicorn's manual."""
    parameters = ", ".join(inspect.signature(MANUAL[name]).parameters)
    return f"def {name}({parameters}):\n    note({name!r})\n"


def config(folder: Path, *parts: str) -> Path:
    file = folder / "gunicorn.conf.py"
    file.write_text("\n".join((NOTE.format(str(folder / "told")), *parts)))
    return file


@pytest.fixture
def told(tmp_path: Path) -> Path:
    file = tmp_path / "told"
    file.touch()
    return file


def test_ours_are_hooks_of_gunicorns_manual() -> None:
    """Each with the parameters that gunicorn counts."""
    assert set(HOOKS) < set(MANUAL)


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize("where", ["before", "after", "after, but for nworkers_changed"])
def test_every_hook_of_the_owner_runs_and_ours_as_well(
    environ: dict[str, str], tmp_path: Path, told: Path, where: str
) -> None:
    """Wherever in the file it stands. The workers are numbered, watched and measured, and the budget is asked for."""
    without = {"before": "", "after": "on_starting"}.get(where, "nworkers_changed")
    theirs = [hook(name) for name in MANUAL if name and name not in {"ssl_context", without}]
    parts = [*theirs, CONFIGURE] if where == "before" else [CONFIGURE, *theirs]
    with serving(tmp_path / "log", "-c", config(tmp_path, *parts), WEB_CONCURRENCY=2) as server:
        for _ in range(20):
            assert call(server.port, "GET", "/api/notes")[0] == 200
        plan = Settings.load().plan
        slots = f"web_slots {2 * plan.threads}.0"
        wait_until(lambda: slots in call(server.port + 1, "GET", "/metrics")[1])  # both workers have started
        metrics = call(server.port + 1, "GET", "/metrics")[1]
    assert server.process.returncode == 0
    always = {"when_ready", "pre_fork", "post_fork", "post_worker_init", "pre_request", "post_request"}
    assert set(told.read_text().split()) >= always | {"child_exit", "worker_exit", "on_exit"}
    assert set(told.read_text().split()) & {"nworkers_changed", "on_starting"} == {
        "nworkers_changed",
        "on_starting",
    } - {without}
    assert f"db_pool_capacity {2 * plan.threads}.0" in metrics
    assert sum(float(count) for count in re.findall(r"http_request_seconds_count\{.*notes.*\} (.*)", metrics)) == 20


@pytest.mark.postgres
@pytest.mark.parametrize("names", [("on_starting",), ("nworkers_changed",), ("pre_fork", "post_fork", "child_exit")])
def test_no_hook_takes_the_budget_check_away(
    environ: dict[str, str], tmp_path: Path, told: Path, names: tuple[str, ...]
) -> None:
    """A hook that is pasted at the end of the file runs, and what does not fit is still refused."""
    file = config(tmp_path, CONFIGURE, *map(hook, names))
    done = command("gunicorn", "-c", file, DB_MAX_CONNECTIONS=1000, APP_INSTANCES=50, PORT=free_port())
    assert done.returncode == 1
    assert "the plan does not fit the database" in done.stderr
    assert told.read_text().split() == [name for name in names if name in {"on_starting", "nworkers_changed"}][:1] or (
        names == ("on_starting",)  # it stands behind our refusal
    )


@pytest.mark.postgres
def test_what_cannot_be_had_beside_ours_is_refused(environ: dict[str, str], tmp_path: Path, told: Path) -> None:
    """Both places from which the hooks could be joined are taken away after `configure`."""
    file = config(tmp_path, CONFIGURE, hook("on_starting"), hook("nworkers_changed"))
    done = command("gunicorn", "-c", file, PORT=free_port())
    assert done.returncode == 1
    assert (
        "defines nworkers_changed and on_starting after configure(...); call configure(...) at its end" in done.stderr
    )
    remedied = config(tmp_path, hook("on_starting"), hook("nworkers_changed"), CONFIGURE)
    with serving(tmp_path / "log", "-c", remedied) as server:
        assert call(server.port, "GET", "/livez")[0] == 200


@pytest.mark.sqlite
@pytest.mark.usefixtures("production")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("workers = 9", "leave it out; WEB_CONCURRENCY"),
        ("timeout = 120", "leave it out; WEB_TIMEOUT"),
        ('worker_class = "gevent"', "leave it out; WEB_WORKER_CLASS"),
        ("preload_app = False", "preload_app=False: the app must be loaded first"),
    ],
)
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_setting_that_breaks_the_plan_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, says: str, where: str
) -> None:
    """With the variable that changes both sides of the sum."""
    parts = [line, CONFIGURE] if where == "before" else [CONFIGURE, line]
    app = load(monkeypatch, "-c", str(config(tmp_path, *parts)))
    with pytest.raises(SystemExit, match=says):
        begin(app)


@pytest.mark.sqlite
@pytest.mark.usefixtures("production")
def test_an_app_that_was_made_too_early_is_refused(tmp_path: Path) -> None:
    """gunicorn.conf.py imports it before it calls `configure`: it did not know that it is in a web worker."""
    file = config(tmp_path, f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom wsgi import app", CONFIGURE)
    done = command("gunicorn", "-c", file, PORT=free_port(), DB_BUDGET_CHECK="off")
    assert done.returncode == 1
    assert "the app was made before configure(...)" in done.stderr


def begin(app: Any) -> None:
    """Do what gunicorn does before it serves."""
    server = SimpleNamespace(cfg=app.cfg, app=app, log=logging.getLogger(__name__))
    app.cfg.nworkers_changed(server, app.cfg.workers, None)
    if app.cfg.preload_app:
        app.wsgi()
    app.cfg.on_starting(server)


def test_a_view_at_a_path_of_ours_is_warned_of(environ: dict[str, str], tmp_path: Path, database_kind: str) -> None:
    """It would never be called, so the start names it."""
    code = "from app import create_app\napp = create_app()\napp.add_url_rule('/metrics', 'mine', lambda: 'mine')\n"
    (tmp_path / "views.py").write_text(code)
    conf = CONFIGURE.replace("wsgi:app", "views:app").replace(
        "sys.path.insert", f"sys.path.insert(0, {str(tmp_path)!r})\nsys.path.insert"
    )
    more = {"APP_ENV": "development"} if database_kind == "sqlite" else {}
    with serving(tmp_path / "log", "-c", config(tmp_path, conf), **more) as server:
        assert call(server.port, "GET", "/livez")[0] == 200
    assert "the view 'mine' at /metrics is not called" in (tmp_path / "log").read_text()
    assert environment()
