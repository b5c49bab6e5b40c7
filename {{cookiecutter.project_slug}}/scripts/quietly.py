"""Run a module as `python -m` does. Ctrl-C ends it without a traceback while that module is being loaded, and it ends
with its terminal.

    python -m scripts.quietly flask db upgrade

The Makefile starts everything that takes a second to load by this. It also needs no script in .venv/bin, whose first
line does not survive every path.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # gunicorn and scripts/prod.py set their own when they are loaded

import os
import runpy
import sys


def end_with_the_terminal() -> None:
    """A terminal that is closed tells the process that it was opened for. If that is make, it only waits for us."""

    def look(number: int, frame: object) -> None:
        try:
            os.tcgetpgrp(0)
        except OSError:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    if os.isatty(0):
        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)


if __name__ == "__main__":
    end_with_the_terminal()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
