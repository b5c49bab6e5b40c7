"""docs/providers.md: what it shows is run, with a stand-in where the provider's own service would be."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from baking import ROOT
from serving import CLEAN, POSTGRES, STOPPING_SECONDS, ask, free_port, run, served

HOST = "db.abc.eu-central-1.rds.amazonaws.com"
SECRET = "0123456789abcdef" * 4
# In the place of AWS: today's token is in a file, and who asked for one is written down.
BOTO3 = """
from pathlib import Path

HERE = Path(__file__).parent


class Client:
    def generate_db_auth_token(self, *asked):
        with (HERE / "asked.txt").open("a") as file:
            print(*asked, file=file)
        return (HERE / "token.txt").read_text()


def client(service):
    assert service == "rds"
    return Client()
"""


@pytest.fixture
def server(copy: Path, tmp_path: Path) -> Iterator[tuple[int, psycopg.Connection]]:
    """The port of a Postgres that asks for a password, and a superuser's connection to it by another way."""
    port = free_port()
    settings = f"settings={{'listen_addresses': '127.0.0.1', 'port': '{port}'}}"
    script = POSTGRES.replace("max_connections=int(sys.argv[3])", settings)
    assert settings in script
    with subprocess.Popen(
        [copy / ".venv" / "bin" / "python", "-c", script, tmp_path / "data", "my_service"],
        cwd=copy,
        env=CLEAN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        with psycopg.connect(url.replace("//app@", "//postgres@"), autocommit=True) as connection:
            connection.execute("alter system set fsync = off")
            ((rules,),) = connection.execute("show hba_file").fetchall()
            Path(rules).write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
            connection.execute("select pg_reload_conf()")
            yield port, connection
        process.communicate(timeout=STOPPING_SECONDS * 3)


def test_iam_tokens(copy: Path, server: tuple[int, psycopg.Connection]):
    """With the block in app/extensions.py, migrations, `flask pool check` and the service get in with the token of the
    moment. After it has changed, open connections go on, and new ones are opened with the next one."""
    port, superuser = server
    text = (ROOT / "docs" / "providers.md").read_text()
    ((block),) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    extensions = copy / "app" / "extensions.py"
    extensions.write_text(f"{extensions.read_text()}\n\n{block}")
    (copy / "boto3.py").write_text(BOTO3)

    def token(value: str) -> None:
        superuser.execute(f"alter role app password '{value}'")
        (copy / "token.txt").write_text(value)

    token("first")
    url = f"postgresql://app@{HOST}:{port}/my_service?hostaddr=127.0.0.1"
    environ = {"DATABASE_URL": url, "SECRET_KEY": SECRET, "APP_ENV": "production"}
    for command in ("db upgrade", "pool check"):
        done = run(f".venv/bin/python -m flask {command}", copy, **environ)
        assert done.returncode == 0, done.stdout
    with served("exec .venv/bin/python -m gunicorn", copy, free_port(), **environ) as address:
        assert ask(address, "/api/notes", "POST", title="Bread")[0] == 201
        token("second")
        assert ask(address, "/api/notes")[0] == 200
        ended = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'"
        assert superuser.execute(ended).fetchall()
        assert ask(address, "/api/notes")[1]["items"][0]["title"] == "Bread"
    assert set((copy / "asked.txt").read_text().splitlines()) == {f"{HOST} {port} app"}
