"""Run a module as `python -m` does; Ctrl-C while it is being loaded ends it without a traceback.

    python -m scripts.quietly flask db upgrade

The Makefile starts everything that takes a second to load by this. It also needs no script in .venv/bin, whose first
line does not survive every path.
"""

import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # gunicorn and scripts/prod.py set their own when they are loaded
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
