"""The parts of the scenarios: a baked project, real servers, loads that end, and one table of what was counted.

Everything that is started is a context manager that stops it again, by its own pid.
"""

import asyncio
import contextlib
import functools
import http.client
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psycopg
from needs import POSTGRES as DEBIAN_POSTGRES
from serving import free_port

HERE = Path(__file__).parent
GENEROUS = 120  # seconds for what takes one or two, unless the machine is busy
ROLE = "app"
DATABASE = "service"
NO_CONNECTION_LEFT = re.compile("too many clients|remaining connection slots|too many connections")


# The table ------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The counts of one scenario. `missed` says which bars were missed, and is empty when all were met."""

    scenario: str
    load: str
    bar: str
    counted: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    note: str = ""

    def expect(self, met: bool, otherwise: str) -> None:
        if not met:
            self.missed.append(otherwise)

    def row(self) -> tuple[str, str, str, str, str]:
        counted = ", ".join(f"{name} {value}" for name, value in self.counted.items())
        return self.scenario, self.load, counted, self.bar, self.note or ("MISSED" if self.missed else "met")


TABLE: list[Result] = []


def record(result: Result, *, sabotaged: str = "") -> Result:
    """Put the result into the table. A sabotaged project is meant to miss the bar."""
    if sabotaged:
        result.scenario += f" [without: {sabotaged}]"
        result.note = f"missed, as it must: {'; '.join(result.missed)}" if result.missed else "NOT NOTICED"
    TABLE.append(result)
    return result


