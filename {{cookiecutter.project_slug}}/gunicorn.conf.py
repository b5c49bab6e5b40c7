"""gunicorn's settings, from the same plan that sizes the pools. gunicorn finds this file in the current folder.

`make plan` shows the numbers, and where they come from. Change workers, threads, their class and the two timeouts with
their variables (WEB_CONCURRENCY ...), since the pools depend on them. Another value for one of these five, here or on
gunicorn's command line, is refused.
"""

import logging
import sys
from typing import Any

from gunicorn import glogging

from app.config import Settings
from app.logs import dict_config
from flask_pooling import PlanError, SettingsError
from flask_pooling.gunicorn import configure, shared_memory

try:
    _settings = Settings.load()
    _plan = _settings.plan
except (SettingsError, PlanError) as _error:
    sys.exit(str(_error))

wsgi_app = "app:create_app()"
proc_name = _settings.service_name
bind = _settings.bind
logconfig_dict = dict_config(_settings)


class _Logger(glogging.Logger):
    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for handler in self.access_log.handlers:  # of --access-logfile
            handler.setFormatter(logging.root.handlers[0].formatter)
            handler.addFilter(logging.root.handlers[0].filters[0])

    def access(self, *of_a_request: Any) -> None:
        """Skip gunicorn's own line, unless --access-logfile asks for it: app/middleware.py logs each request."""
        if self.cfg.accesslog:
            super().access(*of_a_request)


logger_class = _Logger

# One worker more than there are cpus, since a worker runs Python on one cpu at a time. Fewer if memory is short.
workers = _plan.workers
# A thread waits for the database while another computes. Each needs a connection, so the pool has one for each thread.
worker_class = _plan.worker_class
threads = _plan.threads
# A worker accepts only what it can serve at once. gunicorn's 1000 would let one worker queue requests behind its own
# threads while another worker is idle.
worker_connections = _plan.threads
# An idle connection of a client would take one of these places. The proxy in front keeps its clients' connections open.
keepalive = 0

# Seconds without a heartbeat until a worker is replaced. It is longer than a statement may run (DB_STATEMENT_TIMEOUT).
timeout = _settings.web_timeout
# Seconds that a stopping worker has to finish its requests. Give a container more than that.
graceful_timeout = _settings.web_graceful_timeout
# A worker is replaced after so many requests, so that a leak does not grow for ever. With jitter, workers do not all
# restart at once. Replacing one costs less than a tenth of a second of CPU.
max_requests = 10_000
max_requests_jitter = 5_000
# The folder of the heartbeats, which are files. On a slow disk they would stall, and healthy workers would be replaced.
worker_tmp_dir = shared_memory()
# The control socket needs a HOME that can be written, which a container often does not have.
control_socket_disable = True
# WEB_TRUSTED_PROXIES says whose headers count. gunicorn would take them from any program on this machine.
forwarded_allow_ips = ""

# The app is loaded once, before the fork: workers share its memory, and the plan is checked against its database.
preload_app = True

# Adds the hooks that hold gunicorn to the plan. Hooks of your own run as well, above or below this line.
configure(globals(), settings=_settings)
