"""gunicorn whose first worker is the process itself: callgrind's control does not reach a child that was forked."""

import os
import sys

from gunicorn.app.wsgiapp import run

master = os.getpid()
os.fork = lambda: 0
os.getppid = lambda: master  # a worker ends when its parent has gone
sys.argv[0] = "gunicorn"
run()
