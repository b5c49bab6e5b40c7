"""The protections, and how to take each out of a copy of the project. Each scenario must notice: (file, old, new)."""
# lines of the project, as they are

Patches = tuple[tuple[str, str, str], ...]

SABOTAGE: dict[str, Patches] = {
    "emptying the pools at a fork": (
        ("app/pools.py", "    os.register_at_fork(after_in_child=_empty_pools)", "    pass"),
    ),
    "emptying the pools at a fork and the second try of a read": (
        ("app/pools.py", "    os.register_at_fork(after_in_child=_empty_pools)", "    pass"),
        ("app/errors.py", 'if error.connection_invalidated and reading() and not g.get("tried_again"):', "if False:"),
    ),
    "the refusal of a worker by TTIN": (("gunicorn.conf.py", "        server.num_workers = _plan.workers\n", ""),),
    "pools without overflow": (("app/pools.py", '"max_overflow": self.max_overflow,', '"max_overflow": 10,'),),
    "one for one on HUP": (
        ("gunicorn.conf.py", "    while len(server.WORKERS) >= server.num_workers:", "    while False:"),
    ),
    "the check at checkout": (("app/pools.py", '        event.listen(engine, "checkout", guard.checked_out)\n', ""),),
    "25006 as a disconnect": (
        ("app/pools.py", '    event.listen(engine, "handle_error", _disconnect_when_read_only)\n', ""),
    ),
    "target_session_attrs": (("app/pools.py", '        "target_session_attrs": "read-write",\n', ""),),
    "the whereabouts of the server": (
        ("app/health.py", '            sa.event.listen(engine, "connect", self._connected)\n', "            pass\n"),
    ),
    "the second try of a read": (
        ("app/errors.py", 'if error.connection_invalidated and reading() and not g.get("tried_again"):', "if False:"),
    ),
    "503 for the database's errors": (
        ("app/errors.py", "    app.register_error_handler(DBAPIError, database_problem)\n", ""),
    ),
    "statement and idle timeouts": (
        ("app/pools.py", '        limits["statement_timeout"] = settings.db_statement_timeout\n', "        pass\n"),
        ("app/pools.py", '        "idle_in_transaction_session_timeout": settings.db_statement_timeout,\n', ""),
    ),
    "a pool held to the budget, and 503s": (
        ("app/errors.py", "    app.register_error_handler(DBAPIError, database_problem)\n", ""),
        ("app/pools.py", '"max_overflow": self.max_overflow,', '"max_overflow": 10,'),
        ("gunicorn.conf.py", "\nthreads = _plan.threads", "\nthreads = 12"),
        ("gunicorn.conf.py", "worker_connections = _plan.threads", "worker_connections = 1000"),
        ("gunicorn.conf.py", '    "threads": "WEB_THREADS",\n', ""),
    ),
    "client_connection_check_interval": (
        ("app/pools.py", ' | {"client_connection_check_interval": CLIENT_CONNECTION_CHECK_MS}', ""),
    ),
    "TCP limits": (
        ("app/pools.py", '        "tcp_user_timeout": TCP_USER_TIMEOUT_MS,\n', ""),
        ("app/pools.py", "        **KEEPALIVES,\n", ""),
    ),
    "prepare_threshold=None": (("app/pools.py", '        arguments["prepare_threshold"] = None\n', ""),),
    "SET LOCAL": (("app/pools.py", 'f"SET LOCAL {name} = {value}"', 'f"SET {name} = {value}"'),),
    "the worker that collects requests": (
        ("gunicorn.conf.py", '"gthread": "gunicorn_worker.CollectingWorker"', '"gthread": "gthread"'),
    ),
    "worker_connections = threads": (
        ("gunicorn.conf.py", "worker_connections = _plan.threads", "worker_connections = 1000"),
    ),
    "the graceful stop": (
        ("gunicorn.conf.py", "\ngraceful_timeout = _settings.web_graceful_timeout", "\ngraceful_timeout = 0"),
        ("gunicorn.conf.py", '    "graceful_timeout": "WEB_GRACEFUL_TIMEOUT",\n', ""),
    ),
    "the check for what Postgres cannot store": (("app/notes.py", 'if "\\x00" in text:', "if False:"),),
    "JSON without halves of surrogate pairs": (
        ("app/__init__.py", "return msgspec.json.decode(s)", 'return __import__("json").loads(s)'),
    ),
    "the masking of what may be a secret": (
        ("app/config.py", 'return "***" if name in SECRET_NAMES or', 'return "***" if False and'),
    ),
}
