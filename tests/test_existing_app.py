"""docs/existing-app.md, done literally to two apps that this template has not made.

They are of the two shapes that most apps have, and each has a suite of its own."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest
import yaml
from baking import PROJECT, ROOT, load
from serving import CLEAN, ask, free_port, postgres, run

DOCUMENT = (ROOT / "docs" / "existing-app.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
DIFF = next(code for language, code in BLOCKS if language == "diff")
CONFIGURE = next(code for language, code in BLOCKS if language == "python")
REQUIRES = load(ROOT / PROJECT / "flask_pooling" / "version.py").REQUIRES
NUMBERS = {"APP_INSTANCES": "1", "DB_MAX_CONNECTIONS": "60", "WEB_CONCURRENCY": "2", "WEB_THREADS": "3"}
PEAK = 2 * 3
OTHERS = {
    "DB_POOL": "blue",
    "DB_TIMEOUT": "soon",
    "DB_CONNECTION_TIMEOUT": "1m",
    "DB_BIND": "x",
    "APP_INSTANCE": "i-0abc",
}
UV = Path(sys.executable).with_name("uv")


@dataclass
class Foreign:
    folder: Path
    name: str
    wsgi: str
    factory: str  # the file in which the document's diff is done
    suite: str
    venv: Path
    url: str = ""

    def run(self, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environ(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    def does(self, command: str, **environ: str) -> str:
        done = self.run(command, **environ)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def environ(self, **environ: str) -> dict[str, str]:
        there = {"DATABASE_URL": self.url} if self.url else {}
        path = f"{self.venv / 'bin'}:{CLEAN['PATH']}"
        given = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "FLASK_APP": self.wsgi.replace("()", "")}
        return CLEAN | NUMBERS | given | there | environ

    @contextlib.contextmanager
    def served(self, command: str = "gunicorn", ready: int = 200, **environ: str) -> Iterator[tuple[str, Path]]:
        """Yield its address and its log. In the end SIGTERM stops it, with 0."""
        port = free_port()
        log = self.folder.parent / f"{port}.log"
        with log.open("w") as output:
            there = self.environ(PORT=str(port), **environ)
            server = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], cwd=self.folder, env=there, stdout=output, stderr=output
            )
            try:
                address, give_up = f"http://127.0.0.1:{port}", time.monotonic() + 120
                while True:
                    with contextlib.suppress(OSError):
                        if ask(address, "/readyz")[0] == ready:
                            break
                    assert server.poll() is None, log.read_text()
                    assert time.monotonic() < give_up, log.read_text()
                    time.sleep(0.1)
                yield address, log
            finally:
                server.send_signal(signal.SIGTERM)
                ended = server.wait(60)
        assert ended in {0, -signal.SIGTERM}, log.read_text()
        assert "gunicorn" not in command or ended == 0, log.read_text()


def edit(path: Path, diff: str) -> None:
    """Do what the document's diff says: lines that go have to be there."""
    text, at = path.read_text().splitlines(), 0
    for line in diff.splitlines():
        kind, rest = line[:1], line[1:]
        if kind == "+":
            text.insert(at, rest)
            at += 1
        else:
            assert rest in text[at:], f"{path.name} has no line {rest!r}"
            at = text.index(rest, at)
            if kind == "-":
                del text[at]
            else:
                at += 1
    path.write_text("\n".join(text) + "\n")


def undone(diff: str) -> str:
    """Turn the diff round; in it, too, lines go before others come."""
    lines = [{"+": "-", "-": "+"}.get(line[:1], line[:1]) + line[1:] for line in diff.splitlines()]
    blocks = itertools.groupby(lines, key=lambda line: line[:1] in "+-")
    return "\n".join(line for is_change, block in blocks for line in (sorted(block, key=sign) if is_change else block))


def sign(line: str) -> bool:
    return line.startswith("+")


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def do_the_document(app: Foreign) -> None:
    edit(app.folder / app.factory, DIFF)
    (app.folder / "gunicorn.conf.py").write_text(CONFIGURE.replace("microblog:app", app.wsgi))


