"""gunicorn's settings, from the same plan that sizes the pools. gunicorn reads this file by itself.

The plan's numbers cannot be changed on gunicorn's command line: they are one side of a sum, the pools are the other.
"""

import atexit
import errno
import gc
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

_SHARED_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  # Linux's, made for this

if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # before the app is imported; a reload comes here again
    _metrics = tempfile.mkdtemp(prefix="metrics-", dir=_SHARED_MEMORY)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics
    _master = os.getpid()  # workers inherit what is registered here, and must leave the folder alone
    atexit.register(lambda: shutil.rmtree(_metrics, ignore_errors=True) if os.getpid() == _master else None)

from gunicorn import glogging  # noqa: E402
from prometheus_client import multiprocess  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from app import budget, defaults, logs, metrics, probes  # noqa: E402
from app.config import Environment, Settings, SettingsError  # noqa: E402

try:
    _settings = Settings.from_env(os.environ)
except SettingsError as _error:
    sys.exit(str(_error))
_plan = _settings.plan
_development = _settings.environment is Environment.DEVELOPMENT


class Logger(glogging.Logger):
    """The app logs its requests itself. With a logconfig gunicorn would put a line together for each as well, and give
    it to nobody."""

    @property
    def access_log_enabled(self) -> bool:
        return bool(self.cfg.accesslog)


wsgi_app = "wsgi:app"
proc_name = defaults.SERVICE_NAME
bind = f"{_settings.web_host}:{_settings.port}"
logger_class = Logger
logconfig_dict = logs.config_for(_settings.environment)

workers = _plan.workers
# gthread, but a slow client holds no thread of it.
worker_class = {"gthread": "gunicorn_worker.CollectingWorker", "sync": "sync"}[_plan.worker_class]
threads = _plan.threads
# A worker takes no more than it can serve at once. gunicorn's 1000 would let one worker hoard what another, idle, could
# serve; and connections that are kept alive would count against it, so they are not.
worker_connections = _plan.threads
keepalive = 0
# What a proxy says of a request is believed in one place, by WEB_TRUSTED_PROXIES. gunicorn would believe whatever runs
# on this machine.
forwarded_allow_ips = ""

timeout = _settings.web_timeout
graceful_timeout = _settings.web_graceful_timeout
# Whatever leaks is cut off in time; with half of it as jitter the workers do not restart together. Measured: to replace
# a worker takes 60 to 80 ms of CPU, about half a percent of what 10,000 reads take, and these leave 0.3 MiB behind.
max_requests = 10_000
max_requests_jitter = 5_000
# The heartbeat is a file: on a slow disk it stalls, and a healthy worker is killed.
worker_tmp_dir = _SHARED_MEMORY
# It logs an error wherever HOME cannot be written, as in a container that runs as nobody.
control_socket_disable = True

# The app is loaded once and its memory shared. In development it is loaded by each worker instead, to be loaded again.
preload_app = not _development
reload = _development

# How gunicorn tells a worker to end. Told so before it has handlers of its own, it would hand that to the master's,
# which it was forked with: it would be lost, and the master would wait for the worker until the graceful timeout.
_ENDS = {signal.SIGTERM, signal.SIGQUIT, signal.SIGINT}
os.register_at_fork(after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS))

# What may not be changed on the command line, and the variable that changes it on both sides of the sum.
_PLANNED = {
    "workers": "WEB_CONCURRENCY",
    "threads": "WEB_THREADS",
    "worker_class": "WEB_WORKER_CLASS",
    "timeout": "WEB_TIMEOUT",
    "graceful_timeout": "WEB_GRACEFUL_TIMEOUT",
}


def on_starting(server: Any) -> None:
    """The last look before anything is served: is gunicorn what was planned, and does the plan fit the database?"""
    for name, variable in _PLANNED.items():
        given, planned = server.cfg.settings[name].get(), globals()[name]
        if given != planned:
            sys.exit(f"--{name.replace('_', '-')} {given}: the plan says {planned}; set {variable}={given} instead")
    _refuse_a_port_in_use(server)
    _check_the_budget(server)
    server.probes = probes.listen(_settings.web_host, _settings.web_probe_port) if _settings.web_probe_port else None


