"""The Dockerfile and the compose file, followed by hand: what they say is done in a folder, without a container engine.

What is left to an engine is that it has the base images, and that it takes these files as they are meant.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import psycopg
import pytest
import yaml
from baking import files
from chaos.harness import Project, proxy
from serving import STARTING_SECONDS, STOPPING_SECONDS, ask, free_port, postgres, use

UV = Path(sys.executable).parent / "uv"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Read the instructions of a Dockerfile: comments left out, continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in lines) if keyword]


def is_sent(name: str, ignored: list[str]) -> bool:
    """Return whether a file is part of the build's context: the last line of .dockerignore that matches decides."""
    sent = True
    for line in ignored:
        pattern = line.removeprefix("!")
        parts = Path(name).parts
        anywhere = pattern.startswith("**/") and any(fnmatch(part, pattern.removeprefix("**/")) for part in parts)
        if anywhere or pattern in {"*", name, parts[0]}:
            sent = line.startswith("!")
    return sent


@dataclass
class Image:
    """The image that the Dockerfile makes. Paths are as in a container, but below `root`."""

    root: Path
    environ: dict[str, str]
    last: dict[str, str]  # what each instruction said last


@pytest.fixture(scope="module")
def image(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("image")
    context, builder, root = folder / "context", folder / "builder", folder / "root"
    ignored = [line for line in (installed / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    for name in files(installed):
        if is_sent(name, ignored):
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed / name, context / name)

    # The base image: a Python with pip.
    subprocess.run([UV, "venv", "--quiet", "--seed", "--python", sys.executable, folder / "python"], check=True)
    environ = {"PATH": f"{folder}/python/bin:{os.environ['PATH']}"}
    workdir = root
    said = instructions(installed / "Dockerfile")
    for keyword, rest in said:
        match keyword:
            case "FROM":
                if root.exists() and list(root.iterdir()):
                    root.rename(builder)
                root.mkdir(exist_ok=True)
            case "WORKDIR":
                workdir = root / rest.removeprefix("/")
                workdir.mkdir(exist_ok=True)
            case "COPY":
                *sources, target = rest.removeprefix("--from=builder ").split()
                origin = builder if rest.startswith("--from") else context
                for source in sources:
                    found = origin / source.removeprefix("/")
                    place = root / target.removeprefix("/") if target.startswith("/") else workdir / target
                    if found.is_dir():
                        shutil.copytree(found, place, symlinks=True)
                    else:
                        place.mkdir(exist_ok=True)
                        shutil.copy2(found, place)
            case "RUN":
                command = rest.replace("/venv", f"{root}/venv")
                subprocess.run(["sh", "-ec", command], cwd=workdir, env=environ, check=True, timeout=600)
            case "ENV":
                settings = dict(setting.split("=", 1) for setting in shlex.split(rest))
                settings["PATH"] = settings["PATH"].replace("/venv", f"{root}/venv").replace("$PATH", environ["PATH"])
                environ |= settings
    shutil.rmtree(builder)
    shutil.rmtree(context)
    return Image(root, environ, dict(said))


@pytest.fixture(scope="module")
def compose(installed: Path) -> dict:
    """The compose file with its own defaults, and with the secrets that it asks for."""
    text = (installed / "compose.yaml").read_text()
    made = {name: secrets.token_hex(32) for name in re.findall(r"\$\{(\w+):\?", text)}
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: made[match[1]], text)
    text = re.sub(r"\$\{\w+:\+[^}]*\}", "", text)
    for _ in range(2):  # one may be the default of another
        text = re.sub(r"\$\{\w+:-([^${}]*)\}", r"\1", text)
    return yaml.safe_load(text)


def test_only_what_runs_is_in_the_image(image: Image):
    """The app, its migrations and what they need, with their bytecode; no tests, no .env, no pip."""
    srv, packages = image.root / "srv", next(image.root.glob("venv/lib/python*/site-packages"))
    assert {path.name for path in image.root.iterdir()} == {"srv", "venv"}
    assert {path.name for path in srv.iterdir()} == {
        "__pycache__",
        "app",
        "gunicorn.conf.py",
        "migrations",
        "flask_pooling",
        "requirements",
        "wsgi.py",
    }
    assert [path.name for path in (srv / "requirements").iterdir()] == ["prod.txt"]
    assert not (packages / "pip").exists()
    for folder in (srv / "app", srv / "flask_pooling", srv / "migrations" / "versions", packages / "flask"):
        compiled = {path.name.partition(".")[0] for path in (folder / "__pycache__").iterdir()}
        assert compiled == {path.stem for path in folder.glob("*.py")}


def test_runs_as_an_ordinary_user(image: Image):
    """By number and not as root; ended by the signal that lets gunicorn finish; without a shell that stays."""
    assert all(int(number) >= 1000 for number in image.last["USER"].split(":"))
    assert image.last["STOPSIGNAL"] == "SIGTERM"
    assert image.last["CMD"].endswith('; exec gunicorn"]')


def test_one_service_builds(compose: dict):
    """One service builds the image, since two that build the same at the same time fail; migrations come first."""
    services = compose["services"]
    assert [name for name, service in services.items() if "build" in service] == ["app"]
    assert services["migrate"]["image"] == services["app"]["image"]
    assert services["migrate"]["depends_on"] == {
        "db": {"condition": "service_healthy"},
        "pgbouncer": {"condition": "service_started", "required": False},  # in its profile only
    }
    assert services["app"]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}


