"""The programs that some tests need besides Python, make and git, how they are installed, and for which tests.

`python tests/needs.py` installs what is missing where it can: as root on Debian. Where it cannot, `make test` leaves
those tests out and says so in the end; with LEAVE_NOTHING_OUT=1 it fails instead. It needs nothing that is installed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/lib/postgresql"))  # Debian's, with TLS
# pgbouncer and nginx are there, and the PATH of an ordinary user of Debian has it not.
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"

# In a namespace of its own: a user whom nobody knows, and a /dev/shm that cannot be written.
AS_NOBODY = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
WITH_MOUNTS = ("unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]))
READ_ONLY_SHARED_MEMORY = ("mount", "-o", "remount,ro,bind", "/dev/shm")  # noqa: S108


def installed(*programs: str) -> Callable[[], bool]:
    """Say whether all of these programs are found."""
    return lambda: all(shutil.which(program, path=PATH) for program in programs)


def succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


def is_root() -> bool:
    return os.geteuid() == 0


@dataclass(frozen=True)
class Need:
    """`tests` are files below tests/, or tests in them: "chaos/test_fork.py", "test_image.py::test_ports". Those of
    library/ are left out by test_generated.py, which runs them."""

    is_there: Callable[[], bool]
    tests: tuple[str, ...]
    packages: str = ""  # Debian's
    otherwise: str = ""  # what brings it where no package does

    @property
    def remedy(self) -> str:
        return self.otherwise or f"apt-get install {self.packages}"


NEEDS = {
    "root": Need(
        is_root,
        (
            "test_first_hour.py::test_prod_as_root_where_nobody_else_may_look",
            "test_ordinary.py::test_workers_of_another_user",
        ),
        otherwise="run `make test` as root",
    ),
    "network namespaces": Need(
        lambda: is_root() and installed("ip", "setpriv")() and succeeds("unshare", "--net", "true"),
        ("chaos/test_vanish.py",),
        "iproute2 util-linux",
        "as root: apt-get install iproute2 util-linux (in a container: docker run --privileged)",
    ),
    "user namespaces": Need(
        lambda: succeeds(*AS_NOBODY, "true") and succeeds(*WITH_MOUNTS, *READ_ONLY_SHARED_MEMORY),
        (
            "test_environments.py::test_a_user_without_a_name_and_a_home",
            "test_environments.py::test_shared_memory_that_cannot_be_written",
        ),
        "util-linux",
        "apt-get install util-linux (in a container: docker run --privileged)",
    ),
    "a Postgres with TLS": Need(
        lambda: (POSTGRES / "postgres").exists(),
        ("chaos/test_fork.py::test_fork[TLS]", "chaos/test_fork.py::test_sabotage[TLS]"),
        "postgresql",
    ),
    "PgBouncer": Need(
        installed("pgbouncer"),
        ("chaos/test_pgbouncer.py", "chaos/test_pooler_errors.py",
         "test_deploy.py::test_pgbouncer_with_the_plans_sizes", "test_plan_blocks.py::test_pgbouncer",
         "library/test_budget.py::test_a_pooler_that_takes_no_options_is_named",
         "library/test_jobs.py::test_behind_pgbouncer_the_role_has_the_time_limits"),
        "pgbouncer",
    ),
    "nginx": Need(
        installed("nginx"),
        ("chaos/test_deploy.py", "chaos/test_clients.py::test_slow_clients",
         "chaos/test_clients.py::test_sabotage_slow_clients",
         "chaos/test_clients.py::test_speed_beside_slow_clients",
         "chaos/test_clients.py::test_sabotage_speed_beside_slow_clients", "test_image.py::test_as_compose_starts_it",
         "test_proxy.py"),
        "nginx",
    ),
    "Redis": Need(
        installed("redis-server"),
        ("test_deploy.py::test_celery", "test_deploy.py::test_rq", "test_recipes.py::test_a_mail_in_the_background"),
        "redis-server",
    ),
    "systemd": Need(
        installed("systemd-analyze"),
        ("test_deploy.py::test_systemd_understands_the_units", "test_deploy.py::test_the_unit_is_hardened"),
        "systemd",
    ),
    "OpenSSL": Need(
        installed("openssl"),
        ("chaos/test_clients.py::test_tls", "chaos/test_fork.py::test_fork[TLS]",
         "chaos/test_fork.py::test_sabotage[TLS]",
         "chaos/test_pooler_errors.py::test_errors", "test_proxy.py::test_tls_by_a_host_name"),
        "openssl",
    ),
    "Chromium": Need(
        installed("chromium"),
        ("test_browser.py", "test_plan_blocks.py", "test_plan_page.py", "test_pool_page.py"),
        "chromium",
    ),
    "Prometheus": Need(installed("prometheus", "promtool"), ("test_monitoring.py",), "prometheus"),
    "curl": Need(
        installed("curl"),
        ("test_existing_app.py::test_a_session_of_flask_login", "test_existing_app.py::test_a_dead_database"),
        "curl",
    ),
    "wrk": Need(installed("wrk"), ("chaos/test_bench.py",), "wrk"),
}  # fmt: skip


def missing() -> dict[str, Need]:
    """List the needs that this machine does not meet."""
    return {name: need for name, need in NEEDS.items() if not need.is_there()}


def needed_by(test: str, needs: dict[str, Need]) -> list[str]:
    """Return the needs of a test.

    :param test: "chaos/test_fork.py::test_fork[plain]"
    """
    file, _, name = test.partition("::")
    mine = {file, f"{file}::{name}", f"{file}::{name.partition('[')[0]}"}
    return [tool for tool, need in needs.items() if mine & set(need.tests)]


def main() -> int:
    packages = " ".join(need.packages for need in missing().values() if need.packages)
    if not packages:
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing what some tests need: {packages}", flush=True)
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", *packages.split()]):
            subprocess.run(["apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)
        packages = " ".join(need.packages for need in missing().values() if need.packages)
    if packages and "LEAVE_NOTHING_OUT" in os.environ:
        print(
            f"LEAVE_NOTHING_OUT is set, and what some tests need is not here: apt-get install {packages}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
