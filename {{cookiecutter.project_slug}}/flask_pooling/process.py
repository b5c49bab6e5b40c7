"""Find out what kind of process this is: a worker of gunicorn, a job of APP_JOBS, or anything else."""

from flask_pooling.settings import Settings, SettingsError

# The kinds of processes. A job's kind is its name in APP_JOBS.
WEB = "web"  # a worker of gunicorn
CLI = "cli"  # a shell, a cron job, a migration

# True in the process that has read gunicorn.conf.py, and in its workers, which are forked from it.
in_gunicorn = False
# The names of gunicorn.conf.py, and the two hooks of ours that add the others to those of the file.
config: dict[str, object] = {}
joints: dict[str, object] = {}


def of(settings: Settings) -> str:
    """Return the kind of this process.

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
    """Refuse a gunicorn.conf.py that has replaced both of the hooks that would put ours back beside its own. Nothing
    would hold gunicorn to the plan.

    :raises SettingsError: it has replaced both.
    """
    if joints and all(config[name] is not ours for name, ours in joints.items()):
        both = " and ".join(joints)
        raise SettingsError([f"gunicorn.conf.py defines {both} after configure(...); call configure(...) at its end"])


def has_the_plan(process: str) -> bool:
    """Return whether this is a web worker that gunicorn.conf.py has started."""
    return in_gunicorn and process == WEB
