"""Call a WSGI app in this process, without a web server: `python loop.py MODULE:APP WORKLOAD`.

It makes as many calls as each line on its input says and answers with the CPU seconds that they took, so that
several of these can take turns.
"""

import importlib
import io
import sys
import time
from pathlib import Path

BODY = b'{"title":"A note that was written","body":"%s"}' % (b"word " * 40)
PATHS = {"read": "/api/notes/7", "page": "/api/notes", "write": "/api/notes", "slow": "/slow", "livez": "/livez"}


def caller(app, workload):
    environ = {
        "REQUEST_METHOD": "POST" if workload == "write" else "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": PATHS[workload],
        "QUERY_STRING": "limit=20" if workload == "page" else "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "127.0.0.1:8000",
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    if workload == "write":
        environ |= {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(BODY))}
    status = ""

    def start_response(given, headers, exc_info=None):
        nonlocal status
        status = given

    def call():
        body = app(environ | {"wsgi.input": io.BytesIO(BODY)}, start_response)
        answer = b"".join(body)
        if hasattr(body, "close"):
            body.close()
        if status[0] != "2":
            raise RuntimeError(f"{status} {answer[:500]!r}")

    return call


def main(spec, workload):
    sys.path.insert(0, str(Path.cwd()))
    module, _, name = spec.partition(":")
    app = getattr(importlib.import_module(module), name.removesuffix("()"))
    call = caller(app() if name.endswith("()") else app, workload)
    for line in sys.stdin:
        before = time.process_time()
        for _ in range(int(line)):
            call()
        print(time.process_time() - before, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
