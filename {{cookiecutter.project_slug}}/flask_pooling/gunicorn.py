"""gunicorn's settings and hooks: they hold the server to the plan, and run the probes and the metrics.

gunicorn.conf.py calls :func:`configure`, which sets the numbers of the plan and adds the hooks.
"""

import atexit
import contextlib
import ctypes
import functools
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from flask_pooling import budget, extension, holds, metrics, middleware, probes, process, version, watchdog
from flask_pooling.engine import empty_pools
from flask_pooling.settings import PLANNED_WITH, Settings, SettingsError
from flask_pooling.sizing import Plan, PlanError

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.5
# libpq's messages before it tries to connect: the URL, or PG* in the environment, is wrong.
UNUSABLE = re.compile("is bad: (?!connection to)|invalid integer value|could not match|bad value for")
ASK_AGAIN_SECONDS = 2
DRAIN_SECONDS = 5  # WEB_GRACEFUL_TIMEOUT begins after it
MAX_REQUESTS = 10_000  # then a worker is replaced, so that a leak does not grow for ever
HOOKS = (
    *("nworkers_changed", "on_starting", "when_ready", "on_exit", "pre_fork", "post_fork", "post_worker_init"),
    *("child_exit", "worker_exit", "worker_abort"),
)
JOINTS = ("nworkers_changed", "on_starting")
ENDS = {"on_exit", "child_exit", "worker_exit", "worker_abort"}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # Linux's, made for this
# The signals that would start more workers beside those that run, each with its pool.
REFUSED = {
    signal.SIGHUP: "HUP is ignored: it would start new workers beside the old ones",
    signal.SIGUSR2: "USR2 is ignored: it would start a second server beside this one",
    signal.SIGTTIN: "TTIN is ignored: it would start one more worker",
}


def shared_memory() -> str | None:
    """Return a folder in memory, if there is one: heartbeats and metrics on a slow disk would stall workers."""
    return str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None


def configure(
    names: dict[str, Any], wsgi_app: str | None = None, settings: Settings | None = None, *, name: str | None = None
) -> None:
    """Give gunicorn the workers and threads of the plan, and the hooks that hold it to them. In gunicorn.conf.py:

        from flask_pooling.gunicorn import configure

        configure(globals(), "microblog:app")

    What is set before stays. A hook of your own runs as well as ours, wherever in the file it is defined.

    :param names: the `globals()` of gunicorn.conf.py.
    :param wsgi_app: the app, as on gunicorn's command line, which may name another.
    :param settings: read from the environment when not given.
    Exits with one clear message when there is no plan, or when the app has been made already, without it.
    """
    if problems := [*version.problems()]:
        sys.exit("\n".join(problems))
    if extension.registered:
        sys.exit("gunicorn.conf.py: the app was made before configure(...), without the plan; do not import it there")
    try:
        settings = settings or Settings.load(name=(wsgi_app or "flask").partition(":")[0].partition(".")[0])
        plan = settings.plan
    except (SettingsError, PlanError) as error:
        sys.exit(str(error))
    fixed = {
        "workers": (plan.workers, "WEB_CONCURRENCY"),
        "threads": (plan.threads, "WEB_THREADS"),
        "worker_class": (plan.worker_class, "WEB_WORKER_CLASS"),
        "timeout": (settings.web_timeout, "WEB_TIMEOUT"),
        "graceful_timeout": (settings.web_graceful_timeout, "WEB_GRACEFUL_TIMEOUT"),
    }
    defaults = {
        **({"wsgi_app": wsgi_app} if wsgi_app else {}),
        "proc_name": settings.service_name,
        "bind": settings.bind,
        "worker_connections": plan.threads,
        "keepalive": 0,
        "max_requests": MAX_REQUESTS,
        "max_requests_jitter": MAX_REQUESTS // 2,
        "worker_tmp_dir": shared_memory(),
        "control_socket_disable": True,
        "preload_app": not names.get("reload"),
        **{setting: value for setting, (value, _) in fixed.items()},
    }
    for setting, value in defaults.items():
        names.setdefault(setting, value)
    Hooks(settings, fixed=fixed).join(names)


