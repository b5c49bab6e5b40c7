"""Say what was made: the plan for this machine, and the next three commands.

Pure functions; only the call at the end knows Jinja. The numbers come from the generated project itself, so what is
printed here is what its gunicorn will do.
"""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

# As in pre_gen_project: enough of everything.
ROOMY = {"cpus": 1024.0, "memory_mib": 1024 * 1024}


def report(name, folder, numbers, sizing, machine):
    """Return the lines to print after a bake."""
    try:
        here = {"cpus": machine.cpus(), "memory_mib": machine.memory_mib()}
        plan = sizing.plan(**here, **numbers)
    except sizing.PlanError as error:
        lines = [f"{name} does not fit this machine; it may fit another one: {error}"]
    except Exception as error:  # noqa: BLE001 - an unknown machine; the bake is done, and the plan is a courtesy
        lines = [f"This machine's cpus and memory cannot be read, so no plan is shown: {error}"]
    else:
        cpus = f"{here['cpus']:g} cpu{'' if here['cpus'] == 1 else 's'}"
        lines = [
            f"{name} on this machine ({cpus}, {here['memory_mib']} MiB):",
            f"  {plan.workers} workers x {plan.threads} threads",
            f"  {plan.sum}",
            *(f"  {note}" for note in plan.notes),
        ]
    return [*lines, "", "Next:", f"  cd {shlex.quote(str(folder))}", "  make run", "  make test"]


def load(path):
    """Load the module in one file, without the package around it, and without leaving bytecode beside it."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(f"project_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(answers, folder):
    sizing, machine = load(folder / "flask_pooling" / "sizing.py"), load(folder / "flask_pooling" / "machine.py")
    numbers = {
        "max_connections": int(answers["postgres_max_connections"]),
        "instances": int(answers["app_instances"]),
    }
    try:  # cruft does not tell the first hook where the template is, so the two numbers are checked together here
        sizing.plan(**ROOMY, **numbers)
    except sizing.PlanError as error:
        print(f"Refused: postgres_max_connections and app_instances do not fit together: {error}", file=sys.stderr)
        return 1
    sys.stdout.reconfigure(errors="backslashreplace")
    print(*report(answers["project_name"], folder, numbers, sizing, machine), sep="\n")
    return 0


if __name__ == "__main__":
    # Single quotes, since the filter escapes those; backslashes are JSON's.
    sys.exit(main(json.loads(r'{{ cookiecutter | tojson }}'), Path.cwd()))  # fmt: skip
