"""nginx with the files of deploy/nginx, in front of a server that says what reaches it."""

import contextlib
import http.client
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chaos.harness import Project, Proxy, proxy, wait_for
from serving import free_port, served

INSTANCES = ("127.0.0.2", "127.0.0.3")
LARGEST = 1024 * 1024


class Instance(BaseHTTPRequestHandler):
    """Answers with what it was sent."""

    seen: list[str]
    heard = threading.Semaphore(0)

    def do_GET(self) -> None:
        if self.path == "/stream":
            self.send_response(200)
            self.send_header("X-Accel-Buffering", "no")
            self.end_headers()
            for _ in range(3):
                self.wfile.write(b"line\n")
                if not self.heard.acquire(timeout=60):
                    self.seen.append("a line was kept back")
        elif self.path == "/large":
            self.answer(bytes(8 * LARGEST))
        elif self.path == "/breaks":
            self.seen.append(f"{self.command} {self.server.server_address[0]}")
            self.close_connection = True  # without an answer, as one that is stopped meanwhile
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            sent = {name.lower(): value for name, value in self.headers.items()}
            what = {"headers": sent, "path": self.path, "body": len(body), "instance": self.server.server_address[0]}
            self.answer(json.dumps(what).encode())

    do_POST = do_GET  # noqa: N815  # the standard library's name

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
        self.seen.append(f"{self.command} {self.path}")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def instances(port: int, *addresses: str) -> Iterator[list[str]]:
    """Run two instances, which note what they have seen."""
    seen: list[str] = []
    handler = type("Handler", (Instance,), {"seen": seen})
    with contextlib.ExitStack() as stack:
        for address in addresses:
            server = stack.enter_context(ThreadingHTTPServer((address, port), handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
        yield seen


@pytest.fixture(scope="module")
def shipped(project: Path) -> Project:
    return Project(project, project)


@pytest.fixture
def behind(shipped: Project) -> Iterator[tuple[Proxy, list[str]]]:
    port = free_port()
    with instances(port, *INSTANCES) as seen, proxy(shipped, port, *INSTANCES) as nginx:
        yield nginx, seen


def ask(nginx: Proxy, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=120)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_what_the_service_believes(behind: tuple[Proxy, list[str]]) -> None:
    """A client can forge none of it: of X-Forwarded-For and -Proto the last words count, and nginx adds those. With
    a load balancer in front of nginx the last but one are its."""
    forged = {"X_Forwarded_For": "6.6.6.6", "X_Forwarded_Proto": "https", "X_Forwarded_Prefix": "/evil"}
    gone = {"X_Forwarded_Host": "evil.example", "X_Forwarded_Port": "666", "Forwarded": "host=evil.example"}
    answer = json.loads(ask(behind[0], "/a%2Fb?c=%20", Host="notes.example.org", **forged, **gone)[1])
    headers = answer["headers"]
    assert answer["path"] == "/a%2Fb?c=%20"
    assert headers["host"] == "notes.example.org"
    assert headers["x-forwarded-for"] == "6.6.6.6, 127.0.0.1"
    assert headers["x-forwarded-proto"] == "https, http"
    assert json.loads(ask(behind[0], "/")[1])["headers"]["x-forwarded-proto"] == "http"
    assert not {"x-forwarded-prefix", *(name.lower().replace("_", "-") for name in gone)} & headers.keys()


def test_the_largest_body(behind: tuple[Proxy, list[str]], project: Path) -> None:
    """nginx takes the bodies that the app takes; a larger one does not reach the app."""
    assert 'MAX_CONTENT_LENGTH": 1024 * 1024' in (project / "app" / "config.py").read_text()
    assert json.loads(ask(behind[0], "/", "POST", bytes(LARGEST))[1])["body"] == LARGEST
    with contextlib.suppress(ConnectionError):  # it need not read the rest
        assert ask(behind[0], "/", "POST", bytes(LARGEST + 1))[0] == 413
    assert behind[1] == ["POST /"]


def test_a_slow_body_is_passed_on_whole(behind: tuple[Proxy, list[str]]) -> None:
    """An instance sees nothing of a request whose body is still coming."""
    with socket.create_connection(("127.0.0.1", behind[0].port), timeout=120) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        time.sleep(0.5)
        assert behind[1] == []
        client.sendall(b"67890")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    give_up = time.monotonic() + 120
    while not behind[1] and time.monotonic() < give_up:  # it is noted after the answer
        time.sleep(0.02)
    assert behind[1] == ["POST /"]


def test_a_slow_reader_holds_no_instance(behind: tuple[Proxy, list[str]]) -> None:
    """The instance has sent 8 MiB before the client has read them."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", behind[0].port))
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + 120
        while behind[1] != ["GET /large"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_stream_is_passed_on_as_it_comes(behind: tuple[Proxy, list[str]]) -> None:
    """With the header that says so. The instance sends the next line when the client has the one before."""
    lines = 0
    with socket.create_connection(("127.0.0.1", behind[0].port), timeout=120) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while part := client.recv(65536):
            for _ in range(part.count(b"line")):
                lines += 1
                Instance.heard.release()
    assert lines == 3
    assert behind[1] == []


def test_an_instance_that_is_gone(shipped: Project) -> None:
    """Nobody notices, whatever the method: it has seen nothing of the request. A new one is found."""
    port = free_port()
    with instances(port, INSTANCES[0]), proxy(shipped, port, *INSTANCES) as nginx:
        for method in ("GET", "POST") * 10:
            assert ask(nginx, "/", method)[0] == 200
        with instances(port, "127.0.0.4"):
            nginx.names.addresses[:] = ["127.0.0.4"]
            wait_for(lambda: json.loads(ask(nginx, "/")[1])["instance"] == "127.0.0.4", 120, "new instance")
            assert {json.loads(ask(nginx, "/")[1])["instance"] for _ in range(10)} == {"127.0.0.4"}


def test_what_may_have_been_done_is_not_done_again(behind: tuple[Proxy, list[str]]) -> None:
    """A read that broke off is sent to the other instance; a write is not."""
    nginx, seen = behind
    assert ask(nginx, "/breaks", "POST", b"x")[0] == 502
    assert len(seen) == 1
    seen.clear()
    assert ask(nginx, "/breaks")[0] == 502
    assert sorted(seen) == [f"GET {address}" for address in INSTANCES]


def test_tls_by_a_host_name(shipped: Project, tmp_path: Path) -> None:
    """With a host name there is HTTPS, and HTTP leads there, but for certbot's question."""
    folder, port = tmp_path / "localhost", free_port()
    folder.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
    with instances(port, "127.0.0.1"), proxy(shipped, port, tls=tmp_path) as nginx:
        with contextlib.closing(
            http.client.HTTPSConnection("localhost", nginx.tls_port, timeout=120, context=context)
        ) as connection:
            connection.request("GET", "/", headers={"X-Forwarded-Proto": "http"})
            answer = connection.getresponse()
            assert json.loads(answer.read())["headers"]["x-forwarded-proto"] == "http, https"
            assert answer.getheader("Strict-Transport-Security") == "max-age=31536000"
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=120)) as connection:
            connection.request("GET", "/a?b=c")
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Location")) == (301, "https://localhost/a?b=c")
            answer.read()
            connection.request("GET", "/.well-known/acme-challenge/x")
            assert connection.getresponse().status == 404


