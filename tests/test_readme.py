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
    "flask pool plan --pooler pgbouncer": "test_shows",
    'make migrate m="add tags"': "test_a_table",
    "make upgrade": "test_a_table",
}
ELSEWHERE = {
    "cd my_service": "the tests run in that folder",
    "cookiecutter gh:OWNER/REPO": "tests/test_ways_to_bake.py bakes from a folder, a zip and a git repository",
    "cruft create": "tests/test_ways_to_bake.py",
    "cruft update": "tests/test_ways_to_bake.py",
    "make check": "make lint, make typecheck and make test, which tests/test_generated.py runs",
    "make test": "tests/test_generated.py",
    "make lint": "tests/test_generated.py; the template's own: tests/test_static.py",
    "make bench": "tests/test_bench.py runs it, shorter",
    'make bench ARGS="--seconds 1"': "tests/test_bench.py runs it, shorter",
    "make lock": "asks for what is newest today; tests/test_requirements.py holds what it wrote to its rules",
    "flask db upgrade": "make upgrade and make prod run it",
    "gunicorn": "make run and make prod run it",
    'echo "SECRET_KEY=$(openssl rand -hex 32)" >> .env': "feeds the next",
    'echo "POSTGRES_PASSWORD=$(openssl rand -hex 32)" >> .env': "feeds the next",
    "docker compose up --build --wait": "needs a container engine; tests/test_image.py does what its files say",
    "docker compose exec app flask pool check": "needs a container engine",
}
INLINE = re.compile(r"`((?:make|(?:\.venv/bin/)?flask|gunicorn|cruft)(?: [^`]+)?)`")


def blocks(readme: Path) -> list[tuple[str, str]]:
    """Every command in a README's console blocks, with what is shown below it."""
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
    assert (HERE | ELSEWHERE).keys() - commands == set()
    assert [name for name in HERE.values() if name not in globals()] == []


def test_commands_stand_in_console_blocks():
    """There is no block that no test looks into."""
    for readme in READMES.values():
        assert set(re.findall(r"^```(\w*)$", readme.read_text(), re.MULTILINE)) == {"console", ""}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        *((command, shown) for command, shown in ALL if shown),
        ("make", "  make help           show this\n"),
        ("make install", ""),
        ("make plan", "machine  "),
        (".venv/bin/flask pool plan", "machine  "),
        (".venv/bin/flask pool plan --pooler pgbouncer", "set pgbouncer's max_client_conn to at least"),
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
    kept = [
        checkout / ".demo" / "my_service" / name for name in ("wsgi.py", ".venv/installed", "instance/my_service.db")
    ]
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
    """`make run` serves, and one who starts a second is told about the port, in one line, and disturbs nothing."""
    port = free_port()
    with served("make run", installed, port) as address:
        use(address)
        for command in ("make run", "make prod"):
            second = run(command, installed, PORT=str(port))
            assert second.returncode
            assert f"\n127.0.0.1:{port} is in use; set PORT to a free port\n" in second.stdout
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
    cluster = installed / "instance" / "postgres"
    with served("make prod", installed, port) as address:
        use(address)
        ask(address, "/api/notes", "POST", title="kept")
        loaded = run("make load ARGS='--seconds 2'", installed, PORT=str(port))
        assert loaded.returncode == 0, loaded.stdout
        shown = re.search(r"^pools +(\d+) of (\d+) .*^database +(\d+) ", loaded.stdout, re.MULTILINE | re.DOTALL)
        assert shown
        most, capacity, held = map(int, shown.groups())
        assert 0 < most <= held <= capacity
        sockets = (cluster / "postmaster.pid").read_text().splitlines()[4]
        assert "verdict        the plan fits" in pool_check(installed, f"postgresql://app@/my_service?host={sockets}")
    with served("make prod", installed, port) as address:
        assert "kept" in [note["title"] for note in ask(address, "/api/notes")[1]["items"]]


