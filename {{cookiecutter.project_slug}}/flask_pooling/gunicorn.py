"""gunicorn's hooks: they hold the server to the plan, number the workers, and keep probes and metrics going.

gunicorn.conf.py makes one :class:`Hooks` and hands its methods to gunicorn, each under gunicorn's own name.
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import gc
import itertools
import logging
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from flask_pooling import budget, metrics, middleware, probes, watchdog
from flask_pooling.engine import WEB, empty_pools, engine_options
from flask_pooling.settings import Settings, SettingsError

log = logging.getLogger(__name__)

ENDED = re.compile("Worker .* was sent SIG(INT|QUIT)")
LAST_WORDS_SECONDS = 0.5
ASK_AGAIN_SECONDS = 2
DRAIN_SECONDS = 5  # WEB_GRACEFUL_TIMEOUT begins after it
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # Linux's, made for this
# The signals that would start more workers beside those that run, each with its pool.
REFUSED = {
    signal.SIGHUP: "HUP is ignored: it would start new workers beside the old ones",
    signal.SIGUSR2: "USR2 is ignored: it would start a second server beside this one",
    signal.SIGTTIN: "TTIN is ignored: it would start one more worker",
}


def shared_memory() -> str | None:
    """A folder in memory, where there is one: a heartbeat or a metric that waits for a slow disk stalls a worker."""
    return str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None


class Hooks:
    """What gunicorn has to do besides serving.

    :param url: the database's URL, for the check that the plan fits; None: it is not asked.
    :param fixed: gunicorn's settings that come from the plan, and the variable that changes each on both sides of the
        sum. What gunicorn's command line says instead is refused.
    :param reload: gunicorn reloads the code when it changes; then it serves one developer.
    """

    def __init__(
        self, settings: Settings, url: URL | None, *, fixed: Mapping[str, tuple[Any, str]], reload: bool = False
    ) -> None:
        self.settings, self.url, self.fixed, self.reload = settings, url, fixed, reload
        self.sockets_are_inherited = "LISTEN_FDS" in os.environ  # systemd's; gunicorn takes the variable out
        self.listener: socket.socket | None = None
        self.database_was_away = False  # at the start
        self.slots: set[int] = set()
        self.folder: Path | None = None
        try:
            engine_options(settings, url or "sqlite://", process=WEB)
        except SettingsError as error:  # PGOPTIONS; anything else was found before
            sys.exit(str(error))
        middleware.started_by_hooks()
        if (given := os.environ.get(metrics.DIRECTORY)) is not None:
            if not os.path.isdir(given):
                sys.exit(f"{metrics.DIRECTORY}={given!r}: is not a folder; make it, or do not set the variable")
            for left in Path(given).glob("gauge_live*.db"):  # of a master that was killed
                left.unlink()
            metrics.keep_in(Path(given))
        else:
            name = f"metrics-{settings.service_name}-"
            _remove_leftovers(name)
            self.folder = _folder_of_ours(name)
            metrics.keep_in(self.folder)
            self.owner = os.getpid()
            atexit.register(self._remove_the_folder)  # a start that is refused has no on_exit

    # --- in the master -----------------------------------------------------------------------------------------------

    def on_starting(self, server: Any) -> None:
        """The last look before anything is served: is gunicorn what was planned, and does the plan fit the database?"""
        for name, (planned, variable) in self.fixed.items():
            given = server.cfg.settings[name].get()
            if given != planned:
                sys.exit(f"--{name.replace('_', '-')} {given}: the plan says {planned}; set {variable}={given} instead")
        if not self.reload:
            self._refuse_another_app(server)
        self._refuse_a_port_in_use(server)
        empty_pools(close=True)  # a factory that asks the database would leave a connection here, beside the workers'
        self._check_the_budget(server)
        if self.settings.probe_port:
            self.listener = probes.listen(self.settings.web_host, self.settings.probe_port)
        self.owner = os.getpid()  # a daemon has another id than what read gunicorn.conf.py
        if self.folder and os.geteuid() == 0:  # workers of another user write there
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, server.cfg.uid, server.cfg.gid)

    def when_ready(self, server: Any) -> None:
        """Refuse the signals that break the plan, and freeze the objects that all workers share: if the garbage
        collector touched them, each worker would have a copy of that memory."""
        end_workers_that_only_start()
        for number, why in REFUSED.items():
            signal.signal(number, _refuse(server, why))
        by_fd = any(isinstance(address, int) for address in server.cfg.address)  # fd://3
        if not (self.reload or self.sockets_are_inherited or by_fd):  # those are open for the next start as well
            drain_on_term(server)
        if self.reload:  # a closed terminal ends what was started in it
            signal.signal(signal.SIGHUP, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        gc.collect()
        gc.freeze()
        log.info("plan: %s", self.settings.plan.sum)
        probed = f", probes and metrics on port {self.settings.probe_port}" if self.settings.probe_port else ""
        where = ", ".join(_url(address) for address in server.cfg.address)
        log.info("%s serves on %s%s; Ctrl-C stops it", self.settings.service_name, where, probed)

    def pre_fork(self, server: Any, worker: Any) -> None:
        """Number the worker, so that its metrics go where its predecessor's went."""
        worker.slot = next(number for number in itertools.count(1) if number not in self.slots)
        self.slots.add(worker.slot)

    def child_exit(self, server: Any, worker: Any) -> None:
        self.slots.discard(worker.slot)
        metrics.leave_slot(worker.slot)
        if worker.aborted:  # gunicorn's note that the worker was ended since it did not beat
            metrics.metrics().workers_replaced.inc()

    def on_exit(self, server: Any) -> None:
        self._remove_the_folder()

    def _remove_the_folder(self) -> None:
        if self.folder and self.owner == os.getpid():  # and not in a worker, which inherits this
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- in a worker -------------------------------------------------------------------------------------------------

    def post_fork(self, server: Any, worker: Any) -> None:
        """The pools empty themselves after any fork (engine.py); here it is the metrics."""
        metrics.take_slot(worker.slot)

    def post_worker_init(self, worker: Any) -> None:
        finish_on_ctrl_c()
        counted = metrics.metrics()
        counted.announce(self.settings)
        counted.sampled[counted.slots_busy] = lambda: len(watchdog.in_flight)
        counted.sampled[counted.slots_over_limit] = lambda: len(watchdog.past())
        counted.sampled[counted.backlog] = lambda: _backlog(worker.sockets)
        watchdog.watch(worker, self.settings.web_timeout, replace=not self.reload, tick=counted.sample)
        if self.listener:
            app = getattr(worker.wsgi, "app", worker.wsgi)  # in development it may be reload.Reloaded
            extensions = getattr(app, "extensions", {})
            probes.serve(
                self.listener, extensions["flask_pooling"].probe_app if "flask_pooling" in extensions else worker.wsgi
            )
        worker.wsgi = middleware.Watched(worker.wsgi)  # what gunicorn calls for each request
        if self.database_was_away and worker.slot == 1:  # one of them is enough
            threading.Thread(target=self._ask_again, args=(self.url,), name="budget", daemon=True).start()

    def worker_exit(self, server: Any, worker: Any) -> None:
        """A worker that ends at max_requests, or at a stop, gives its requests WEB_GRACEFUL_TIMEOUT. Python would wait
        longer for its threads, and gunicorn would take it for a worker that hangs."""
        if watchdog.in_flight:
            logging.shutdown()
            os._exit(0)

    def worker_abort(self, worker: Any) -> None:
        """gunicorn replaces this worker, which has not beaten for WEB_TIMEOUT. An ordinary exit would wait for the
        threads that hang, until gunicorn kills the worker and logs a guess about memory."""
        # In a thread, since this has interrupted somebody who may hold the log's lock.
        last_words = threading.Thread(target=watchdog.report, daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_SECONDS)
        os._exit(1)

    # --- refusals ----------------------------------------------------------------------------------------------------

    def _refuse_another_app(self, server: Any) -> None:
        """`gunicorn wsgi:app` loads an app that was not told that it is in a web worker, and so has no pool."""
        extensions = getattr(server.app.wsgi(), "extensions", {})
        if "flask_pooling" in extensions and extensions["flask_pooling"].process != WEB:
            sys.exit(
                "the app that gunicorn was given was not made for web workers: start `gunicorn` without naming an app;"
                f" gunicorn.conf.py names {server.cfg.wsgi_app}"
            )

    def _refuse_a_port_in_use(self, server: Any) -> None:
        """gunicorn would retry for five seconds and then say "Can't connect"."""
        wanted = []
        if not self.sockets_are_inherited:
            wanted = [(address, "PORT") for address in server.cfg.address if isinstance(address, tuple)]
        if self.settings.probe_port:
            wanted.append(((self.settings.web_host, self.settings.probe_port), "WEB_PROBE_PORT"))
        for (host, port), variable in wanted:
            try:
                probes.bind(host, port).close()  # if it listened, clients of a starting service could connect in vain
            except OSError as error:
                place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                if error.errno == errno.EADDRINUSE:
                    sys.exit(f"{place} is in use; set {variable} to a free port")
                reason = str(error.strerror).partition(" (while")[0]
                sys.exit(f"cannot listen on {place}: {reason}; set WEB_HOST or {variable}")

    def _check_the_budget(self, server: Any) -> None:
        mode = self.settings.db_budget_check
        if mode == "off" or self.url is None or self.url.get_backend_name() != "postgresql":
            return
        try:
            verdict = budget.judge(self.settings.plan, budget.ask(self.settings, self.url), starting=True)
        except SQLAlchemyError as error:
            reason = budget.driver_message(error)
            if budget.is_full(reason) and mode == "enforce":
                sys.exit(f"the database has no connection left to ask with; close some that others hold: {reason}")
            # It may come up later, and readiness stays red until it does. This proves nothing about the plan.
            server.log.warning("the database cannot be asked whether the plan fits: %s; it is asked again", reason)
            self.database_was_away = True
            return
        for warning in verdict.warnings:
            server.log.warning("%s", warning)
        if verdict.problems and mode == "enforce":
            sys.exit("\n".join(("the plan does not fit the database:", *verdict.problems)))
        for problem in verdict.problems:
            server.log.warning("%s", problem)


    def _ask_again(self, url: URL) -> None:
        """Until the database is back. Then a plan that does not fit is an error in the log, since what serves is not
        ended."""
        while True:
            time.sleep(ASK_AGAIN_SECONDS)
            with contextlib.suppress(SQLAlchemyError):
                verdict = budget.judge(self.settings.plan, budget.ask(self.settings, url))
                break
        level = logging.ERROR if verdict.problems else logging.WARNING if verdict.warnings else logging.INFO
        log.log(level, "the database is back: %s", "; ".join((verdict.words, *verdict.problems, *verdict.warnings)))