def test_ports(image: Image, compose: dict):
    """The ports of the image and of compose agree. Only nginx is published, and passes requests on to them."""
    services = compose["services"]
    environ = services["app"]["environment"]
    for name in ("WEB_HOST", "PORT", "WEB_PROBE_PORT"):
        assert str(environ[name]) == image.environ[name]
    assert image.last["EXPOSE"].split() == [image.environ["PORT"], image.environ["WEB_PROBE_PORT"]]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.pop("proxy") == ["80:80", "443:443"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert environ["WEB_TRUSTED_PROXIES"] == 1


def test_mounts_of_the_proxy(compose: dict, installed: Path):
    """The files that compose mounts into nginx are there; with TLS_HOST it is the other server's file."""
    found = {volume.partition(":")[0] for volume in compose["services"]["proxy"]["volumes"] if volume.startswith(".")}
    assert found == {"./deploy/nginx/app.conf.template", "./deploy/nginx/http.conf.template"}
    assert "/http${TLS_HOST:+s}.conf.template:" in (installed / "compose.yaml").read_text()
    for name in (*found, "deploy/nginx/https.conf.template"):
        assert (installed / name).is_file()
    named = {
        volume.partition(":")[0] for service in compose["services"].values() for volume in service.get("volumes", ())
    }
    assert {name for name in named if not name.startswith(".")} == compose["volumes"].keys()


def make_role(sockets: str, script: str) -> None:
    """Do what Postgres's image does with a script on its first start: run it as the superuser."""
    with psycopg.connect(host=sockets, user="postgres", dbname="postgres", autocommit=True) as superuser:
        superuser.execute("DROP ROLE app")  # the project's own way to make one
        for statement in filter(str.strip, script.split(";")):
            superuser.execute(statement)


def test_as_compose_starts_it(installed: Path, image: Image, compose: dict, tmp_path: Path):
    """Role and database are made, migrated, and served from what is in the image, which nothing writes to, also through
    nginx. It is healthy, without the database it is not, and SIGTERM ends it."""
    app, migrate, srv = compose["services"]["app"], compose["services"]["migrate"], image.root / "srv"
    before, port = files(image.root), free_port()
    health_check = json.loads(re.search(r'CMD \["(python)"(, .*\])', image.last["HEALTHCHECK"]).expand(r'["\1"\2'))

    with contextlib.ExitStack() as database:
        url = database.enter_context(postgres(installed, tmp_path / "data", "postgres"))
        sockets = url.partition("?host=")[2]
        make_role(sockets, compose["configs"]["role"]["content"])
        given = {name: "" if value is None else str(value) for name, value in app["environment"].items()}
        assert "@db/my_service" in given["DATABASE_URL"]
        given["DATABASE_URL"] = given["DATABASE_URL"].replace("@db/my_service", f"@/my_service?host={sockets}")
        admin = migrate["environment"]["DATABASE_ADMIN_URL"].replace("@db/my_service", f"@/my_service?host={sockets}")
        environ = image.environ | given | {"WEB_HOST": "127.0.0.1", "PORT": str(port), "WEB_PROBE_PORT": ""}
        environ |= {"WEB_CONCURRENCY": "", "WEB_THREADS": ""}

        def healthy() -> int:
            result = subprocess.run(health_check, cwd=srv, env=environ, capture_output=True, timeout=30, check=False)
            return result.returncode

        assert healthy() == 1
        with_admin = environ | {"DATABASE_ADMIN_URL": admin}
        subprocess.run(migrate["command"], cwd=srv, env=with_admin, check=True, timeout=60)
        with psycopg.connect(host=sockets, user="postgres", dbname="postgres") as superuser:
            limit = superuser.execute("select rolconnlimit from pg_roles where rolname = 'app'").fetchone()
        assert limit
        assert 0 < limit[0] < 100
        log = tmp_path / "log"
        with log.open("w") as output:
            service = subprocess.Popen(json.loads(image.last["CMD"]), cwd=srv, env=environ, stderr=output)
        try:
            deadline = time.monotonic() + STARTING_SECONDS
            while healthy():
                assert service.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
            use(f"http://127.0.0.1:{port}", metrics=404)
            with proxy(Project(installed, installed / ".venv"), port) as nginx:
                use(f"http://127.0.0.1:{nginx.port}", metrics=404)
            assert ask(f"http://127.0.0.1:{port + 1}", "/readyz")[0] == 200
            assert healthy() == 0
            database.close()
            while not healthy():  # for a second, a connection that came back is proof enough
                assert time.monotonic() < deadline, log.read_text()
            service.terminate()
            assert service.wait(STOPPING_SECONDS) == 0, log.read_text()
        finally:
            service.kill()
            service.wait()
    assert files(image.root) == before
