"""Finds out what kind of process this is: a worker of gunicorn, a job of APP_JOBS, or anything else."""

from flask_pooling.settings import Settings, SettingsError

# A job has its name in APP_JOBS instead.
WEB = "web"  # a worker of gunicorn
CLI = "cli"  # a shell, a cron job, a migration

# True in the process that has read gunicorn.conf.py, and in its workers, which are forked from it.
in_gunicorn = False
# gunicorn.conf.py as it ended, and our hooks in it from which the others are joined.
config: dict[str, object] = {}
joints: dict[str, object] = {}


def of(settings: Settings) -> str:
    """Say which kind this process is.

    :raises SettingsError: APP_JOB names a job that is not in APP_JOBS.
    """
    return WEB if in_gunicorn else checked(settings.app_job or CLI, settings)


def checked(process: str, settings: Settings) -> str:
    """Take `web`, `cli` and the jobs of APP_JOBS, and nothing else."""
    if process in {WEB, CLI, *settings.app_jobs}:
        return process
    planned = ", ".join(settings.app_jobs) or "none"
    how = f"add {process}=COPIESxCONNECTIONS"
    raise SettingsError([f"the job {process!r} is not in APP_JOBS, which has {planned}; {how}"])


def refuse_lost_hooks() -> None:
    """Hooks that gunicorn.conf.py defines after `configure` are joined to ours from one of two of ours. Without both of
    them nothing would hold gunicorn to the plan.

    :raises SettingsError: it has replaced both.
    """
    if joints and all(config[name] is not ours for name, ours in joints.items()):
        both = " and ".join(joints)
        raise SettingsError([f"gunicorn.conf.py defines {both} after configure(...); call configure(...) at its end"])


def has_the_plan(process: str) -> bool:
    """Whether this is a web worker that gunicorn.conf.py has started."""
    return in_gunicorn and process == WEB
