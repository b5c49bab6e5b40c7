"""Install pinned requirements into .venv, which is made if it is not there. The Makefile runs this with any Python.

    python scripts/install.py [--ports N] [--uv UV] [requirements/prod.txt "what the service needs"]

With --ports 1, PORT has to be free, with 2 the port of the probes as well. They are checked before anything is
installed.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, also while it is being loaded

import argparse
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OLDEST = (3, 11)
VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
SECONDS_A_PACKAGE = {"pip": 0.5, "uv": 0.1}  # measured, with a good network; .venv included
SAY_SOMETHING_SECONDS = 2.5
BEGAN = time.monotonic()
spoke = [BEGAN]  # when something was last shown
TAIL = 15
# What pip and uv say when the package index cannot be reached.
NO_NETWORK = re.compile(
    r"name resolution|Name or service not known|nodename nor servname|Network is unreachable|No route to host"
    r"|from versions: none"
    r"|Connection refused|new connection|connection broken|dns error|[Cc]onnect error|ConnectTimeout|Could not connect"
)


class InstallError(Exception):
    """Says in a line what is wrong, and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", type=int, default=0)
    parser.add_argument("--uv", default="")
    parser.add_argument("requirements", type=Path, nargs="?")
    parser.add_argument("what", nargs="?")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        refuse_ports_in_use(options.ports)
        if options.requirements:
            announce(options.requirements, options.what, options.uv)
            make_venv(options.uv)
            install(options.requirements, options.uv)
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to continue.", file=sys.stderr)
        return 130
    return 0


def refuse_ports_in_use(ports: int) -> None:
    """gunicorn looks again; this saves the wait for an installation."""
    port = os.environ.get("PORT", "")
    if not port and Path(".env").is_file():
        text = Path(".env").read_text(encoding="utf-8-sig", errors="replace")
        port = (re.findall(r"^PORT=(\d+)$", text, re.MULTILINE) or [""])[-1]
    if port and not re.fullmatch("[0-9]{1,5}", port):
        return  # the settings say what is wrong with it
    first = int(port or 8000)
    wanted = [(first, "PORT")]
    probes = os.environ.get("WEB_PROBE_PORT") or str(first + 1)
    if ports > 1 and probes.isdecimal() and int(probes):  # 0: there are none
        wanted.append((int(probes), "WEB_PROBE_PORT"))
    for number, variable in wanted[:ports]:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", number))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise InstallError(f"127.0.0.1:{number} is in use; set {variable} to a free port") from None
            except OverflowError:
                return


def announce(requirements: Path, what: str, uv: str) -> None:
    pins = re.findall(r"^[a-z0-9-]+==[^;\n]*$", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    tool = "uv" if uv else "pip"
    seconds = max(5, round(len(pins) * SECONDS_A_PACKAGE[tool] / 5) * 5)
    print(f"Installing {what} into {VENV}: {len(pins)} packages with {tool}, about {seconds} seconds", flush=True)
    spoke[0] = time.monotonic()


def make_venv(uv: str) -> None:
    """One that works is kept, and gets the pip that is needed. What an interrupted start left is made anew."""
    if PYTHON.exists() and run([PYTHON, "-c", f"import sys; assert sys.version_info >= {OLDEST}"])[0] == 0:
        has_pip = uv or run([PYTHON, "-c", "import pip"])[0] == 0
        if has_pip or run([PYTHON, "-m", "ensurepip"])[0] == 0:
            return
    remove_venv()
    python = sys.executable
    command: list[str | Path] = [python, "-m", "venv", VENV]
    if uv:
        command = [uv, "venv", "--quiet", "--python", python, VENV]
    code, said = run(command, told=f"making {VENV}")
    if code:
        remove_venv()
        if "ensurepip" in said:
            said = "Python's venv is a package of its own on Debian and Ubuntu: apt install python3-venv"
        raise InstallError(said.strip())


def remove_venv() -> None:
    if VENV.is_symlink():
        VENV.unlink()
    shutil.rmtree(VENV, ignore_errors=True)


def install(requirements: Path, uv: str) -> None:
    command: list[str | Path] = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    if uv:
        command = [uv, "pip", "install", "--compile-bytecode", "--python", PYTHON]
    code, said = run([*command, "--require-hashes", "-r", requirements], told="looking for them")
    if not code:
        print(f"  {time.monotonic() - BEGAN:2.0f} s  installed", flush=True)
        return
    if NO_NETWORK.search(said):
        raise InstallError("The package index cannot be reached. Check the network, then run the same command again.")
    raise InstallError("\n".join(said.strip().splitlines()[-TAIL:]))


def run(command: list[str | Path], *, told: str = "") -> tuple[int, str]:
    """Its exit code, and what it said.

    :param told: what is shown every few seconds, until it says something itself; "": nothing is.
    """
    terminal = sys.stdout.isatty()
    shown = False
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                now = time.monotonic()
                if told and now - spoke[0] > (0.5 if terminal else SAY_SOMETHING_SECONDS):
                    spoke[0], shown = now, True
                    lines = Path(output.name).read_text(errors="replace").split("\n")[:-1]
                    last = [line for line in lines if not line.startswith(("WARNING:", "DEPRECATION:"))][-1:] or [told]
                    text = f"  {now - BEGAN:2.0f} s  {last[0].strip()[:60]}"
                    print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", flush=True)
        except KeyboardInterrupt:
            process.wait()  # it got the signal as well
            raise
        finally:
            if terminal and shown:
                print("\r\x1b[K", end="", flush=True)
        output.seek(0)
        return process.returncode, output.read()


if __name__ == "__main__":
    sys.exit(main())