def end_workers_that_only_start() -> None:
    """Call it in the master. Until a new worker has set handlers of its own it has the master's, which only queue a
    signal. It would then serve on until the master kills it, WEB_GRACEFUL_TIMEOUT later. So it gets the default
    handlers at the fork, and ends at once; a signal waits while the process is forked."""
    master, numbers = os.getpid(), (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

    def block() -> None:
        if os.getpid() == master:
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def unblock() -> None:
        if os.getpid() == master:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def unblock_worker() -> None:
        if os.getppid() == master:
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock_worker)
    # gunicorn would warn of each that is ended so.
    logging.getLogger("gunicorn.error").addFilter(lambda record: not ENDED.match(record.getMessage()))


def drain_on_term(server: Any) -> None:
    """Call it in the master. Connections that wait in the kernel's queue are reset when gunicorn stops, and a proxy
    sends no write again that an instance may have seen. So SIGTERM first stops the kernel from making new connections,
    which a proxy then makes to another instance. It reaches gunicorn when the workers have emptied the queue."""
    stop: Any = signal.getsignal(signal.SIGTERM)
    so_attach_filter = 26  # Linux's number, which Python's socket module does not have

    def drain(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, stop)  # a second one stops it at once
        let_nothing_in = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # one instruction: return 0
        program = struct.pack("HP", 1, ctypes.addressof(let_nothing_in))
        for each in server.LISTENERS:
            with contextlib.suppress(OSError):  # not on Linux
                each.setsockopt(socket.SOL_SOCKET, so_attach_filter, program)
        give_up = time.monotonic() + DRAIN_SECONDS
        while _backlog(server.LISTENERS) > 0 and time.monotonic() < give_up:
            time.sleep(0.01)
        stop(number, frame)

    signal.signal(signal.SIGTERM, drain)