def test_prod_on_another_postgres(installed: Path, tmp_path: Path):
    """`DATABASE_URL=... make prod` uses that Postgres, starts none, and leaves it running."""
    (command,) = (command for command, _ in ALL if command.startswith("DATABASE_URL="))
    with postgres(installed, tmp_path / "data", "my_service") as url:
        there = command.replace("postgresql://app@localhost/my_service", f"'{url}'")
        assert there != command
        with served(there, installed, free_port()) as address:
            use(address)
            assert processes(below=installed / "instance") == {}
        assert "verdict        the plan fits" in pool_check(installed, url)


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    """The installed project once more, to be changed."""
    project = shutil.copytree(installed, tmp_path / "my_service", ignore=shutil.ignore_patterns(".venv", "instance"))
    (project / ".venv").symlink_to(installed / ".venv")
    return project


def test_a_table(copy: Path):
    """After a change of the models, the two commands write a migration for it, and apply it."""
    models = copy / "app" / "models.py"
    models.write_text(models.read_text() + "    tags: Mapped[str | None] = mapped_column(Text)\n")
    commands = [command for command, _ in blocks(READMES["project"]) if command.startswith(("make migrate", "make up"))]
    assert len(commands) == 2
    for command in [*commands, "APP_ENV=development .venv/bin/flask db check"]:
        result = run(command, copy)
        assert result.returncode == 0, result.stdout
    (migration,) = copy.glob("migrations/versions/*_add_tags.py")
    assert re.search(r"""add_column\(sa.Column\(["']tags["'],""", migration.read_text())


def test_without_the_example(copy: Path):
    """When the example is deleted from where the README says that it is, the rest migrates, serves, and is clean."""
    readme = READMES["project"].read_text()
    for name in ("app/notes.py", "migrations/versions/0001_notes.py", "tests/test_notes.py"):
        assert f"`{name}`" in readme
        (copy / name).unlink()
    for name, old, new in (
        ("app/models.py", r"\n\n\nclass Note\(.*\Z", "\n"),
        ("app/__init__.py", ", notes(?=[,)])", ""),
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
        ".venv/bin/mypy app wsgi.py gunicorn.conf.py migrations",
    ):
        result = run(command, copy)
        assert result.returncode == 0, result.stdout
        assert "notes" not in result.stdout


def test_worked_examples():
    """The table of sums is what the arithmetic says."""
    sizing = load(ROOT / PROJECT / "app" / "sizing.py")
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


def test_the_figures_are_the_benchmarks():
    """The table of speeds is what the stored results say; `python -m tests.bench chart` prints it anew."""
    bench = ROOT / "tests" / "bench"
    report = load(bench / "report.py")
    result, counted = (
        json.loads((bench / "results" / f"{name}.json").read_text()) for name in ("bench", "instructions")
    )
    assert report.summary(result, counted["rows"]) in READMES["template"].read_text()


@pytest.mark.parametrize(("workload", "name"), [("read", "reads"), ("slow", "queries"), ("mixed", "mixed")])
def test_the_evidence_for_the_plan_is_the_benchmarks(workload: str, name: str):
    """Beside the constants of the plan stands what `python -m tests.bench sweep` measured, size by size."""
    bench = ROOT / "tests" / "bench"
    report = load(bench / "report.py")
    text = (ROOT / PROJECT / "app" / "sizing.py").read_text()

    def measured(*stored: str) -> dict[str, str]:
        """A size that is in several: as in the last."""
        rows = [json.loads((bench / "results" / f"{each}.json").read_text())["rows"] for each in stored]
        pairs = {
            size: report.pair(each, "baked", size, report.RATE, workload=workload)
            for each in rows
            for size in report.names(each)
        }
        return {size: f"{pair.middle:.2f}" for size, pair in pairs.items()}

    sizes = re.search(r"^#  ((?: +\d+x\d+| +\|)+)$", text, re.MULTILINE)[1].replace("|", " ").split()
    shown = re.search(rf"^#   {name} +(.+)$", text, re.MULTILINE)[1].replace("|", " ").split()
    assert len(sizes) > 10
    assert dict(zip(sizes, shown, strict=True)) == {size: measured("sweep", "sizes")[size] for size in sizes}
    on_one_core = re.search(r"^# On 1 core, .+$", text, re.MULTILINE)[0]
    sizes, shown = re.findall(r"\dx\d", on_one_core), re.search(rf"{name} ([\d. ]+)[,.]", on_one_core)[1].split()
    assert dict(zip(sizes, shown, strict=True)) == {size: measured("sweep-1-core")[size] for size in sizes}
