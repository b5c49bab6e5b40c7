"""deploy/ and docs/jobs.md, with the real programs: systemd, PgBouncer, Kubernetes' schemas, task queues."""

import contextlib
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from baking import PROJECT, ROOT, Bake
from serving import CLEAN, STARTING_SECONDS, STOPPING_SECONDS, ask, free_port, postgres, run, served

UV = Path(sys.executable).parent / "uv"
SECRET = "0123456789abcdef" * 4
SPARE = 5  # half of DB_RESERVED_CONNECTIONS


@pytest.fixture(scope="module")
def database(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres of our own, migrated: its URL."""
    with postgres(installed, tmp_path_factory.mktemp("database") / "data", "my_service") as url:
        flask(installed, url, "db", "upgrade")
        yield url


@pytest.fixture(scope="module")
def queues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a venv with what the project runs on, the task queues and Kubernetes' schemas."""
    venv = tmp_path_factory.mktemp("queues") / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    locks = (ROOT / PROJECT / "requirements" / "prod.txt", ROOT / "requirements" / "deploy.txt")
    files = [word for lock in locks for word in ("--requirement", lock)]
    install = [UV, "pip", "install", "--quiet", "--require-hashes", "--python", venv / "bin" / "python", *files]
    subprocess.run(install, check=True, timeout=300)
    return venv / "bin"


def environment(url: str, **more: object) -> dict[str, str]:
    return CLEAN | {"DATABASE_URL": url, "SECRET_KEY": SECRET} | {name: str(value) for name, value in more.items()}


def flask(project: Path, url: str, *words: str, **more: object) -> str:
    """Return what a `flask` command prints."""
    result = subprocess.run(
        [project / ".venv" / "bin" / "flask", *words],
        cwd=project,
        env=environment(url, **more),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def superuser(url: str) -> "psycopg.Connection[Any]":
    return psycopg.connect(url.replace("//app@", "//postgres@"), autocommit=True)


def connected(url: str) -> Counter[str]:
    """Count the service's connections, by kind of process."""
    with superuser(url) as connection:
        rows = connection.execute("select application_name from pg_stat_activity where usename = 'app'").fetchall()
    return Counter(name for (name,) in rows)


def wait_for(condition: Callable[[], object], seconds: float = STARTING_SECONDS / 5, log: Path | None = None) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, log.read_text() if log else "it does not come true"
        time.sleep(0.05)


@contextlib.contextmanager
def running(
    command: list[Any], cwd: Path, environ: dict[str, str], log: Path, **options: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program for as long as the context lasts. It must not end before that."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, env=environ, stdout=output, stderr=output, **options)
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOPPING_SECONDS)
            process.kill()
            process.wait()


def is_ready(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(f"http://127.0.0.1:{port}", "/readyz")[0] == 200
    return False


class Load:
    """Clients that ask one after the other until told to stop. `failed` is what was not a 200."""

    def __init__(self, *ports: int, clients: int) -> None:
        self.good, self.failed, self.over = 0, list[str](), threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(ports[n % len(ports)],)) for n in range(clients)]

    def ask(self, port: int) -> None:
        while not self.over.is_set():
            try:
                status, _ = ask(f"http://127.0.0.1:{port}", "/api/notes")
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
            else:
                if status == 200:
                    self.good += 1
                else:
                    self.failed.append(str(status))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def manifests(project: Path) -> dict[str, Any]:
    kubernetes = project / "deploy" / "kubernetes"
    return {file.name: yaml.safe_load(file.read_text()) for file in sorted(kubernetes.glob("*.yaml"))}


def test_kubernetes_schemas(project: Path, queues: Path):
    """Every manifest is valid, and has no key that Kubernetes would ignore."""
    kubernetes = project / "deploy" / "kubernetes"
    files = [name for name in manifests(project) if name != "kustomization.yaml"]
    command = [queues / "kubernetes-validate", "--strict", *files]
    result = subprocess.run(command, cwd=kubernetes, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (result.stdout + result.stderr).count("passed") == len(files)


def test_kustomization_holds_together(project: Path):
    """It lists every manifest, makes the ConfigMap that they read, and gives the image that they name."""
    found = manifests(project)
    kustomization = found.pop("kustomization.yaml")
    assert sorted(kustomization["resources"]) == sorted(found)
    text = "\n".join((project / "deploy" / "kubernetes" / name).read_text() for name in found)
    assert set(re.findall(r"configMapRef: \{name: (\w+)\}", text)) == {kustomization["configMapGenerator"][0]["name"]}
    assert set(re.findall(r"image: (\w+)", text)) == {kustomization["images"][0]["name"]}
    pod = found["deployment.yaml"]["spec"]["template"]
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert pod["spec"]["containers"][0]["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108
    labels = pod["metadata"]["labels"]
    assert found["service.yaml"]["spec"]["selector"] == labels
    assert found["pdb.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert found["deployment.yaml"]["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize(
    ("instances", "pods", "kind"),
    [(1, (1, 1), "Recreate"), (2, (1, 1), "RollingUpdate"), (3, (1, 1), "RollingUpdate"), (6, (2, 4), "RollingUpdate")],
)
def test_replicas_follow_the_answer(bake: Bake, instances: int, pods: tuple[int, int], kind: str):
    """The answer is the most that are alive at once: replicas, surge, and those that are still ending."""
    found = manifests(bake(app_instances=str(instances)))
    autoscaler = found["hpa.yaml"]["spec"]
    assert (autoscaler["minReplicas"], autoscaler["maxReplicas"]) == pods
    assert found["deployment.yaml"]["spec"]["strategy"]["type"] == kind
    assert f"APP_INSTANCES={instances}" in found["kustomization.yaml"]["configMapGenerator"][0]["literals"]


TOO_LARGE = [
    (
        "hpa.yaml",
        "maxReplicas: 1",
        "maxReplicas: 5",
        "5 pods + maxSurge 1 + 1 still ending = 7 at once, and APP_INSTANCES=2",
    ),
    (
        "kustomization.yaml",
        "APP_INSTANCES=2",
        "APP_INSTANCES=2\n      - WEB_CONCURRENCY=50",
        "WEB_CONCURRENCY=43",
    ),
    ("kustomization.yaml", "APP_INSTANCES=2", "APP_INSTANCES=2\n      - WEB_THREADS=50", "or WEB_THREADS=43"),
    ("kustomization.yaml", "APP_INSTANCES=2", "APP_INSTANCES=2\n      - DB_POOL_SIZE=50", "or DB_POOL_SIZE=43"),
    ("kustomization.yaml", "APP_INSTANCES=2", "APP_INSTANCES=2\n      - DB_BINDS=40", "= 164 > 87 usable"),
    (
        "kustomization.yaml",
        "APP_INSTANCES=2",
        "APP_INSTANCES=2\n      - DB_RESERVED_CONNECTIONS=96",
        "- 96 reserved",
    ),
    ("kustomization.yaml", "APP_INSTANCES=2", "APP_INSTANCES=2\n      - WEB_GRACEFUL_TIMEOUT=90", "45 > (5 + 90)"),
    ("deployment.yaml", "spec: # without", "spec:\n  replicas: 5 # without", "replicas: 5 would undo"),
    (
        "deployment.yaml",
        "image: app\n",
        "image: app\n          env: [{name: APP_INSTANCES, value: '1'}]\n",
        "and APP_INSTANCES=1 in",
    ),
    ("deployment.yaml", "minReadySeconds: 45", "minReadySeconds: 30", "30 >= 45"),
    (
        "pdb.yaml",
        "apiVersion",
        "{kind: Deployment, metadata: {name: worker}, spec: {replicas: 30}}\n---\napiVersion",
        "the Deployment worker is not in APP_JOBS",
    ),
    ("kustomization.yaml", "APP_JOBS=", "APP_JOBS=worker=20x5", "the jobs alone hold 100 of 87"),
    ("kustomization.yaml", "DB_MAX_CONNECTIONS=100", "DB_MAX_CONNECTIONS=14", "2 instances x 2 connections"),
    ("deployment.yaml", "minReadySeconds: 45", "minReadySeconds: 5", "5 >= 45"),
    ("migrate.yaml", 'limits: {cpu: "1"', 'limits: {cpu: "4"', "'cpu': '4'"),
]
FITS = [
    ('cpu: "1"', "cpu: 1"),
    ("512Mi", "0512Mi"),
    ("maxSurge: 1", "maxSurge: 25%"),
    ("rollingUpdate: {maxSurge: 1, maxUnavailable: 0}", "rollingUpdate: {}"),
    ("      - APP_JOBS=\n", ""),
    ("APP_INSTANCES=2", "APP_INSTANCES=100\n      - DB_POOLER=pgbouncer"),
]


@pytest.fixture(scope="module")
def told(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what the project's own tests say of the manifests, by case. One run of them looks at all cases."""
    folder = tmp_path_factory.mktemp("cases")
    for name, (changed, old, new) in {
        **{f"too-large-{number}": row[:3] for number, row in enumerate(TOO_LARGE)},
        **{f"fits-{number}": ("*", *row) for number, row in enumerate(FITS)},
    }.items():
        copy = shutil.copytree(installed / "deploy" / "kubernetes", folder / name)
        files = [path for path in copy.glob(changed) if old in path.read_text()]
        assert files
        for path in files:
            path.write_text(path.read_text().replace(old, new))
    words = ["-m", "pytest", "-p", "manifests", "-p", "no:cacheprovider", "tests/test_deploy.py"]
    more = {"PYTHONPATH": str(Path(__file__).parent / "inside"), "CASES": str(folder)}
    command = [installed / ".venv" / "bin" / "python", *words]
    done = subprocess.run(
        command, cwd=installed, env=CLEAN | more, capture_output=True, text=True, timeout=600, check=False
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(TOO_LARGE)), ids=[f"{row[0]} {row[2]}" for row in TOO_LARGE])
def test_the_projects_own_test_says_which_number(told: dict[str, str], number: int):
    """A number that does not fit any more is named by the generated suite."""
    assert TOO_LARGE[number][3] in told[f"too-large-{number}"]


@pytest.mark.parametrize("number", range(len(FITS)), ids=[row[1] for row in FITS])
def test_the_projects_own_test_reads_what_kubernetes_reads(told: dict[str, str], number: int):
    """Other ways to write what fits."""
    assert told[f"fits-{number}"] == ""


# --- compose ---------------------------------------------------------------------------------------------------------

DOCKER = """#!/bin/sh
# In the place of the engine: an instance is a file.
cd "$INSTANCES" || exit 1
case "$*" in
    "compose ps -q app") ls ;;
    "stop "*) echo "stopped $2" >> ../told ;;
    "rm "*) rm "$2" && echo "left $(ls | wc -l)" >> ../told ;;
    "compose up --no-deps --no-recreate --wait app")
        echo > "new-$(ls | wc -l)" && echo "$STARTS" >> ../told && [ "$STARTS" = started ] ;;
    *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("starts", ["started", "does not start"])
def test_one_instance_after_the_other(project: Path, tmp_path: Path, starts: str):
    """The loop of the page, with a script in the place of the engine, which cannot be here: there is always one. When a
    new one does not start, the others are left alone."""
    (loop,) = (command for command, _ in commands(project) if command.startswith("for old in"))
    (tmp_path / "instances").mkdir()
    for name in ("old-1", "old-2"):
        (tmp_path / "instances" / name).touch()
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    environ = CLEAN | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "INSTANCES": str(tmp_path / "instances")}
    subprocess.run(["sh", "-c", loop], env=environ | {"STARTS": starts}, check=True, timeout=120)
    told = ["stopped old-1", "left 1", starts]
    told += ["stopped old-2", "left 1", starts] if starts == "started" else []
    assert (tmp_path / "told").read_text().splitlines() == told
    kept = {"new-1"} if starts == "started" else {"new-1", "old-2"}
    assert {path.name for path in (tmp_path / "instances").iterdir()} == kept


# --- systemd ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def units(installed: Path, tmp_path: Path) -> Path:
    """The units as they are installed, of a project that is elsewhere than in /srv."""
    (tmp_path / "my_service").symlink_to(installed)
    for kind in ("service", "socket"):
        text = (installed / "deploy" / "systemd" / f"web.{kind}").read_text()
        (tmp_path / f"my_service.{kind}").write_text(text.replace("/srv/%p", f"{tmp_path}/%p"))
    return tmp_path


def test_systemd_understands_the_units(units: Path):
    """Nothing is unknown, and what is started is there."""
    for name in ("my_service.service", "my_service.socket"):
        command = ["systemd-analyze", "verify", "--man=no", units / name]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert (result.returncode, [line for line in result.stderr.splitlines() if "my_service" in line]) == (0, [])


def test_the_unit_is_hardened(units: Path):
    """systemd's own figure goes from 0 (safe) to 10; an ordinary unit has 9.6."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", units / "my_service.service"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout


def test_a_restart_loses_no_request(installed: Path, database: str, tmp_path: Path):
    """The socket is systemd's, so it is open while gunicorn is not. A client that connects meanwhile waits."""
    unit = (installed / "deploy" / "systemd" / "web.service").read_text()
    start = re.search(r"^ExecStart=/bin/sh -c '(.*)'$", unit, re.MULTILINE)
    assert start
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as held:
        port, number = held.getsockname()[1], held.fileno()
        # What systemd does: the socket is number 3, and LISTEN_PID is the process that it is for.
        command = f"export LISTEN_FDS=1 LISTEN_PID=$$; exec 3<&{number}; {start[1].replace('$$', '$')}"
        environ = environment(database, PORT=free_port())
        with contextlib.ExitStack() as stack:
            load = None
            for round_ in range(3):
                log = tmp_path / f"{round_}.log"
                with running(["bash", "-c", command], installed, environ, log, pass_fds=[number]) as gunicorn:
                    if load is None:
                        wait_for(lambda: is_ready(port), log=log)
                        load = stack.enter_context(Load(port, clients=6))
                    before = load.good
                    wait_for(lambda before=before, load=load: load.good > before + 200, log=log)
                    if round_ == 2:
                        load.over.set()  # or the last stop would leave them waiting
                        load.__exit__()
                    gunicorn.terminate()
                    assert gunicorn.wait(STOPPING_SECONDS) == 0, log.read_text()
    assert load
    assert load.good > 600
    assert load.failed == []


# --- one instance too many -------------------------------------------------------------------------------------------


def test_an_instance_too_many(installed: Path, database: str, tmp_path: Path):
    """Two are planned and hold all their connections. A third does not fit into the limit of the role. Made to start
    nevertheless, it gets no more from the server than the plan leaves to the role. Nobody else notices, and migrations
    and checks work."""
    numbers = {"WEB_CONCURRENCY": 2, "WEB_THREADS": 4, "APP_INSTANCES": 2, "DB_MAX_CONNECTIONS": 100}
    peak = 2 * 2 * 4
    admin = database.replace("//app@", "//postgres@")
    printed = flask(installed, database, "pool", "limit", "--apply", **numbers, DATABASE_ADMIN_URL=admin)
    assert printed == f'ALTER ROLE "app" CONNECTION LIMIT {peak + SPARE};\n'

    def instance(name: str, port: int, **more: object) -> Any:
        environ = environment(database, PORT=port, **numbers, **more)
        return running([installed / ".venv" / "bin" / "gunicorn"], installed, environ, tmp_path / name)

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(instance("one", one := free_port()))
            wait_for(lambda: is_ready(one), log=tmp_path / "one")
            stack.enter_context(instance("two", two := free_port()))
            wait_for(lambda: is_ready(two), log=tmp_path / "two")
            three = free_port()
            with Load(one, two, clients=24) as load:
                wait_for(lambda: connected(database)["my_service"] == peak)
            assert load.failed == []
            # The pools keep what they have. Fewer clients leave the machine something for the commands.
            with Load(one, two, clients=4) as load:
                flask(installed, database, "db", "upgrade", **numbers)
                assert "the plan fits" in flask(installed, database, "pool", "check", **numbers)

                with instance("refused", three) as refused:
                    assert refused.wait(STARTING_SECONDS) != 0
                said = (tmp_path / "refused").read_text()
                told = rf"[0-9]+ connections of {peak + SPARE} are open \(the role's .*this instance may open 8;"
                assert re.search(told, said), said

                # The check is off: now it is the server's turn.
                with instance("three", three, DB_BUDGET_CHECK="off"):
                    wait_for(lambda: is_ready(three), log=tmp_path / "three")
                    with Load(three, clients=20) as more:
                        wait_for(lambda: more.failed)
                        assert sum(connected(database).values()) <= peak + SPARE
                    assert set(more.failed) == {"503"}
                with contextlib.ExitStack() as shells:
                    wait_for(lambda: sum(connected(database).values()) == peak)
                    for _ in range(SPARE):  # the role's own have what is left to it
                        shells.enter_context(psycopg.connect(database))
                    with instance("red", three, DB_BUDGET_CHECK="off"):
                        wait_for(lambda: alive(three), log=tmp_path / "red")
                        assert not is_ready(three)
                        assert is_ready(one)
                        assert is_ready(two)
            assert load.failed == []
            assert load.good > 200
    finally:
        with superuser(database) as connection:
            connection.execute("alter role app connection limit -1")


def alive(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(f"http://127.0.0.1:{port}", "/livez")[0] == 200
    return False


# --- PgBouncer -------------------------------------------------------------------------------------------------------


def test_pgbouncer_with_the_plans_sizes(installed: Path, database: str, tmp_path: Path):
    """The shipped file and the sizes of the plan start a PgBouncer, through which the service works."""
    (tmp_path / "sizes").mkdir()
    sizes = flask(installed, database, "pool", "plan", "--for-pgbouncer")
    (tmp_path / "sizes" / "sizes.ini").write_text(sizes)
    (tmp_path / "userlist.txt").write_text(f'"app" "{SECRET}"\n')
    port, host = free_port(), database.partition("?host=")[2]
    ini = (installed / "deploy" / "pgbouncer" / "pgbouncer.ini").read_text()
    for old, new in (
        ("/etc/pgbouncer", str(tmp_path)),
        ("host=db port=5432", f"host={host} port=5432"),
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104  # what is shipped is for a container
        ("6432", str(port)),
    ):
        assert old in ini
        ini = ini.replace(old, new)
    (tmp_path / "pgbouncer.ini").write_text(ini + "unix_socket_dir =\nadmin_users = app\n")
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for folder in (tmp_path, *tmp_path.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
    with superuser(database) as connection:
        connection.execute(f"alter role app password '{SECRET}'")  # type: ignore[arg-type]
    through = f"postgresql://app:{SECRET}@127.0.0.1:{port}/my_service"
    log = tmp_path / "log"
    with running(["/usr/sbin/pgbouncer", tmp_path / "pgbouncer.ini"], tmp_path, CLEAN, log, **account) as pgbouncer:
        wait_for(lambda: listens(port), log=log)
        with psycopg.connect(through.replace("/my_service", "/pgbouncer"), autocommit=True) as admin:
            shown = {row[0]: row[1] for row in psycopg.ClientCursor(admin).execute("show config").fetchall()}
        for name, size in re.findall(r"^(\w+) = (\d+)$", sizes, re.MULTILINE):
            assert shown[name] == size
        serving = free_port()
        gunicorn = f"exec '{installed}/.venv/bin/gunicorn'"
        environ = {"DATABASE_URL": through, "SECRET_KEY": SECRET, "DB_POOLER": "pgbouncer"}
        with served(gunicorn, installed, serving, signal.SIGTERM, **environ) as address:
            assert ask(address, "/api/notes", "POST", title="Bread")[0] == 201
            assert ask(address, "/api/notes")[0] == 200
        assert pgbouncer.poll() is None


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


# --- a platform ------------------------------------------------------------------------------------------------------


def test_procfile(installed: Path, database: str):
    """As a platform runs it: each line by a shell, and the port from PORT. WEB_HOST lets the platform's router in. Each
    other setting is set, and empty."""
    lines = dict(line.split(": ", 1) for line in (installed / "Procfile").read_text().splitlines())
    assert lines.keys() == {"release", "web"}
    assert "\n-r requirements/prod.txt\n" in (installed / "requirements.txt").read_text()
    assert "WEB_HOST=0.0.0.0" in lines["web"]
    settings = re.findall(r"^# ([A-Z_]+)=", (installed / ".env.example").read_text(), re.MULTILINE)
    assert {"WEB_CONCURRENCY", "WEB_PROBE_PORT", "DB_POOLER", "APP_ENV"} <= {*settings}
    environ = dict.fromkeys(settings, "") | {
        "PATH": f"{installed}/.venv/bin:{os.environ['PATH']}", "DATABASE_URL": database, "SECRET_KEY": SECRET
    }  # fmt: skip
    subprocess.run(["sh", "-c", lines["release"]], cwd=installed, env=CLEAN | environ, check=True, timeout=600)
    web = lines["web"].replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    with served(web, installed, free_port(), signal.SIGTERM, **environ) as address:
        assert ask(address, "/api/notes")[0] == 200
        assert [ask(address, probe)[0] for probe in ("/livez", "/readyz")] == [200, 200]


# --- task queues -----------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(installed: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder for logs. For as long as a test lasts, the app has the files that docs/jobs.md shows."""
    text = (installed / "docs" / "jobs.md").read_text()
    shown = dict(re.findall(r"```python\n# (app/\w+\.py)\n(.*?)```", text, re.DOTALL))
    assert len(shown) == 3
    (setting,) = re.findall("`(redis_url: .+)`", text)
    config, above = installed / "app" / "config.py", "    database_url: DatabaseUrl | None = None\n"
    before = config.read_text()
    assert before.count(above) == 1
    try:
        config.write_text(before.replace(above, f"{above}    {setting}\n"))
        for name, code in shown.items():
            (installed / name).write_text(code)
        yield tmp_path
    finally:
        config.write_text(before)
        for name in shown:
            (installed / name).unlink(missing_ok=True)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    port, log = free_port(), tmp_path / "redis.log"
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path]
    with running(command, tmp_path, CLEAN, log):
        wait_for(lambda: listens(port), log=log)
        yield f"redis://127.0.0.1:{port}/0"


class Peak:
    """The most connections of each kind that were ever seen at once."""

    def __init__(self, url: str) -> None:
        self.url, self.most, self.over = url, Counter[str](), threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        with superuser(self.url) as connection:
            while not self.over.wait(0.01):
                query = "select application_name, count(*) from pg_stat_activity where usename = 'app' group by 1"
                for name, count in connection.execute(query).fetchall():
                    self.most[name] = max(self.most[name], count)

    def __enter__(self) -> "Peak":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


CELERY = """
import os
from celery import Celery
sender = Celery(broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])  # a view imports no worker
print(len({result.get(timeout=600) for result in [sender.send_task("server_process") for _ in range(60)]}))
"""


@pytest.mark.parametrize(
    ("jobs", "options", "least"),
    [("worker=4x1", ["--concurrency", "4"], 3), ("worker=1x4", ["--pool", "threads", "--concurrency", "4"], 3)],
)
def test_celery(
    installed: Path, database: str, queues: Path, redis: str, programs: Path, jobs: str, options: list[str], least: int
):
    """Four children with a connection each, or one process with four: never more than the plan has."""
    environ = environment(
        database, APP_JOBS=jobs, APP_JOB="worker", REDIS_URL=redis, PYTHONPATH=f"{installed}{os.pathsep}{programs}"
    )
    command = [queues / "celery", "--app", "app.celery_worker", "worker", *options]
    with Peak(database) as peak, running(command, programs, environ, programs / "celery.log"):
        result = subprocess.run(
            [queues / "python", "-c", CELERY], cwd=programs, env=environ, capture_output=True, text=True, timeout=600
        )  # fmt: skip
        assert result.returncode == 0, result.stderr + (programs / "celery.log").read_text()
    assert least <= int(result.stdout) <= 4, "as many connections as results came from"
    assert least <= peak.most["my_service/worker"] <= 4


RQ = """
import os
from redis import Redis
from rq import Queue
queue = Queue(connection=Redis.from_url(os.environ["REDIS_URL"]))
for _ in range(6):
    queue.enqueue("app.rq_jobs.server_process")
"""


def test_rq(installed: Path, database: str, queues: Path, redis: str, programs: Path):
    """Each job is a child of a worker, with a connection of its own; two workers have two at the most."""
    environ = environment(
        database,
        APP_JOBS="worker=2x1",
        APP_JOB="worker",
        REDIS_URL=redis,
        PYTHONPATH=f"{installed}{os.pathsep}{programs}",
    )
    subprocess.run([queues / "python", "-c", RQ], cwd=programs, env=environ, check=True, timeout=600)
    command = [queues / "rq", "worker", "--burst", "--url", redis]
    log, other = programs / "rq.log", programs / "other.log"
    with (
        Peak(database) as peak,
        running(command, programs, environ, log) as one,
        running(command, programs, environ, other) as two,
    ):
        assert [one.wait(600), two.wait(600)] == [0, 0], log.read_text()
    said = log.read_text() + other.read_text()
    assert said.count("Successfully completed") == 6 or said.count("Job OK") == 6, said
    assert 1 <= peak.most["my_service/worker"] <= 2


def test_procrastinate(installed: Path, database: str, queues: Path, programs: Path):
    """Its own pool and ours are two kinds, and both keep to the plan."""
    environ = environment(
        database, APP_JOBS="worker=1x4,queue=1x3", APP_JOB="worker", PYTHONPATH=f"{installed}{os.pathsep}{programs}"
    )  # fmt: skip
    program = [queues / "procrastinate", "--app", "app.procrastinate_worker.queue"]
    for words in (["schema", "--apply"], *(["defer", "server_process", "{}"] for _ in range(12))):
        said = subprocess.run(
            [*program, *words], cwd=programs, env=environ, timeout=600, capture_output=True, check=False
        )
        assert said.returncode == 0, said.stderr.decode()

    def done() -> bool:
        with superuser(database) as connection:
            rows = connection.execute("select status::text, count(*) from procrastinate_jobs group by 1").fetchall()
        return dict(rows) == {"succeeded": 12}

    log = programs / "procrastinate.log"
    with (
        Peak(database) as peak,
        running([queues / "python", "-m", "app.procrastinate_worker"], programs, environ, log) as worker,
    ):
        wait_for(done, log=log)
        worker.terminate()
        assert worker.wait(STOPPING_SECONDS) == 0, log.read_text()
    assert 1 <= peak.most["my_service/worker"] <= 4
    assert 1 <= peak.most["my_service/queue"] <= 3


# --- the page --------------------------------------------------------------------------------------------------------

# The commands of docs/deploy.md, by how they begin, and the test that runs them or does the same with the same files.
RUN = {
    "flask pool limit": "test_what_the_page_shows",
    "flask pool plan --for-pgbouncer | sudo tee": "test_what_the_page_shows, test_pgbouncer_with_the_plans_sizes",
    "DATABASE_ADMIN_URL=postgresql://postgres@… flask pool limit --apply": "test_an_instance_too_many",
    "sudo mkdir -p /etc/pgbouncer/sizes": "test_pgbouncer_with_the_plans_sizes",
    "sudo cp deploy/pgbouncer/pgbouncer.ini": "test_pgbouncer_with_the_plans_sizes",
    "sudo cp deploy/systemd": "test_systemd_understands_the_units",
    "systemd-analyze security": "test_the_unit_is_hardened",
    "sudo sh -c 'set -a; . /etc/my_service.env;": "test_a_file_of_settings_for_a_shell",
    "sudo systemctl enable --now": "needs systemd itself; test_a_restart_loses_no_request does the same",
    'echo "SECRET_KEY=$(openssl rand -hex 32)" >> .env': "feeds the next",
    'echo "POSTGRES_PASSWORD=$(openssl rand -hex 32)" >> .env': "feeds the next",
    'echo "TLS_HOST=notes.example.org" >> .env': "tests/test_proxy.py, test_tls_by_a_host_name",
    'echo "DATABASE_PASSWORD=$(openssl rand -hex 32)" >> .env': "feeds the next",
    "for old in $(docker compose ps -q app)": "test_one_instance_after_the_other",
    'sed -i "s/newTag: .*/newTag: $(git rev-parse HEAD)/"': "test_a_release_names_its_image",
    "docker compose": "needs a container engine; tests/test_image.py and test_proxy.py do what its files say",
    "psql": "is psql's own",
    "kubectl": "needs a cluster; test_kubernetes_schemas, test_kustomization_holds_together and the limit's test above",
}


def commands(project: Path) -> list[tuple[str, str]]:
    """Return each command of the page, with the output below it."""
    text = (project / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    entries = [entry for block in blocks for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, shown) for command, _, shown in (entry.partition("\n") for entry in entries)]


def test_every_command_of_the_page_is_run(project: Path):
    """Each stands above, and nothing stands above that is not on the page."""
    found = [command for command, _ in commands(project)]
    assert [command for command in found if not command.startswith(tuple(RUN))] == []
    assert [start for start in RUN if not any(command.startswith(start) for command in found)] == []
    named = {word for where in RUN.values() for word in re.findall(r"\btest_\w+\b(?!\.py)", where)}
    assert named - globals().keys() == {"test_tls_by_a_host_name"}  # which is in test_proxy.py


def test_what_the_page_shows(installed: Path, database: str):
    """The limit and PgBouncer's sizes are those of the defaults on two cpus."""
    plan = {"WEB_CONCURRENCY": 3, "WEB_THREADS": 4}
    shown = {command: text for command, text in commands(installed) if text and "sudo cp" not in text}
    assert len(shown) == 2
    for command, text in shown.items():
        words = command.partition(" | ")[0].split()[1:]
        assert flask(installed, database, *words, **plan) == text, command


def test_a_file_of_settings_for_a_shell(installed: Path, database: str, tmp_path: Path):
    """systemd reads it as EnvironmentFile, and a shell reads it before the migration."""
    (command,) = (
        command for command, _ in commands(installed) if "/etc/my_service.env" in command and "sh -c" in command
    )
    settings = tmp_path / "my_service.env"
    settings.write_text(f"DATABASE_URL='{database}'\nSECRET_KEY={SECRET}\n")
    done = run(command.removeprefix("sudo ").replace("/etc/my_service.env", str(settings)), installed)
    assert done.returncode == 0, done.stdout


def test_a_release_names_its_image(project: Path, tmp_path: Path):
    """Kubernetes replaces nothing when the tag stays the same."""
    (command,) = (command for command, _ in commands(project) if command.startswith("sed -i"))
    copy = shutil.copytree(project, tmp_path / "copy")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=copy, check=True, timeout=120)
    subprocess.run(["sh", "-ec", command], cwd=copy, check=True, timeout=120)
    said = yaml.safe_load((copy / "deploy" / "kubernetes" / "kustomization.yaml").read_text())
    assert re.fullmatch("[0-9a-f]{40}", said["images"][0]["newTag"])


def test_the_page_is_short_and_names_what_is_there(project: Path):
    """Every file that docs/deploy.md names exists, and every way has at most five commands."""
    text = (project / "docs" / "deploy.md").read_text()
    assert len(text.splitlines()) <= 240
    named = set(re.findall(r"\b(?:deploy|docs|tests|\.github)/[\w./-]+\w", text)) | {"Procfile", "compose.yaml"}
    assert [name for name in sorted(named) if not (project / name).exists()] == []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        assert len(re.findall(r"^\$ ", block, re.MULTILINE)) <= 5, block