def finish_on_ctrl_c() -> None:
    """In a worker, gunicorn's handler for Ctrl-C takes a lock that the interrupted code may hold, and the worker then
    hangs until it is killed. The handler for SIGTERM takes no lock, so Ctrl-C is handled as SIGTERM."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def _url(address: Any) -> str:
    """As a browser takes it; the path of a Unix socket as it is."""
    if not isinstance(address, tuple):
        return str(address)
    host = "127.0.0.1" if address[0] in {"0.0.0.0", "::"} else address[0]  # noqa: S104
    return f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"


def _backlog(sockets: Any) -> float:
    """gunicorn asks the kernel, where it can: on Linux, and not about a unix socket."""
    with contextlib.suppress(struct.error):  # a kernel that says less of a socket than Linux
        waiting = [each.get_backlog() for each in sockets]
        return sum(waiting) if waiting and min(waiting) >= 0 else math.nan
    return math.nan


def _refuse(server: Any, why: str) -> Any:
    def refuse(number: int, frame: object) -> None:
        # In a thread, since this handler may have interrupted somebody who holds the log's lock.
        line = f"{why}, which the plan does not count. Restart the service instead."
        threading.Thread(target=server.log.warning, args=("%s", line)).start()

    return refuse


def _folder_of_ours(prefix: str) -> Path:
    """Make a folder for metrics, locked for as long as this process or one of its workers lives."""
    # It gets its name when it is locked. Until then, a neighbour that starts must not take it for a leftover.
    new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=shared_memory()))
    fcntl.flock(os.open(new, os.O_RDONLY), fcntl.LOCK_EX)  # it stays open, and forked processes inherit it
    return new.rename(new.with_name(new.name[1:]))


def _remove_leftovers(prefix: str) -> None:
    """Remove the folders of masters that were killed. Nobody holds the lock on them, whatever container that was in: a
    process id would mean something else there."""
    for folder in Path(shared_memory() or tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # locked, or another user's
            opened = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(opened)
