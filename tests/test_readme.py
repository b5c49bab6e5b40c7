"""The two READMEs: every command in them is run by a test, and shows what they say that it shows."""

import json
import re
import secrets
import shutil
from pathlib import Path

import pytest
from baking import PROJECT, ROOT, load
from serving import ask, free_port, postgres, processes, run, served, use

READMES = {"template": ROOT / "README.md", "project": ROOT / PROJECT / "README.md"}
# The commands in the READMEs, and the tests below that run them. Those that show something are all run by test_shows.
HERE = {
    "make demo": "test_demo",
    "make run": "test_run",
    "make prod": "test_prod",
    "make load": "test_prod",
    "flask pool check": "test_prod",
    "DATABASE_URL=postgresql://app@localhost/my_service make prod": "test_prod_on_another_postgres",
    "make": "test_shows",
    "make install": "test_shows",
    "make plan": "test_shows",
    "flask pool plan": "test_shows",
    "flask pool plan --for-pgbouncer": "test_shows",
    'make migrate m="notes have a colour"': "test_the_first_change",
    "make upgrade": "test_the_first_change",
}
ELSEWHERE = {
    "cd my_service": "the tests run in that folder",
    "git init": "tests/baking.py, commit_all",
    "pipx run cookiecutter gh:OWNER/REPO": "tests/test_ways_to_bake.py bakes from a folder, a zip and a git repository",
    "cruft create": "tests/test_ways_to_bake.py",
    "cruft update --skip-apply-ask": "tests/test_ways_to_bake.py",
    "make check": "make lint, make typecheck and make test, which tests/test_generated.py runs",
    "make test": "tests/test_generated.py",
    "make format": "test_without_the_example",
    "make migrate": "with a message it is above",
    "make lock": "asks for what is newest today; tests/test_requirements.py holds what it wrote to its rules",
    "flask": "make upgrade runs it",
    "flask run --debug": "make run runs it",
    "flask pool": "its commands are above",
    "flask db upgrade": "make upgrade and make prod run it",
    "gunicorn": "make run and make prod run it",
    'echo "SECRET_KEY=$(openssl rand -hex 32)" >> .env': "feeds the next",
    'echo "POSTGRES_PASSWORD=$(openssl rand -hex 32)" >> .env': "feeds the next",
    'echo "DATABASE_PASSWORD=$(openssl rand -hex 32)" >> .env': "feeds the next",
    "docker compose up --build --wait": "needs a container engine; tests/test_image.py does what its files say",
    "docker compose exec app flask pool check": "needs a container engine",
    **dict.fromkeys(("make bench", 'make bench ARGS="--seconds 1"'), "tests/test_bench.py runs it, shorter"),
}
INLINE = re.compile(r"`((?:make|(?:\.venv/bin/)?flask|gunicorn|cruft)(?: [^`]+)?)`")


def blocks(readme: Path) -> list[tuple[str, str]]:
    """Return every command in a README's console blocks, with the output below it."""
    text = readme.read_text().replace("{{ cookiecutter.project_slug }}", "my_service")
    consoles = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    entries = (entry for block in consoles for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:])
    return [(command, shown) for command, _, shown in (entry.partition("\n") for entry in entries)]


ALL = [entry for readme in READMES.values() for entry in blocks(readme)]


def test_every_command_is_run():
    """Each command in a block or a sentence stands above, and nothing stands above that is in no README."""
    found = [command for command, shown in ALL if not shown]
    found += [command for readme in READMES.values() for command in INLINE.findall(readme.read_text())]
    commands = {command.removeprefix(".venv/bin/") for command in found}
    assert commands - HERE.keys() - ELSEWHERE.keys() == set()
    assert {name for name in (HERE | ELSEWHERE).keys() - commands if "bench" not in name} == set()
    assert [name for name in HERE.values() if name not in globals()] == []


def test_commands_stand_in_console_blocks():
    """There is no block that no test looks into."""
    for readme in READMES.values():
        assert set(re.findall(r"^```(\w*)$", readme.read_text(), re.MULTILINE)) <= {"console", "python", ""}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        *((command, shown) for command, shown in ALL if shown),
        ("make", "  make help           show this\n"),
        ("make install", ""),
        ("make plan", "machine  "),
        (".venv/bin/flask pool plan", "machine  "),
        (".venv/bin/flask pool plan --for-pgbouncer", "max_client_conn = "),
    ],
)
def test_shows(installed: Path, command: str, shown: str):
    """The command shows what the README says, and fails exactly if that is an error."""
    result = run(command, installed)
    assert shown in result.stdout
    assert bool(result.returncode) == bool(re.match(r"Error: |\d+ problem", shown)), result.stdout


