"""The protections, and how to take each out of a copy of the project. Each scenario must notice: (file, old, new)."""
# lines of the project, as they are

Patches = tuple[tuple[str, str, str], ...]

OVERFLOW: Patches = (("flask_pooling/engine.py", '"max_overflow": 0 if job else', '"max_overflow": 10 if True else'),)

NOTHING_IS_TRANSIENT: Patches = (
    (
        "flask_pooling/errors.py",
        "    if isinstance(error, PoolTimeoutError):\n        return True\n",
        "    return False\n",
    ),
)

SABOTAGE: dict[str, Patches] = {
    "emptying the pools at a fork": (
        (
            "flask_pooling/engine.py",
            "    os.register_at_fork(after_in_child=functools.partial(empty_pools, close=False))",
            "    pass",
        ),
        ("flask_pooling/gunicorn.py", "        empty_pools(close=True)", "        pass"),
    ),
    "the refusal of HUP": (
        (
            "flask_pooling/gunicorn.py",
            '    signal.SIGHUP: "HUP is ignored: it would start new workers beside the old ones",\n',
            "",
        ),
    ),
    "the refusal of TTIN": (
        ("flask_pooling/gunicorn.py", '    signal.SIGTTIN: "TTIN is ignored: it would start one more worker",\n', ""),
    ),
    "pools without overflow": OVERFLOW,
    "the check at checkout": (
        ("flask_pooling/engine.py", '        event.listen(engine, "checkout", guard.checked_out)\n', ""),
    ),
    "25006 as a disconnect": (
        ("flask_pooling/engine.py", '    event.listen(engine, "handle_error", _disconnect_when_read_only)\n', ""),
    ),
    "target_session_attrs": (
        (
            "flask_pooling/engine.py",
            '        "target_session_attrs": "read-write" if has_several_hosts else "primary",\n',
            "",
        ),
    ),
    "the whereabouts of the server": (
        (
            "flask_pooling/health.py",
            '            sa.event.listen(engine, "connect", self._connected)\n',
            "            pass\n",
        ),
    ),
    "503 for the database's errors": NOTHING_IS_TRANSIENT,
    "statement and idle timeouts": (
        ("flask_pooling/engine.py", '        "statement_timeout": settings.db_statement_timeout,\n', ""),
        (
            "flask_pooling/engine.py",
            '        "idle_in_transaction_session_timeout": settings.db_statement_timeout,\n',
            "",
        ),
    ),
    "a pool held to the budget, and 503s": (
        *NOTHING_IS_TRANSIENT,
        *OVERFLOW,
        ("gunicorn.conf.py", "\nthreads = _plan.threads", "\nthreads = 12"),
        ("gunicorn.conf.py", "worker_connections = _plan.threads", "worker_connections = 1000"),
    ),
    "client_connection_check_interval": (
        (
            "flask_pooling/engine.py",
            '    limits |= {"client_connection_check_interval": CLIENT_CONNECTION_CHECK_MS}\n',
            "",
        ),
    ),
    "TCP limits": (
        ("flask_pooling/engine.py", '        "tcp_user_timeout": TCP_USER_TIMEOUT_MS,\n', ""),
        ("flask_pooling/engine.py", "        **KEEPALIVES,\n", ""),
    ),
    "prepare_threshold=None": (("flask_pooling/engine.py", '        arguments["prepare_threshold"] = None\n', ""),),
    "SET LOCAL": (("flask_pooling/engine.py", 'f"SET LOCAL {name} = ', 'f"SET {name} = '),),
    "worker_connections = threads": (
        ("gunicorn.conf.py", "worker_connections = _plan.threads", "worker_connections = 1000"),
    ),
    "the graceful stop": (
        ("gunicorn.conf.py", "\ngraceful_timeout = _settings.web_graceful_timeout", "\ngraceful_timeout = 0"),
    ),
    "the queue that is emptied before the end": (
        ("flask_pooling/gunicorn.py", "            drain_on_term(server)", "            pass"),
    ),
    "the next instance for who was refused": (
        ("deploy/nginx/app.conf.template", "proxy_next_upstream_timeout 5s;", "proxy_next_upstream off;"),
    ),
    "the check for what Postgres cannot store": (("app/notes.py", 'if "\\x00" in text:', "if False:"),),
    "the masking of what may be a secret": (
        ("flask_pooling/settings.py", 'return "***" if "@" in str(value) else repr(value)', "return repr(value)"),
    ),
    "the heartbeat that stops": (("flask_pooling/watchdog.py", "None if is_hung(0.5) else beat()", "beat()"),),
}