# The project ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """A baked project, installed; copies of it share the .venv."""

    folder: Path
    venv: Path

    @functools.cached_property
    def slug(self) -> str:
        found = re.search(r'SERVICE_NAME = "(\w+)"', (self.folder / "app" / "defaults.py").read_text())
        assert found
        return found[1]

    @functools.cached_property
    def postgres(self) -> Path:
        """The programs of the Postgres that the project brings along."""
        command = [self.venv / "bin" / "python", "-c", "from scripts import postgres; print(postgres.wheel() / 'bin')"]
        return Path(subprocess.check_output(command, cwd=self.folder, text=True).strip())

    def copy(self, into: Path, patches: tuple[tuple[str, str, str], ...] = ()) -> "Project":
        """Make a copy that differs by the patches: (file, old, new), where the old text must be there exactly once."""
        folder = Path(tempfile.mkdtemp(prefix="copy-", dir=into)) / self.folder.name
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", "instance"))
        for name, old, new in patches:
            text = (folder / name).read_text()
            assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
            (folder / name).write_text(text.replace(old, new))
        return Project(folder, self.venv)

    def run(self, *command: str, env: Mapping[str, str], timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        program = [self.venv / "bin" / command[0], *command[1:]]
        return subprocess.run(
            program, cwd=self.folder, env={**CLEAN, **env}, capture_output=True, text=True, timeout=timeout, check=False
        )


CLEAN = {"PATH": os.environ["PATH"], "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}  # noqa: S108


def wait_for(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.02) -> Any:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if value := condition():
            return value
        time.sleep(pause)
    raise TimeoutError(f"after {seconds} seconds: no {what}")


def unprivileged() -> dict[str, Any]:
    """Drop root, with which Postgres and PgBouncer refuse to run."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def open_folder(prefix: str) -> Path:
    """Make a folder of the account that the servers run as. Its name is short, since sockets live in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    if account := unprivileged():
        os.chown(folder, account["user"], account["group"])
    folder.chmod(0o755)
    return folder


def end(process: "subprocess.Popen[Any]", *signals: signal.Signals, seconds: float = 60) -> None:
    for number in (*signals, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


# Postgres -------------------------------------------------------------------------------------------------------------


class Postgres:
    """A server of one's own on a port of 127.0.0.1, or in a network namespace, and on a socket for the superuser."""

    def __init__(
        self,
        programs: Path,
        max_connections: int = 100,
        settings: Mapping[str, str] | None = None,
        *,
        cluster: Path | None = None,
        standby_of: "Postgres | None" = None,
        tls: bool = False,
        namespace: str = "",
        host: str = "127.0.0.1",
    ) -> None:
        self.programs, self.host, self.port = programs, host, free_port()
        self.prefix = ["ip", "netns", "exec", namespace] if namespace else []
        self.folder = open_folder("pg-")
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.settings = {
            "max_connections": str(max_connections),
            "listen_addresses": host,
            "port": str(self.port),
            "fsync": "off",
            **(settings or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        if cluster is None:
            self._initialise()
        else:
            self._run("cp", "-r", "--reflink=auto", cluster, self.data)
        if standby_of:
            self._follow(standby_of)
        if tls:
            self._certify()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *command: str | Path) -> None:
        subprocess.run(command, **unprivileged(), cwd="/", capture_output=True, check=True)

    def _initialise(self) -> None:
        self._run(
            self.programs / "initdb", "-D", self.data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync",
            "--locale=C",
        )  # fmt: skip
        with (self.data / "pg_hba.conf").open("a") as hba:
            hba.write("host all all 10.0.0.0/8 trust\n")

    def _follow(self, primary: "Postgres") -> None:
        """Copy the files that the primary started from, which is as good as a base backup."""
        self.settings["primary_conninfo"] = f"host={primary.folder} port={primary.port} user=postgres"
        self._run("touch", self.data / "standby.signal")

    def _certify(self) -> None:
        self._run(
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-keyout", self.data / "server.key", "-out", self.data / "server.crt",
        )  # fmt: skip
        (self.data / "server.key").chmod(0o600)
        self.settings["ssl"] = "on"

    def start(self) -> None:
        options = [f"-c{name}={value}" for name, value in self.settings.items()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, self.programs / "postgres", "-D", self.data, "-k", self.folder, *options]
                if not self.prefix
                else [*self.prefix, "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
                      self.programs / "postgres", "-D", self.data, "-k", self.folder, *options],
                **({} if self.prefix else unprivileged()),
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            wait_for(self.accepts, GENEROUS, "Postgres", pause=0.01)
        except TimeoutError:
            self.stop()
            raise RuntimeError(self.log.read_text()[-2000:]) from None

    def accepts(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), self.superuser():
            return True
        return False

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT is a fast shutdown, SIGQUIT an immediate one."""
        if self.process:
            end(self.process, how, signal.SIGQUIT)
            self.process = None

    def superuser(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(
            host=str(self.folder),
            port=self.port,
            user="postgres",
            dbname="postgres",
            autocommit=True,
            connect_timeout=20,
        )

    def ask(self, query: str, *parameters: Any) -> list[Any]:
        with self.superuser() as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def backends(self) -> list[int]:
        return [row[0] for row in self.ask("select pid from pg_stat_activity where usename = %s", ROLE)]

    def terminate(self) -> int:
        """End every connection of the service, from the server's side."""
        return len(self.ask("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", ROLE))

    def url(self, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://{ROLE}@{self.host}:{self.port}/{DATABASE}" + (f"?{query}" if query else "")


class Clusters:
    """Makes servers. The first of each kind is initialised and migrated; the others are copies of its files."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.folder = open_folder("pc-")
        self.made: dict[Path, Path] = {}

    def __call__(self, max_connections: int = 100, *, debian: bool = False, **options: Any) -> Postgres:
        programs = DEBIAN_POSTGRES if debian else self.project.postgres
        if programs not in self.made:
            self.made[programs] = self._make(programs)
        return Postgres(programs, max_connections, cluster=self.made[programs], **options)

    def _make(self, programs: Path) -> Path:
        with Postgres(programs) as server:
            server.ask(f"create role {ROLE} login")
            server.ask(f"create database {DATABASE} owner {ROLE}")
            Copy(self.project, server.url()).migrate()
            server.stop()
            return server.data.rename(self.folder / f"cluster{len(self.made)}")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Sampler:
    """The service's connections, as the server counts them, every 20 ms, over a connection of its own."""

    def __init__(self, postgres: Postgres, service: str) -> None:
        self.postgres, self.service = postgres, service
        self.samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def peak(self) -> int:
        """Return the most since the last call."""
        samples, self.samples = self.samples, []
        return max(samples, default=0)

    def _run(self) -> None:
        count = "select count(*) from pg_stat_activity where usename = %s and application_name = %s"
        with self.postgres.superuser() as connection:
            while not self._stop.wait(0.02):
                row = connection.execute(count, (ROLE, self.service)).fetchone()
                self.samples.append(row[0] if row else 0)


# PgBouncer ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pgbouncer(postgres: Postgres, *, server_connections: int, clients: int = 200) -> Iterator[str]:
    """Run a PgBouncer in transaction mode in front of the server (auth_type "any" logs in as the user of the database
    line, so it names one); yield the URL of the service's database through it."""
    folder, port = open_folder("pb-"), free_port()
    (folder / "pgbouncer.ini").write_text(
        f"""[databases]
* = host={postgres.host} port={postgres.port} user={ROLE}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {server_connections}
max_client_conn = {clients}
logfile = {folder}/log
pidfile = {folder}/pid
"""
    )
    command = [shutil.which("pgbouncer") or "/usr/sbin/pgbouncer", "-q", folder / "pgbouncer.ini"]
    process = subprocess.Popen(
        command, **unprivileged(), cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(lambda: listens(port), GENEROUS, "PgBouncer")
        yield f"postgresql://{ROLE}@127.0.0.1:{port}/{DATABASE}"
    finally:
        end(process, signal.SIGINT)
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


# nginx ----------------------------------------------------------------------------------------------------------------


class Names:
    """A name server that knows one name: the addresses of all instances, as Docker's does."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                query, client = self.socket.recvfrom(512)
                question = query[12 : query.index(b"\0", 12) + 5]
                known = [*self.addresses] if question.endswith(b"\0\x01\0\x01") else []  # no IPv6 addresses
                head = query[:2] + b"\x81\x80\0\1" + bytes([0, len(known), 0, 0, 0, 0])
                answers = (b"\xc0\x0c\0\1\0\1\0\0\2\x58\0\4" + socket.inet_aton(address) for address in known)
                self.socket.sendto(head + question + b"".join(answers), client)


@dataclass(frozen=True)
class Proxy:
    port: int
    tls_port: int
    names: Names
    log: Path


@contextlib.contextmanager
def proxy(project: Project, port: int, *addresses: str, tls: Path | None = None) -> Iterator[Proxy]:
    """Run nginx with the files of deploy/nginx, where "app:8000" is this port on each of these addresses.

    :param tls: a folder with a certificate for the host localhost.
    """
    folder, http, https = open_folder("nx-"), free_port(), free_port()
    names = Names(*(addresses or ["127.0.0.1"]))
    changes = {
        "${NGINX_LOCAL_RESOLVERS}": f"127.0.0.1:{names.port}",
        "${TLS_HOST}": "localhost",
        "app:8000;": f"app.internal:{port};",
        "listen 80;": f"listen 127.0.0.1:{http} backlog=1024;",
        "listen 443 ssl;": f"listen 127.0.0.1:{https} ssl;",
        "/etc/letsencrypt/live": str(tls),
    }
    config = "".join((project.folder / "deploy" / "nginx" / f"{name}.conf.template").read_text()
                     for name in ("app", "https" if tls else "http"))  # fmt: skip
    for old, new in changes.items():
        config = config.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(  # as in the image
        f"worker_processes auto;\npid {folder}/pid;\nerror_log {folder}/log notice;\n"
        f"events {{ worker_connections 1024; }}\nhttp {{\naccess_log off;\n{temporary}{config}}}\n"
    )
    process = subprocess.Popen(
        ["nginx", "-g", "daemon off;", "-c", folder / "nginx.conf"], cwd="/", stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: listens(http) or process.poll() is not None, GENEROUS, "nginx")
        assert process.poll() is None, (folder / "log").read_text()
        yield Proxy(http, https, names, folder / "log")
    finally:
        end(process, signal.SIGTERM)
        names.socket.close()
        shutil.rmtree(folder, ignore_errors=True)


# gunicorn -------------------------------------------------------------------------------------------------------------


LOGS = tempfile.TemporaryDirectory(prefix="gunicorn-logs-")  # removed at the end, also those of starts that failed


class Copy:
    """One instance of the service: real gunicorn, production settings, and the routes of chaos_routes.py."""

    def __init__(
        self, project: Project, database_url: str, *arguments: str, module: str = "chaos_wsgi:app", **env: Any
    ) -> None:
        self.project = project
        self.port, self.probe_port = int(env.pop("PORT", 0) or free_port()), free_port()
        self.host = str(env.get("WEB_HOST", "127.0.0.1"))
        self.env = {
            "APP_ENV": "production",
            "SECRET_KEY": secrets.token_hex(32),
            "DATABASE_URL": database_url,
            "PORT": str(self.port),
            "WEB_PROBE_PORT": str(self.probe_port),
            "PYTHONPATH": str(HERE / "service"),
            **{name: str(value) for name, value in env.items() if value is not None},
        }
        self.command = [project.venv / "bin" / "gunicorn", *arguments, module]
        self.log = Path(LOGS.name) / f"{secrets.token_hex(8)}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.project.folder, env={**CLEAN, **self.env}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if wait:
            self.ready()

    def ready(self) -> None:
        """Wait until it serves."""
        try:
            wait_for(self.alive, GENEROUS, "gunicorn")
        except (TimeoutError, RuntimeError):
            self.stop()
            raise RuntimeError(self.text()[-3000:]) from None

    def alive(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(self.text()[-3000:])
        return listens(self.port, self.host) and len(self.workers()) > 0 and self.get("/livez").status == 200

    def stop(self, *signals: signal.Signals) -> None:
        """Stop it gracefully, and kill what is still there after that, the workers of a killed master included."""
        if self.process:
            group = self.process.pid  # it is a session of its own
            end(self.process, *(signals or (signal.SIGTERM, signal.SIGQUIT)), seconds=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def workers(self) -> list[int]:
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def plan(self) -> dict[str, int]:
        """Return the plan that gunicorn has logged."""
        pattern = r"plan: (\d+) instances? x (\d+) workers? x \((\d+) \+ (\d+)\) = (\d+) of (\d+)"
        found = wait_for(lambda: re.search(pattern, self.text()), GENEROUS, "plan in the log")
        names = ("instances", "workers", "pool", "overflow", "peak", "usable")
        return dict(zip(names, map(int, found.groups()), strict=True))

    def get(self, path: str, method: str = "GET", timeout: float = 30, **body: Any) -> "Answer":
        return fetch(self.port, path, method, timeout, body or None, host=self.host)

    def migrate(self) -> None:
        done = self.project.run("flask", "db", "upgrade", env=self.env)
        assert done.returncode == 0, done.stderr

    def metric(self, name: str) -> float:
        text = fetch(self.probe_port, "/metrics", host=self.host).body.decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line))


# Requests -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """`status` is None when there was none, and `error` then says why."""

    began: float
    seconds: float
    status: int | None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    path: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        return str(self.status) if self.status else self.error

    @property
    def ended(self) -> float:
        return self.began + self.seconds


def fetch(
    port: int,
    path: str,
    method: str = "GET",
    timeout: float = 30,
    body: Any = None,
    far: float = 0,
    host: str = "127.0.0.1",
) -> Answer:
    """Send one request over a connection of its own, sent `far` seconds after it was made."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.connect()
        time.sleep(far)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        content = response.read()
        took = time.monotonic() - began
        return Answer(began, took, response.status, content, {k.lower(): v for k, v in response.getheaders()}, "", path)
    except (OSError, http.client.HTTPException) as error:
        return Answer(began, time.monotonic() - began, None, error=type(error).__name__, path=path)
    finally:
        connection.close()


Request = tuple[str, str, bytes]  # method, path, body
Source = Callable[[int], Request]


def read(path: str) -> Source:
    return lambda number: ("GET", path, b"")


class Load:
    """Clients that send one request after the other, each over a new connection, in a thread of their own.

    It ends after `seconds`, after `requests`, or with :meth:`stop`, whichever comes first.
    """

    def __init__(
        self,
        ports: int | Callable[[], int],
        source: Source,
        *,
        clients: int,
        seconds: float = 3600,
        requests: int | None = None,
        timeout: float = 60,
    ) -> None:
        self.ports = ports if callable(ports) else lambda: ports
        self.source, self.clients, self.seconds, self.requests, self.timeout = (
            source,
            clients,
            seconds,
            requests,
            timeout,
        )
        self.answers: list[Answer] = []
        self._taken = 0
        self._over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.began = self.took = 0.0

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Self:
        self._over = True
        return self.wait()

    def wait(self) -> Self:
        self._thread.join()
        return self

    def run(self) -> Self:
        with self:
            return self.wait()

    def kinds(self) -> Counter[str]:
        return Counter(answer.kind for answer in self.answers)

    def good(self, since: float = 0, until: float = float("inf")) -> float:
        """Count good answers a second, of those that came in the time given, counted from the start."""
        until = min(until, self.took)
        inside = [a for a in self.answers if since <= a.ended - self.began < until and a.status in (200, 201)]
        return len(inside) / (until - since)

    def quantile(self, share: float) -> float:
        ordered = sorted(answer.seconds for answer in self.answers) or [0.0]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    async def _run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self.clients)))
        self.took = time.monotonic() - self.began

    async def _client(self) -> None:
        while not self._over and time.monotonic() - self.began < self.seconds:
            if self.requests is not None and self._taken >= self.requests:
                return
            number = self._taken
            self._taken += 1
            self.answers.append(await self._send(*self.source(number)))

    async def _send(self, method: str, path: str, body: bytes) -> Answer:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                status, content, headers = await self._exchange(method, path, body)
            return Answer(began, time.monotonic() - began, status, content, headers, "", path)
        except (OSError, asyncio.IncompleteReadError, ValueError, IndexError) as error:
            if isinstance(error, ConnectionRefusedError):
                await asyncio.sleep(0.1)  # nobody is there: do not spin
            return Answer(began, time.monotonic() - began, None, error=type(error).__name__, path=path)

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports())
        try:
            length = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) if body else b""
            writer.write(b"%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n%s" % (method.encode(), path.encode(), length, body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            return int(head[0].split()[1]), content, headers
        finally:
            writer.close()


class Held:
    """Requests that last until they are let go: what happens beside them does not depend on any speed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="held-"))
        self.env = {"CHAOS_HELD": str(self.folder), "WEB_TIMEOUT": 600}
        self.pool = ThreadPoolExecutor(64)
        self.answers: list[Future[Answer]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self.pool.shutdown()
        shutil.rmtree(self.folder)

    def send(self, copy: Copy, count: int, far: float = 0) -> None:
        """Send from far away: the bytes arrive a while after the connection."""
        self.answers += [
            self.pool.submit(fetch, copy.port, "/chaos/held", timeout=GENEROUS, far=far) for _ in range(count)
        ]

    def came(self) -> int:
        """Count those that have reached a view."""
        return len([*self.folder.glob("came-*")])

    def let_go(self) -> list[Answer]:
        (self.folder / "go").touch()
        return [answer.result() for answer in self.answers]


def missing(*programs: str | Path) -> str:
    """Say why a scenario cannot run here; nothing if it can."""
    absent = [str(program) for program in programs if not shutil.which(str(program))]
    return f"not installed: {', '.join(absent)}" if absent else ""