class Hooks:
    """gunicorn's hooks.

    :param fixed: gunicorn's settings that come from the plan, and the variable that changes each. Another value in
        gunicorn's configuration or command line is refused.
    """

    def __init__(self, settings: Settings, *, fixed: Mapping[str, tuple[Any, str]]) -> None:
        self.settings, self.fixed = settings, fixed
        self.sockets_are_inherited = "LISTEN_FDS" in os.environ  # systemd's; gunicorn takes the variable out
        self.listener: socket.socket | None = None
        self.was_away: list[tuple[Plan, Engine, str]] = []  # at the start
        self.numbers: set[int] = set()
        self.joined: dict[str, Callable[..., Any]] = {}
        process.in_gunicorn = True
        # Other folders are left alone: their process may live in another container that shares this memory.
        self.folder = Path(tempfile.mkdtemp(prefix=f"metrics-{settings.service_name}-", dir=shared_memory()))
        metrics.keep_in(self.folder)
        self.owner = os.getpid()
        atexit.register(self._remove_the_folder)  # a start that is refused has no on_exit

    # --- beside the hooks of gunicorn.conf.py ------------------------------------------------------------------------

    def join(self, names: dict[str, Any]) -> None:
        """Put our hooks beside those that are in gunicorn.conf.py already."""
        for name in HOOKS:
            names[name] = self.joined[name] = both(getattr(self, name), names.get(name), name in ENDS)
        process.config, process.joints = names, {name: self.joined[name] for name in JOINTS}

    def join_later_ones(self, server: Any) -> None:
        """Put our hooks beside those that gunicorn.conf.py defines after `configure`, which have replaced ours.
        gunicorn calls nworkers_changed before it loads the app, and on_starting after it."""
        for name, ours in self.joined.items():
            found = server.cfg.settings[name].get()
            if found is not ours:
                self.joined[name] = both(getattr(self, name), found, name in ENDS)
                server.cfg.set(name, self.joined[name])

    def nworkers_changed(self, server: Any, new_value: int, old_value: int | None) -> None:
        if old_value is None:  # it is only starting
            self.join_later_ones(server)

    # --- in the master -----------------------------------------------------------------------------------------------

    def on_starting(self, server: Any) -> None:
        """Check, before anything is served, that gunicorn has the plan's numbers and the plan fits the database."""
        self.join_later_ones(server)
        self._refuse_what_is_not_planned(server)
        self._check_the_budget(server)
        empty_pools(close=True)  # the master's own connection would come on top of the workers'
        self.owner = os.getpid()  # as a daemon, gunicorn has another process id by now
        if os.geteuid() == 0:  # workers of another user write there
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, server.cfg.uid, server.cfg.gid)

    def when_ready(self, server: Any) -> None:
        """Open the port of the probes, now that gunicorn has its own. Refuse the signals that break the plan. Freeze
        the objects that all workers share: the garbage collector would touch them, and each worker would then have a
        copy of that memory."""
        if port := self.settings.probe_port:
            try:
                self.listener = probes.listen(self.settings.web_host, port)
            except OSError as error:
                sys.exit(f"WEB_PROBE_PORT={port}: {error.strerror}; set it to a free port")
        for number, why in REFUSED.items():
            signal.signal(number, _refuse(server, why))
        by_fd = any(isinstance(address, int) for address in server.cfg.address)  # fd://3
        if not (self.sockets_are_inherited or by_fd):  # such a socket stays open for the next start
            drain_on_term(server)
        gc.collect()
        gc.freeze()
        for plan in self.settings.plan.servers.values():
            log.info("plan: %s", plan.named(plan.sum))
        probed = f", with probes and metrics on port {port}" if port else ""
        is_local = self.settings.web_host in {"127.0.0.1", "::1", "localhost"}
        if self.settings.in_production and not (is_local or self.settings.web_trusted_proxies):
            log.warning("WEB_HOST=%s, WEB_TRUSTED_PROXIES=0: put a buffering proxy in front", self.settings.web_host)
        log.info("%s is starting%s; Ctrl-C stops it", self.settings.service_name, probed)

    def pre_fork(self, server: Any, worker: Any) -> None:
        """Number the worker, so that its metrics go into its predecessor's file."""
        worker.number = next(number for number in itertools.count(1) if number not in self.numbers)
        self.numbers.add(worker.number)

    def child_exit(self, server: Any, worker: Any) -> None:
        self.numbers.discard(worker.number)
        metrics.leave_number(worker.number)
        if worker.aborted:  # gunicorn has ended the worker, since it did not beat
            metrics.metrics().workers_replaced.inc()

    def on_exit(self, server: Any) -> None:
        self._remove_the_folder()

    def _remove_the_folder(self) -> None:
        if self.owner == os.getpid():  # not in a worker, which inherits this
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- in a worker -------------------------------------------------------------------------------------------------

    def post_fork(self, server: Any, worker: Any) -> None:
        """Give the worker its own metrics. The pools empty themselves after any fork (engine.py)."""
        metrics.take_number(worker.number)

    def post_worker_init(self, worker: Any) -> None:
        finish_on_ctrl_c()
        counted = metrics.metrics()
        counted.announce(self.settings)
        counted.sampled[counted.slots_busy] = lambda: len(watchdog.in_flight)
        counted.sampled[counted.slots_over_limit] = lambda: len(watchdog.past())
        counted.sampled[counted.backlog] = lambda: _backlog(worker.sockets)

        def look() -> None:
            counted.sample()
            unlimited = {thread for thread, each in watchdog.in_flight.copy().items() if each.unlimited}
            holds.report(self.settings.db_hold_warning or math.inf, 2 * self.settings.db_statement_timeout, unlimited)

        watchdog.watch(worker, self.settings.web_timeout, replace=not worker.cfg.reload, tick=look)
        if self.listener and (known := next(iter(extension.registered), None)):
            probes.serve(self.listener, known.probe_app)
        worker.wsgi = middleware.Watched(worker.wsgi)  # what gunicorn calls for each request
        for each in self.was_away if worker.number == 1 else ():  # one worker is enough
            threading.Thread(target=self._ask_again, args=each, name="budget", daemon=True).start()

    def worker_exit(self, server: Any, worker: Any) -> None:
        """End a worker whose requests still run after WEB_GRACEFUL_TIMEOUT. Python would wait for their threads, and
        gunicorn would take the worker for one that hangs."""
        if watchdog.in_flight:
            logging.shutdown()
            os._exit(0)

    def worker_abort(self, worker: Any) -> None:
        """Log what hangs, and exit: gunicorn replaces this worker, which has not beaten for WEB_TIMEOUT. An ordinary
        exit would wait for the threads that hang, until gunicorn kills the worker and logs a guess about memory."""
        # In a thread, since the interrupted code may hold the log's lock.
        last_words = threading.Thread(target=watchdog.report, daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_SECONDS)
        os._exit(1)

    # --- refusals ----------------------------------------------------------------------------------------------------

    def _refuse_what_is_not_planned(self, server: Any) -> None:
        for name, (planned, variable) in self.fixed.items():
            given = server.cfg.settings[name].get()
            if given != planned:
                how = f"leave it out; {variable} changes it on both sides of the sum"
                sys.exit(f"{name}={given}, in gunicorn.conf.py or as an option: the plan says {planned}; {how}")
        if not server.cfg.preload_app and self.settings.in_production:
            sys.exit("preload_app=False: the app must be loaded first, so that its database is checked; leave it out")
        if not extension.registered and server.cfg.preload_app:
            sys.exit("the app does not call flask_pooling.init_app(app, db), so nothing holds it to the plan")
        for each in extension.registered:
            for name in PLANNED_WITH.values():
                ours, apps = getattr(self.settings, name), getattr(each.settings, name)
                if ours != apps:
                    sys.exit(
                        f"{name.upper()}: gunicorn.conf.py read {ours}, and the app {apps}; set it in the environment"
                        " before gunicorn starts (a .env that the app loads comes too late)"
                    )
            paths = {rule.rule for rule in each.probe_app.url_map.iter_rules()}
            for rule in each.app.url_map.iter_rules():
                if rule.rule in paths and not rule.endpoint.startswith("pooling_"):
                    log.warning("the view %r at %s is not called: the path is flask_pooling's", rule.endpoint, rule)

    def _check_the_budget(self, server: Any) -> None:
        mode = self.settings.db_budget_check
        asked = [each for known in extension.registered for each in known.servers()] if mode != "off" else []
        for plan, engine, name in asked:
            try:
                verdict = budget.judge(plan, budget.ask(plan, engine, name), starting=True)
            except SQLAlchemyError as error:
                reason = plan.named(budget.driver_message(error))
                if budget.FULL.search(reason) and mode == "enforce":
                    sys.exit(f"the database has no connection left, so nothing can be checked; close some: {reason}")
                if UNUSABLE.search(reason) or budget.REFUSES_OPTIONS.search(reason):
                    sys.exit(f"no connection to the database can be made: {reason}")
                # The database may come up later, and readiness stays red until then.
                server.log.warning("the plan cannot be compared with the database: %s; this is tried again", reason)
                self.was_away.append((plan, engine, name))
                continue
            if verdict.problems and mode == "enforce":
                sys.exit("\n".join(("the plan does not fit the database:", *verdict.problems)))
            for each in (*verdict.problems, *verdict.warnings):
                server.log.warning("%s", each)

    def _ask_again(self, plan: Plan, engine: Engine, name: str) -> None:
        """Ask until the database is back. A plan that does not fit is then an error in the log: a service that serves
        is not ended."""
        while True:
            time.sleep(ASK_AGAIN_SECONDS)
            with contextlib.suppress(SQLAlchemyError):
                verdict = budget.judge(plan, budget.ask(plan, engine, name))
                break
        level = logging.ERROR if verdict.problems else logging.WARNING if verdict.warnings else logging.INFO
        said = "; ".join((verdict.words, *verdict.problems, *verdict.warnings))
        log.log(level, "%s: %s", plan.named("the database is back"), said)