def test_demo(template: Path, tmp_path: Path):
    """`make demo` in a fresh checkout bakes, installs and serves; again, it reuses what is there."""
    checkout = shutil.copytree(template, tmp_path / "a checkout")
    kept = [checkout / ".demo" / "my_service" / name for name in ("wsgi.py", ".venv/.prod", "instance/my_service.db")]
    port = free_port()
    with served("make demo", checkout, port) as address:
        status, page = ask(address, "/", accept="text/html,*/*;q=0.8")
        assert status == 200
        assert "<h1>My Service</h1>" in page
        use(address)
        ask(address, "/api/notes", "POST", title="kept")
    made = [path.stat().st_ino for path in kept]
    with served("make demo", checkout, port) as address:
        assert [note["title"] for note in ask(address, "/api/notes")[1]["items"]] == ["kept"]
    assert [path.stat().st_ino for path in kept] == made


def test_run(installed: Path):
    """`make run` serves, and one who starts a second is told about the port, and disturbs nothing."""
    port = free_port()
    with served("make run", installed, port) as address:
        use(address)
        for command, said in (
            ("make run", f"Port {port} is in use by another program"),
            ("make prod", f"Can't connect to ('127.0.0.1', {port})"),
        ):
            second = run(command, installed, PORT=str(port))
            assert second.returncode
            assert said in second.stdout
            assert "Traceback" not in second.stdout
        assert processes(below=installed / "instance") == {}
        use(address)


def pool_check(installed: Path, url: str) -> str:
    result = run(
        ".venv/bin/flask pool check",
        installed,
        APP_ENV="production",
        DATABASE_URL=url,
        SECRET_KEY=secrets.token_hex(32),
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_prod(installed: Path):
    """`make prod` brings its Postgres and keeps its data; the plan holds, under `make load` too."""
    port = free_port()
    with served("make prod", installed, port) as address:
        use(address, metrics=404)
        ask(address, "/api/notes", "POST", title="kept")
        loaded = run("make load ARGS='--run-time 2s'", installed, PORT=str(port))
        assert loaded.returncode == 0, loaded.stdout
        shown = re.search(r"^connections +(\d+) of (\d+) open", loaded.stdout, re.MULTILINE)
        assert shown
        most, capacity = map(int, shown.groups())
        assert 0 < most <= capacity
        second = run("make prod", installed, PORT=str(free_port()))
        assert second.returncode
        assert "a Postgres runs on" in second.stdout
        assert "already: stop what started it, such as `make prod`" in second.stdout
        (printed,) = re.findall(r"DATABASE_URL='(.+)'$", (installed.parent / f"{port}.log").read_text(), re.MULTILINE)
        assert "verdict        the plan fits" in pool_check(installed, printed)
    with served("make prod", installed, port) as address:
        assert "kept" in [note["title"] for note in ask(address, "/api/notes")[1]["items"]]


def test_prod_on_another_postgres(installed: Path, tmp_path: Path):
    """`DATABASE_URL=... make prod` uses that Postgres, starts none, and leaves it running."""
    (command,) = (command for command, _ in ALL if command.startswith("DATABASE_URL="))
    with postgres(installed, tmp_path / "data", "my_service") as url:
        there = command.replace("postgresql://app@localhost/my_service", f"'{url}'")
        assert there != command
        with served(there, installed, free_port()) as address:
            use(address, metrics=404)
            assert processes(below=installed / "instance") == {}
        assert "verdict        the plan fits" in pool_check(installed, url)


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", READMES["project"].read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_change(copy: Path):
    """A column, its migration, a view and a test, each as the project's README has it; a row is there already, and the
    checks of a commit pass in the end."""
    column, view, test, _ = python_blocks()
    add = "db.session.add(models.Note(title='old')); db.session.commit()"
    for command in ("make upgrade", f'echo "{add}" | APP_ENV=development .venv/bin/python -m flask shell'):
        assert run(command, copy).returncode == 0
    for name, addition in (
        ("app/models.py", column),
        ("app/notes.py", f"\n\n{view}"),
        ("tests/test_notes.py", f"\n\n{test}"),
    ):
        with (copy / name).open("a") as file:
            file.write(addition)
    commands = [command for command, _ in blocks(READMES["project"]) if command.startswith(("make migrate", "make up"))]
    assert len(commands) == 2
    for command in [*commands, "APP_ENV=development .venv/bin/python -m flask db check", "make lint", "make typecheck"]:
        result = run(command, copy)
        assert result.returncode == 0, result.stdout
    (migration,) = copy.glob("migrations/versions/*notes_have_a_colour.py")
    assert "server_default" in migration.read_text()
    tested = run(".venv/bin/python -m pytest --database sqlite tests/test_notes.py -k colours", copy)
    assert re.search(r"^1 passed", tested.stdout, re.MULTILINE), tested.stdout
    with served("make run", copy, free_port()) as address:
        assert ask(address, "/api/notes/colours") == (200, ["white"])
        metrics = ask(address, "/metrics")
        assert metrics[0] == 200


def test_two_ways(copy: Path):
    """The project's README: a write by the session, a read by `run`."""
    *_, both = python_blocks()
    script = f"from app import create_app\n\ncreate_app().app_context().push()\n{both}"
    (copy / "example.py").write_text(script)
    for command in ("make upgrade", "APP_ENV=development .venv/bin/python example.py"):
        result = run(command, copy)
        assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1:] == re.findall("^# prints: (.*)$", both, re.MULTILINE)


