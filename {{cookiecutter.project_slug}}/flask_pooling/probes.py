"""/livez, /readyz, /metrics and /pool on a listener of their own, served by a thread in each worker.

On the service's own port a probe queues behind the requests that wait for a thread. Under load that takes seconds, and
an orchestrator would restart instances because they are busy. On this port only other probes queue.
"""

import socket
import threading
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import WSGIApplication

PRIVATE = "flask_pooling.private"  # in the environ of a request that came by this port
BACKLOG = 64
CLIENT_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that all workers accept on: in the master, before the workers are forked.

    :raises OSError: the address is in use, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dual = host == "::" and socket.has_dualstack_ipv6()  # as gunicorn's: `::` is IPv4, too
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    listener.setblocking(False)  # all workers wake up for a probe, one gets it, and the others must not block
    return listener


def serve(listener: socket.socket, app: WSGIApplication) -> None:
    """Answer probes in a thread of this worker, for as long as the worker lives."""
    server = ProbeServer(listener.getsockname()[:2], Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.setup_environ()
    server.set_app(app)
    threading.Thread(target=server.serve_forever, name="probes", daemon=True).start()


class ProbeServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    server_name = ""  # WSGIServer looks the host up by name, which can take seconds
    server_port = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing when a client goes away."""


class Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def get_environ(self) -> dict[str, Any]:
        return super().get_environ() | {PRIVATE: True}

    def log_message(self, format: str, *args: Any) -> None:  # the name is the standard library's
        """Log nothing: a probe every few seconds would fill the log."""
