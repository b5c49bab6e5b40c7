"""Writes the library's RECORD, by which `flask pool version` tells whether its files are those of the release.

Run it after a change of the library: `make record`.
"""

import importlib.util
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "{{cookiecutter.project_slug}}" / "flask_pooling"


def version_module():
    spec = importlib.util.spec_from_file_location("version", LIBRARY / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    version = version_module()
    lines = sorted(f"{digest} {name}\n" for name, digest in version.hashes().items())
    version.RECORD.write_text("".join(sorted(lines, key=lambda line: line.split()[1])))


if __name__ == "__main__":
    main()