def test_a_setting_of_ones_own(copy: Path):
    """One line in `Settings`, and one in `.env.example`; a list and a secret, too."""
    config, example = copy / "app" / "config.py", copy / ".env.example"
    line = "    database_url: DatabaseUrl | None = None\n"
    assert line in config.read_text()
    own = "    cors_origins: list[str] = []\n    mail_password: SecretStr | None = None\n    page_size: int = 20\n"
    config.write_text(config.read_text().replace(line, line + own))
    example.write_text(f"{example.read_text()}# CORS_ORIGINS=[]\n# MAIL_PASSWORD=\n# PAGE_SIZE=20\n")
    (copy / ".env").write_text('CORS_ORIGINS=["https://example.org"]\nMAIL_PASSWORD=hunter2\n')
    show = "from app.config import Settings; s = Settings.load(); print(s.cors_origins, s.mail_password, s.page_size)"
    shown = run(f'.venv/bin/python -c "{show}"', copy, APP_ENV="development", PAGE_SIZE="50")
    assert shown.stdout == "['https://example.org'] ********** 50\n"
    for name, value, says in (
        ("PAGE_SIZE", "many", "PAGE_SIZE='many': Input should be a valid integer"),
        ("CORS_ORIGINS", "https://example.org", 'CORS_ORIGINS: is not JSON, such as ["one", "two"]'),
    ):
        wrong = run(f'.venv/bin/python -c "{show}"', copy, **{"APP_ENV": "development", name: value})
        assert says in wrong.stdout
    checked = run("make lint typecheck", copy)
    assert checked.returncode == 0, checked.stdout


def test_without_the_example(copy: Path):
    """When the example is deleted from where the README says that it is, the rest migrates, serves, and is clean."""
    readme = READMES["project"].read_text()
    assert run("make upgrade", copy).returncode == 0
    assert "all files in `migrations/versions/`, the databases\nin `instance/`" in readme
    for path in (*copy.glob("migrations/versions/*.py"), *copy.glob("instance/*.db*")):
        path.unlink()
    for name in ("app/notes.py", "tests/test_notes.py", "tests/test_server.py"):
        assert f"`{name}`" in readme
        (copy / name).unlink()
    for name, old, new in (
        ("app/models.py", r"\n\n\nclass Note\(.*\Z", "\n"),
        ("app/__init__.py", r", notes(?=[,)\n])|    app\.register_blueprint\(notes\.bp\)\n", ""),
        ("app/home.py", r'        "notes": [^\n]*\n', ""),
    ):
        assert f"`{name}`" in readme
        text, times = re.subn(old, new, (copy / name).read_text(), flags=re.DOTALL)
        assert times
        (copy / name).write_text(text)
    links = "from app import create_app; print(create_app().test_client().get('/').get_json()['links'])"
    for command in (
        "make format",  # removes the imports that nothing needs any more
        "make upgrade",
        f'APP_ENV=development .venv/bin/python -c "{links}"',
        ".venv/bin/python -m mypy app wsgi.py gunicorn.conf.py migrations",
        "make test",
    ):
        result = run(command, copy)
        assert result.returncode == 0, result.stdout
        assert "notes" not in result.stdout


def test_worked_examples():
    """The table of sums is what the arithmetic says."""
    sizing = load(ROOT / PROJECT / "flask_pooling" / "sizing.py")
    row = re.compile(r"^\| ([\d.]+) \| (\d+) \| (\d+) \| (\d+) \| (.+) \|$", re.MULTILINE)
    rows = row.findall(READMES["template"].read_text())
    assert len(rows) == 6
    for cpus, memory, connections, copies, answer in rows:
        plan = sizing.plan(
            cpus=float(cpus), memory_mib=int(memory), max_connections=int(connections), instances=int(copies)
        )
        peak = f"{plan.connections_peak} / {plan.connections_usable}"
        assert answer == f"{plan.workers} x {plan.threads} | {plan.pool_size} | {peak}"


def test_questions(template: Path):
    """The table of questions is cookiecutter.json's."""
    answers = json.loads((template / "cookiecutter.json").read_text()).items()
    asked = {name: default for name, default in answers if not name.startswith("_")}
    rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \| [^|]+ \|$", READMES["template"].read_text(), re.MULTILINE)
    assert dict(rows) == asked | {"project_slug": "made from the name"}