def test_under_a_path(installed: Path, tmp_path: Path) -> None:
    """As the comment in app.conf.template says: links and `Location` of the app begin with the path."""
    project = Project(installed, installed / ".venv").copy(
        tmp_path,
        (
            ("deploy/nginx/app.conf.template", 'X-Forwarded-Prefix "";', 'X-Forwarded-Prefix "/svc";'),
            ("deploy/nginx/http.conf.template", "location / {", "location /svc/ {"),
            ("deploy/nginx/http.conf.template", "proxy_pass", "rewrite ^/svc(/.*)$ $1 break; proxy_pass"),
        ),
    )
    (project.folder / ".venv").symlink_to(installed / ".venv")
    port = free_port()
    with served("make run", project.folder, port, WEB_TRUSTED_PROXIES="1"), proxy(project, port) as nginx:
        links = json.loads(ask(nginx, "/svc/")[1])["links"]
        assert links["notes"] == "/svc/api/notes"
        assert ask(nginx, links["notes"])[0] == 200
        assert b'href="/svc/static/style.css"' in ask(nginx, "/svc/", Accept="text/html")[1]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=120)) as connection:
            connection.request("POST", links["notes"], b'{"title": "Bread"}', {"Content-Type": "application/json"})
            answer = connection.getresponse()
            note = json.loads(answer.read())
            assert (answer.status, answer.getheader("Location")) == (201, f"/svc/api/notes/{note['id']}")


def test_only_these_variables(project: Path) -> None:
    """The image of nginx puts variables of its environment in: these are what the files need."""
    text = "".join(path.read_text() for path in (project / "deploy" / "nginx").iterdir())
    assert set(re.findall(r"\$\{(\w+)\}", text)) == {"NGINX_LOCAL_RESOLVERS", "TLS_HOST"}
    compose = (project / "compose.yaml").read_text()
    assert "NGINX_ENTRYPOINT_LOCAL_RESOLVERS: " in compose
    assert "TLS_HOST: ${TLS_HOST:-}\n" in compose