def both(ours: Callable[..., Any], theirs: Callable[..., Any] | None, theirs_first: bool) -> Callable[..., Any]:
    """Make one hook that calls two. gunicorn counts a hook's parameters, which functools.wraps keeps.

    :param theirs_first: for hooks of ours that may end the process.
    """
    if theirs is None:
        return ours

    @functools.wraps(ours)
    def hook(*args: Any) -> None:
        if not theirs_first:
            ours(*args)
        try:
            theirs(*args)
        finally:
            if theirs_first:
                ours(*args)

    return hook


def drain_on_term(server: Any) -> None:
    """Make the master empty the kernel's queue of connections before it stops. gunicorn would reset those that wait,
    and a proxy does not repeat a write that an instance may have seen. So SIGTERM first stops the kernel from making
    new connections, which a proxy then makes to another instance. It reaches gunicorn when the queue is empty.

    `listen(0)` in place of the filter lets one connection in at a time, and lost 1 of 473 writes of a deploy.
    """
    stop: Any = signal.getsignal(signal.SIGTERM)
    so_attach_filter = 26  # Linux's number, which Python's socket module does not have

    def drain(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, stop)  # a second one stops it at once
        let_nothing_in = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # a program of one step: return 0
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
    """Handle Ctrl-C as SIGTERM in a worker. gunicorn's handler for Ctrl-C takes a lock that the interrupted code may
    hold, and the worker would then hang until it is killed. The one for SIGTERM takes no lock."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def _backlog(sockets: Any) -> float:
    """Count the connections that wait. gunicorn knows them since 25, on Linux, and not for a Unix socket."""
    # struct.error: another kernel than Linux reports less about a socket
    with contextlib.suppress(AttributeError, struct.error):
        waiting = [each.get_backlog() for each in sockets]
        return sum(waiting) if waiting and min(waiting) >= 0 else math.nan
    return math.nan


def _refuse(server: Any, why: str) -> Any:
    def refuse(number: int, frame: object) -> None:
        # In a thread, since the interrupted code may hold the log's lock.
        line = f"{why}, which the plan does not count. Restart the service instead."
        threading.Thread(target=server.log.warning, args=("%s", line)).start()

    return refuse
