"""The version of the library, and two checks: its files are unmodified, and its requirements are new enough."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

__version__ = "0.3.0"

# The oldest versions that work; the library's suite runs on them as well.
REQUIRES = {
    "flask": "3.0",
    "flask-sqlalchemy": "3.1",
    "gunicorn": "21.2",
    "prometheus-client": "0.20",
    "psycopg": "3.1.18",
    "pydantic-settings": "2.7",
    "sqlalchemy": "2.0.23",
}
HERE = Path(__file__).parent
RECORD = HERE / "RECORD"  # a line for each file: its SHA-256 and its name


def hashes() -> dict[str, str]:
    """Return the SHA-256 of each file of the library, by name."""
    files = [path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts and path != RECORD]
    return {path.relative_to(HERE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed() -> list[str]:
    """Return the files that were changed, added or deleted since the release."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    released = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    found = hashes()
    return sorted(name for name in released.keys() | found.keys() if released.get(name) != found.get(name))


def installed() -> Path | None:
    """Return the folder of the installed package, if there is one."""
    try:
        folder = Path(str(metadata.distribution("flask-pooling").locate_file("flask_pooling"))).resolve()
    except metadata.PackageNotFoundError:
        return None
    return folder if folder.is_dir() else None


def problems() -> Iterator[str]:
    """Name each reason why this library cannot work here: a second copy of it, or a requirement that is too old."""
    other = installed()
    if other and other != HERE.resolve():
        how = "delete that folder, or uninstall flask-pooling"
        yield f"flask_pooling is here twice: in the folder {HERE}, and installed in {other}; {how}"
    for name, oldest in REQUIRES.items():
        with contextlib.suppress(metadata.PackageNotFoundError):  # the import fails then, and says so
            if _numbers(found := metadata.version(name)) < _numbers(oldest):
                yield f"{name} {found} is too old for flask_pooling: it needs {oldest} or newer"


def _numbers(version: str) -> list[int]:
    """Split a version, so that versions can be compared.

    >>> _numbers("2.0.23rc1") < _numbers("2.1") < _numbers("10.0")
    True
    """
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