def when_ready(server: Any) -> None:
    """Keep the collector off what all workers share: moving it would copy the memory into each of them."""
    gc.collect()
    gc.freeze()
    server.log.info("plan: %s", _plan.sum)


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """A worker more by signal (TTIN) is a pool more than was planned."""
    if old_value is not None and new_value > _plan.workers:
        server.log.error(
            "%d workers would break the plan (%s); staying at %d. Set WEB_CONCURRENCY and restart instead.",
            new_value,
            _plan.sum,
            _plan.workers,
        )
        server.num_workers = _plan.workers


def pre_fork(server: Any, worker: Any) -> None:
    """One for one: on HUP gunicorn would start all new workers beside the old ones, and twice the pools. So each waits
    until the oldest has gone; meanwhile the others serve. Then number it, so that its metrics go where its
    predecessor's went."""
    while len(server.WORKERS) >= server.num_workers:
        _make_way(server, min(server.WORKERS, key=lambda pid: server.WORKERS[pid].age))
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(number for number in itertools.count(1) if number not in taken)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # until it has forked, here, and has handlers, there


def post_fork(server: Any, worker: Any) -> None:
    """The pools empty themselves after any fork (app/pools.py); here it is the metrics, the signals and the code."""
    for end in _ENDS:
        signal.signal(end, lambda number, frame: os._exit(0))  # until gunicorn's are set there is nothing to finish
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
    metrics.take_slot(worker.slot)
    worker.probes = server.probes
    # On Ctrl-C gunicorn's own handler takes a lock of the thread pool. Its thread may hold that already, and then hangs
    # until it is killed. To finish what is in hand, as for SIGTERM, takes none.
    worker.handle_quit = worker.handle_exit
    if _development:
        # This file imported the app into the master; a reloaded worker is to see the files as they are now.
        for name in [name for name in sys.modules if name.partition(".")[0] in {"app", "prometheus_client"}]:
            del sys.modules[name]


def post_worker_init(worker: Any) -> None:
    from app import metrics  # noqa: PLC0415  # the worker's own, which in development is not the master's

    metrics.announce(_settings)
    if worker.probes:
        probes.serve(worker.probes, worker.wsgi)


def child_exit(server: Any, worker: Any) -> None:
    """What the worker held at the end is held no longer."""
    multiprocess.mark_process_dead(worker.slot)  # type: ignore[no-untyped-call]


def _make_way(server: Any, pid: int) -> None:
    """Stop a worker, and wait until it has finished what it serves and its connections are closed."""
    server.kill_worker(pid, signal.SIGTERM)
    give_up = time.monotonic() + server.cfg.graceful_timeout + 1
    while pid in server.WORKERS:
        if time.monotonic() > give_up:
            server.kill_worker(pid, signal.SIGKILL)
        time.sleep(0.02)
        server.reap_workers()


def _refuse_a_port_in_use(server: Any) -> None:
    """gunicorn would retry for five seconds and then say "Can't connect"."""
    wanted = []
    if not {"GUNICORN_FD", "LISTEN_FDS"} & os.environ.keys():  # else it is inherited: from an old master, from systemd
        wanted = [(address, "PORT") for address in server.cfg.address if isinstance(address, tuple)]
    if _settings.web_probe_port:
        wanted.append(((_settings.web_host, _settings.web_probe_port), "WEB_PROBE_PORT"))
    for (host, port), variable in wanted:
        try:
            probes.listen(host, port).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            sys.exit(f"{host}:{port} is in use; set {variable} to a free port")


def _check_the_budget(server: Any) -> None:
    if _settings.db_budget_check == "off" or not _settings.on_postgres:
        return
    try:
        verdict = budget.judge(_plan, budget.ask(_settings))
    except SQLAlchemyError as error:
        # It may come up later, and readiness stays red until it does. This proves nothing about the plan.
        reason = str(getattr(error, "orig", error)).strip()
        server.log.warning("the database cannot be asked whether the plan fits: %s", reason)
        return
    for warning in verdict.warnings:
        server.log.warning("%s", warning)
    if verdict.problems and _settings.db_budget_check == "enforce":
        sys.exit("\n".join(("the plan does not fit the database:", *verdict.problems)))
    for problem in verdict.problems:
        server.log.warning("%s", problem)