@pytest.fixture(scope="session")
def wheel(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [UV, "build", "--quiet", "--wheel", "--out-dir", folder, template]
    subprocess.run(command, timeout=600, check=True)
    (built,) = folder.glob("flask_pooling-*.whl")
    return built


def venv(folder: Path, *install: str | Path) -> Path:
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder], timeout=600, check=True)
    command = [UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *install]
    subprocess.run(command, timeout=600, check=True)
    return folder


@pytest.fixture(scope="session")
def newest(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install what the document installs, in the versions that the template's project has."""
    tested = ("--constraint", ROOT / PROJECT / "requirements" / "dev.txt")
    more = ("psycopg[binary]", "flask-migrate", "flask-login", "pytest", "setuptools")
    return venv(tmp_path_factory.mktemp("newest") / "venv", *tested, wheel, *more)


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(installed, tmp_path_factory.mktemp("postgres") / "data", "shop") as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("create schema club")
        yield url


def shop_in(folder: Path, venv: Path, url: str) -> Foreign:
    app = shutil.copytree(ROOT / "tests" / "inside" / "shop_app", folder / "shop_app")
    return Foreign(app, "shop", "shop:create_app()", "shop/__init__.py", "python -m pytest -q tests", venv, url)


@pytest.fixture(scope="module")
def shop(newest: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """A factory that takes a `test_config`, after all that the document says."""
    app = shop_in(tmp_path_factory.mktemp("foreign"), newest, server)
    do_the_document(app)
    app.does("flask init-db")
    return app


@pytest.fixture(scope="module")
def club(newest: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """A class of configuration, extensions, migrations and a module-level app, after all that the document says."""
    folder = shutil.copytree(ROOT / "tests" / "inside" / "club_app", tmp_path_factory.mktemp("foreign") / "club_app")
    url = server + "&options=-csearch_path=club"
    app = Foreign(folder, "members", "club:app", "members/__init__.py", "python tests.py", newest, url)
    do_the_document(app)
    app.does("flask db upgrade")
    return app


@pytest.fixture(params=["shop", "club"])
def each(request: pytest.FixtureRequest) -> Foreign:
    return request.getfixturevalue(request.param)


def held(url: str, service: str) -> int:
    with psycopg.connect(url.partition("&options")[0], autocommit=True) as connection:
        query = "select count(*) from pg_stat_activity where application_name = %s"
        (count,) = connection.execute(query, [service]).fetchone()
    return count


def test_the_hook_of_pre_commit(newest: Path, tmp_path: Path):
    """Its command, in a venv with the wheel as pre-commit makes it, takes the file of docs/jobs.md, and fails where the
    sum does not fit."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert (hook["language"], hook["pass_filenames"]) == ("python", False)
    assert hook["additional_dependencies"] == ["psycopg[binary]"]  # which the wheel leaves to the app
    document = (ROOT / PROJECT / "docs" / "jobs.md").read_text()
    (example,) = re.findall(r"^```toml\n# services.toml\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    assert f"id: {hook['id']}" in document
    words = [newest / "bin" / hook["entry"].split()[0], *hook["entry"].split()[1:], *hook["args"]]
    for instances, code, said in (4, 0, "main: 56 of 87 connections"), (40, 1, "what would help: servers.main.max"):
        (tmp_path / hook["args"][0]).write_text(example.replace("instances = 4", f"instances = {instances}"))
        assert re.search(hook["files"], hook["args"][0])
        done = subprocess.run(words, cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr


def test_the_wheel(wheel: Path, template: Path):
    """It has every file of the library, and asks for the oldest versions that the library says."""
    library = template / PROJECT / "flask_pooling"
    there = {f"flask_pooling/{path.relative_to(library).as_posix()}" for path in library.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in there if "__pycache__" not in name}
    assert {"flask_pooling/py.typed", "flask_pooling/templates/flask_pooling/pool.html"} <= names
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert asked == [f"{name}>={oldest}" for name, oldest in REQUIRES.items()]


def test_its_own_suite(each: Foreign, server: str):
    """It passes unchanged, with DATABASE_URL and without; what is in that database is there afterwards."""
    query = {"shop": "select count(*) from product", "members": "select count(*) from club.member"}[each.name]
    with psycopg.connect(server, autocommit=True) as connection:
        if each.name == "members":
            connection.execute("insert into club.member (name) values ('kept') on conflict do nothing")
        before = connection.execute(query).fetchone()
        each.does(each.suite)
        each.does(f"unset DATABASE_URL; {each.suite}", **OTHERS)
        assert connection.execute(query).fetchone() == before
    assert before[0] > 0


def test_a_default_url_is_kept(each: Foreign):
    """Without DATABASE_URL the app has its own SQLite file, with the engine that it had."""
    code = f"import {each.wsgi.partition(':')[0]}; app = {each.wsgi.replace(':', '.')}; app.app_context().push()\n"
    code += "engine = app.extensions['sqlalchemy'].engine; print(engine.url.database, type(engine.pool).__name__)"
    said = each.does(f'unset DATABASE_URL; python -c "{code}"')
    assert re.search(r"/(shop\.sqlite|club\.db) QueuePool\n$", said), said


def test_options_of_the_owner_stay(shop: Foreign):
    """The level of isolation and the app's own JSON, in a worker and in a shell."""
    right = {"about": '{"colour":"red"}', "level": "SERIALIZABLE"}
    with shop.served() as (address, _):
        assert ask(address, "/about") == (200, right)
    code = "from shop import create_app; print(create_app().test_client().get('/about').get_json())"
    assert str(right) in shop.does(f'python -c "{code}"')


def test_plan_check_and_version(each: Foreign):
    """The document's commands show the plan, that it fits, and which library it is."""
    assert "1 instance x 2 workers x (3 + 0) = 6 of 47 connections" in each.does("flask pool plan")
    each.does("flask pool check", DB_MAX_CONNECTIONS="100")
    assert "unmodified" in each.does("flask pool version")


@pytest.mark.parametrize(
    ("app", "command"),
    [
        ("shop", "gunicorn"),
        ("shop", "gunicorn 'shop:create_app()'"),
        ("club", "gunicorn"),
        ("club", "gunicorn club:app"),
    ],
)
def test_under_load(app: str, command: str, request: pytest.FixtureRequest):
    """More clients than the plan has connections: all are served, and no more connections than planned are there. Names
    of other programs are warned of."""
    foreign: Foreign = request.getfixturevalue(app)
    counted = []
    with foreign.served(command, **OTHERS) as (address, log), ThreadPoolExecutor(25) as clients:
        path = "/slow/0.05" if app == "shop" else "/count"
        answers = [clients.submit(ask, address, path) for _ in range(120)]
        while not all(answer.done() for answer in answers):
            counted.append(held(foreign.url, foreign.name))
        assert Counter(answer.result()[0] for answer in answers) == {200: 120}
        assert 0 < max([*counted, held(foreign.url, foreign.name)]) <= PEAK
        assert "DB_POOL: no such setting; did you mean DB_POOL_SIZE?" in log.read_text()
    if app == "shop":
        assert "the view 'shop.figures' at /metrics is not called" in log.read_text()


def test_a_session_of_flask_login(club: Foreign):
    """A member who joins is known on the next request."""
    with club.served("gunicorn club:app") as (address, _):
        jar = club.folder.parent / "cookies"
        club.does(
            f"curl -sf -c '{jar}' -d name=susan {address}/join && curl -sf -b '{jar}' {address}/members | grep susan"
        )


def test_a_password_with_a_slash(club: Foreign, server: str):
    """It is written %2F in the URL, and stays so."""
    with club.served(DATABASE_URL=club.url.replace("app@", "app:a%2Fb@")) as (address, _):
        assert ask(address, "/members")[0] == 401


def test_too_many_instances_are_refused(each: Foreign):
    """The sum is shown, with what would help, and nothing is served."""
    done = each.run("gunicorn", APP_INSTANCES="60", PORT=str(free_port()))
    assert done.returncode != 0
    assert re.search(r"60 instances x \d+ connections .* > 47 usable", done.stdout), done.stdout
    assert "what would help" in done.stdout
    assert "Traceback" not in done.stdout


def test_dead_keys_are_refused(shop: Foreign):
    """Wherever the app has them from, with what replaces each."""
    (shop.folder / "instance").mkdir(exist_ok=True)
    config = shop.folder / "instance" / "config.py"
    config.write_text("SQLALCHEMY_POOL_SIZE = 20\nSQLALCHEMY_MAX_OVERFLOW = 0\n")
    try:
        said = shop.run("python -c 'import shop; shop.create_app()'").stdout
    finally:
        config.unlink()
    for key in ("SQLALCHEMY_POOL_SIZE=20", "SQLALCHEMY_MAX_OVERFLOW=0"):
        assert re.search(rf"{key}: .*ignored this key since 3\.0", said), said


def test_a_dead_database(each: Foreign):
    """It is 503 for the client, and an error in the log."""
    path = "/" if each.name == "shop" else "/join"
    with each.served(DATABASE_URL="postgresql://app@127.0.0.1:1/nothing", ready=503) as (address, log):
        status, said = ask(address, path) if path == "/" else (int(each.does(
            f"curl -s -o said -w '%{{http_code}}' -d name=x {address}{path}; true"
        )), (each.folder / "said").read_text())  # fmt: skip
        assert (status, said) == (503, "The database did not serve this request.")
        assert "the database did not serve this request: " in log.read_text()


def test_only_gunicorn_in_production(shop: Foreign):
    """Where APP_ENV says production, `flask run` answers 503; it serves where nothing is said, as it did before."""
    serve = "flask run --port $PORT"
    with shop.served(serve) as (address, _):
        assert ask(address, "/")[0] == 200
    with shop.served(serve, ready=503, APP_ENV="production") as (address, _):
        assert ask(address, "/")[0] == 503


def test_a_job(shop: Foreign):
    """It has a pool of its share, and a name of its own on the server."""
    code = "import shop; a = shop.create_app(); a.app_context().push(); e = shop.db.engine\n"
    code += "print(e.pool.size(), e.connect().exec_driver_sql('show application_name').scalar())"
    jobs = {"APP_JOBS": "worker=2x4"}
    assert "4 shop/worker" in shop.does(f'python -c "{code}"', APP_JOB="worker", **jobs)
    assert "the job 'wroker' is not in APP_JOBS" in shop.run(f'python -c "{code}"', APP_JOB="wroker", **jobs).stdout
    assert "of 39 connections" in shop.does("flask pool plan", **jobs)


def test_the_folder_in_the_place_of_the_wheel(shop: Foreign, template: Path, tmp_path: Path):
    """An app that vendors the folder is installed as a package. The folder and the wheel at once are refused."""
    app = shop_in(tmp_path, venv(tmp_path / "venv", "setuptools", *REQUIRES, "psycopg[binary]"), shop.url)
    do_the_document(app)
    shutil.copytree(template / PROJECT / "flask_pooling", app.folder / "flask_pooling")
    project = app.folder / "pyproject.toml"
    data = '\n[tool.setuptools.package-data]\nflask_pooling = ["*", "templates/**"]\n'
    project.write_text(project.read_text() + data)
    subprocess.run(
        [UV, "pip", "install", "--quiet", "--python", app.venv / "bin" / "python", "-e", app.folder],
        timeout=600,
        check=True,
    )
    assert str(app.folder / "flask_pooling") in app.does("python -c 'import flask_pooling as f; print(f.__file__)'")
    with app.served() as (address, _):
        assert ask(address, "/")[0] == 200
    twice = Foreign(app.folder, "shop", app.wsgi, app.factory, app.suite, shop.venv, app.url).run("gunicorn")
    assert twice.returncode != 0
    assert "flask_pooling is here twice" in twice.stdout


MANUALS = """
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from prometheus_client import multiprocess


def post_fork(server, worker):
    server.log.info("Worker spawned (pid: %s)", worker.pid)
    trace.set_tracer_provider(TracerProvider(resource=Resource.create(attributes={"service.name": "club"})))
    trace.get_tracer_provider().add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))


def child_exit(server, worker):
    multiprocess.mark_process_dead(worker.pid)
    server.log.info("Marked %s", worker.pid)


def on_starting(server):
    server.log.info("Pasted")
"""
INSTRUMENT = """
from opentelemetry.instrumentation.flask import FlaskInstrumentor

FlaskInstrumentor().instrument_app(app)
"""


def test_hooks_from_other_manuals(club: Foreign, newest: Path, tmp_path: Path):
    """OpenTelemetry's, prometheus_client's and one of the owner's, pasted below ours: they run, and so do ours. Metrics
    are complete and not doubled after a worker was replaced, and the server is asked whether the plan fits."""
    packages = ("opentelemetry-sdk", "opentelemetry-instrumentation-flask")
    command = [UV, "pip", "install", "--quiet", "--python", newest / "bin" / "python", *packages]
    subprocess.run(command, timeout=600, check=True)
    folder = shutil.copytree(club.folder, tmp_path / "club_app")
    for name, code in (("gunicorn.conf.py", MANUALS), ("club.py", INSTRUMENT)):
        with (folder / name).open("a") as file:
            file.write(code)
    app = replace(club, folder=folder)
    with app.served() as (address, log):
        for _ in range(30):
            assert ask(address, "/members")[0] == 401
        (old, *_) = re.findall(r"Worker spawned \(pid: (\d+)\)", log.read_text())
        os.kill(int(old), signal.SIGTERM)
        wait_until(lambda: f"Marked {old}" in log.read_text() and log.read_text().count("Worker spawned") == 3)
        probes = address.replace(address.rpartition(":")[2], str(int(address.rpartition(":")[2]) + 1))
        wait_until(lambda: "web_slots 6.0" in ask(probes, "/metrics")[1])
        figures = ask(probes, "/metrics")[1]
        assert re.search(r"^http_request\w*_count\{.*members.*\} 30\.0$", figures, re.MULTILINE), figures
    said = log.read_text()
    assert said.count("Pasted") == 1
    assert said.count('"name": "GET /members"') == 30, said
    refused = app.run("gunicorn", DB_MAX_CONNECTIONS="600", APP_INSTANCES="40", PORT=str(free_port()))
    assert refused.returncode != 0
    assert "the plan does not fit the database" in refused.stdout


def test_leaving_again(each: Foreign, tmp_path: Path):
    """The reverse diff gives the app as it was, and its suite passes without the library."""
    left = shutil.copytree(
        each.folder, tmp_path / "left", ignore=shutil.ignore_patterns("__pycache__", "instance", "*.db")
    )
    edit(left / each.factory, undone(DIFF))
    (left / "gunicorn.conf.py").unlink()
    source = ROOT / "tests" / "inside" / each.folder.name
    for path in source.rglob("*.py"):
        assert (left / path.relative_to(source)).read_text() == path.read_text(), path


def test_a_requirement_in_the_place_of_the_folder(copy: Path, wheel: Path):
    """A generated project without the folder passes its checks and its tests, and its image has no line for it."""
    project = copy
    (project / ".venv").unlink()
    requirements = [part for name in ("prod", "dev") for part in ("-r", project / "requirements" / f"{name}.txt")]
    venv(project / ".venv", *requirements)
    command = [UV, "pip", "install", "--quiet", "--no-deps", "--python", project / ".venv" / "bin" / "python", wheel]
    subprocess.run(command, timeout=600, check=True)
    shutil.rmtree(project / "flask_pooling")
    for name, text in (("pyproject.toml", '"flask_pooling", '), ("Dockerfile", "COPY flask_pooling flask_pooling\n")):
        content = (project / name).read_text()
        assert content.count(text) == 1
        (project / name).write_text(content.replace(text, ""))
    for name in ("prod", "dev"):  # as `make install` notes it
        (project / ".venv" / f".{name}").touch()
    done = run("make lint typecheck && .venv/bin/python -m pytest --database sqlite", project)
    assert done.returncode == 0, done.stdout


def test_the_oldest_versions(wheel: Path, server: str, tmp_path: Path, oldest: Callable[[], list[str]]):
    """On them it starts, passes its suite, serves and stops, as on the newest."""
    old = venv(tmp_path / "venv", "--resolution", "lowest-direct", *oldest(), wheel, "pytest>=8", "setuptools>=70")
    app = shop_in(tmp_path, old, server)
    do_the_document(app)
    app.does("flask init-db")
    app.does(app.suite)
    with app.served() as (address, log):
        for _ in range(10):
            assert ask(address, "/about")[1]["level"] == "SERIALIZABLE"
        assert "Traceback" not in log.read_text()


@pytest.fixture
def oldest() -> Callable[[], list[str]]:
    names = {"psycopg": "psycopg[binary]"}
    return lambda: [f"{names.get(name, name)}>={version}" for name, version in REQUIRES.items()]
