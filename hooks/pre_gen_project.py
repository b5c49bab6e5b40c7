"""Refuse answers that cannot work, before a file is written: a line that names the answer and the remedy, and the
command that asks again, with the good answers in it.

Pure functions; only the call at the end knows Jinja, and what it gets is data, never source. What Postgres can hold is
not decided here but by the arithmetic that the generated service uses, `flask_pooling/sizing.py`.
"""

import importlib.util
import json
import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path

TEXTS = {
    "project_name": "write a name, for example My Service",
    "description": "say in one sentence what the service does",
    "author_name": "write the name of a person or a team",
}
NUMBERS = {
    "postgres_max_connections": "write the server's max_connections, for example 100",
    "app_instances": "write how many instances may run at the same time, for example 2",
}
# The setting that the arithmetic would change, and the question that bakes its default.
QUESTIONS = {"DB_MAX_CONNECTIONS": "postgres_max_connections", "APP_INSTANCES": "app_instances"}
SLUG_LENGTH = 40
POSTGRES_DATABASES = ("postgres", "template0", "template1")
# Postgres's own upper bound for max_connections. Every instance needs a connection, so it bounds them too.
MOST_CONNECTIONS = 262143
# Enough of everything: whether the two numbers fit must not depend on the machine that happens to run this.
ROOMY = {"cpus": 1024.0, "memory_mib": 1024 * 1024}
# Unicode's categories of control, format and surrogate characters, and of line and paragraph separators.
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # invisible, but some scripts and emoji need them
# The template's project folder. Its name is split here since the whole would be rendered, and match no folder.
PROJECT = "{" + "{cookiecutter.project_slug}" + "}"


def shown(answer):
    """Quote an answer, on one line and not endlessly."""
    return repr(answer if len(answer) <= 60 else answer[:57] + "...")


def slug_problem(slug):
    """Say why this cannot name a database, a distribution and an image at once; nothing if it can."""
    given = f"project_slug {shown(slug)}"
    if not slug:
        return f"{given} is empty: write a short name, for example my_service"
    if slug in POSTGRES_DATABASES:
        return f"{given} is a database of Postgres's own: choose another name, for example {slug}_service"
    if len(slug) > SLUG_LENGTH:
        return f"{given} has {len(slug)} characters: use at most {SLUG_LENGTH}"
    if not re.fullmatch("[a-z][a-z0-9_]*", slug):
        rule = "use lower-case letters, digits and underscores, and begin with a letter"
    elif slug.endswith("_"):
        rule = "end it with a letter or digit, since it also names the distribution"
    elif "___" in slug:
        rule = "use at most two underscores in a row, since it also names the image"
    else:
        return ""
    words = re.findall("[a-z0-9]+", slug.lower())
    better = "_".join(words)
    return f"{given} cannot be used: {rule}" + (f"; for example {better}" if better[:1].isalpha() else "")


def text_problem(question, text):
    """Say why this cannot be printed in a README, a TOML file and a log line; nothing if it can."""
    given = f"{question} {shown(text)}"
    if not text.strip():
        return f"{given} is empty: {TEXTS[question]}"
    invisible = [c for c in text if unicodedata.category(c) in INVISIBLE and c not in JOINERS]
    if invisible:
        return f"{given} holds the invisible character U+{ord(invisible[0]):04X}: remove it and write one line of text"
    if text != text.strip():
        return f"{given} begins or ends with a space: remove it"
    if re.search(r"\{[#%{]", text):
        return f"{given} holds template syntax, which an update of the project would run: remove the braces"
    return ""


def number_problem(question, number):
    """Say why this is not a number from 1 to Postgres' maximum; nothing if it is."""
    given = f"{question} {shown(number)}"
    if not re.fullmatch("-?[0-9]+", number):
        return f"{given} is not a whole number: {NUMBERS[question]}"
    digits = number.lstrip("-").lstrip("0")
    if number.startswith("-") or not digits:
        return f"{given} is not positive: {NUMBERS[question]}"
    if len(digits) > len(str(MOST_CONNECTIONS)) or int(digits) > MOST_CONNECTIONS:
        return f"{given} is more than Postgres can serve: write {MOST_CONNECTIONS} or less"
    if digits != number:
        return f"{given} begins with a zero: write {digits}"
    return ""


def fit_problem(max_connections, instances, sizing):
    """Say why so many instances cannot share so many connections, by the service's own arithmetic."""
    try:
        sizing.plan(**ROOMY, max_connections=int(max_connections), instances=int(instances))
    except sizing.PlanError as error:
        ways = [
            f"{QUESTIONS[remedy.name]} {remedy.value}"
            for remedy in error.remedies
            if remedy.name in QUESTIONS and remedy.value <= MOST_CONNECTIONS
        ]
        return (
            f"postgres_max_connections {max_connections} and app_instances {instances} do not fit together:"
            f" {error.problem}; what would help: {' or '.join(ways) or 'fewer instances and more connections'}"
        )
    return ""


def problems(answers, sizing=None):
    """List all problems of the answers. Without the arithmetic it stays open whether the numbers fit."""
    # cookiecutter.json swaps a slug that is no safe folder name for one that is, and keeps the answer beside it.
    slug = answers.get("__given_slug", answers["project_slug"])
    found = [slug_problem(slug), *(text_problem(question, answers[question]) for question in TEXTS)]
    counts = {question: str(answers[question]) for question in NUMBERS}
    wrong = [number_problem(question, count) for question, count in counts.items()]
    if sizing and not any(wrong):
        wrong.append(fit_problem(*counts.values(), sizing))
    return [problem for problem in found + wrong if problem]


def find_sizing(answers, environ):
    """Find the arithmetic in the template's folder, or None if the caller does not name that folder (cruft).

    Cookiecutter gives the folder as it was typed, and the hook does not run where it was typed.
    """
    repo = answers.get("_repo_dir")
    for base in (answers.get("_output_dir"), environ.get("PWD")):
        if repo and base and (path := Path(base, repo, PROJECT, "flask_pooling", "sizing.py")).is_file():
            return path
    return None


def load(path):
    """Load the module in one file, without the package around it, and without leaving bytecode beside it."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(f"template_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def again(answers):
    """Return a command that has the good answers, so that nothing is typed twice."""
    given = {name: str(answers[name]) for name in (*TEXTS, *NUMBERS)}
    given["project_slug"] = answers.get("__given_slug", answers["project_slug"])
    wrong = {name for name in TEXTS if text_problem(name, given[name])}
    wrong |= {name for name in NUMBERS if number_problem(name, given[name])}
    wrong |= {"project_slug"} if slug_problem(given["project_slug"]) else set()
    wrong |= set() if wrong else set(NUMBERS)  # each is right alone, and together they do not fit
    good = [shlex.quote(f"{name}={answer}") for name, answer in given.items() if name not in wrong]
    return " ".join([asked_by(), shlex.quote(answers["_template"]), *good])


def asked_by(prefix=sys.prefix, environ=os.environ):
    """Return the command of the cookiecutter that runs this: pipx and uv run one that is not in the PATH."""
    folders = environ.get("PATH", "").split(os.pathsep)
    if any(Path(folder, "cookiecutter").is_file() for folder in folders if folder):
        return "cookiecutter"
    if "pipx" in Path(prefix).parts:
        return "pipx run cookiecutter"
    return "uvx cookiecutter" if "uv" in Path(prefix).parts else f"{shlex.quote(sys.executable)} -m cookiecutter"


def main(answers, environ=os.environ, version=sys.version_info):
    if version < (3, 11):
        found = [f"Python {version[0]}.{version[1]} runs cookiecutter: use Python 3.11 or newer, as the service does"]
    else:
        path = find_sizing(answers, environ)
        found = problems(answers, load(path) if path else None)
    if found:
        print("Refused:", "; ".join(found), file=sys.stderr)
        if "_repo_dir" in answers:  # cruft has other ways to pass answers
            print("To try again (Enter keeps the answers that were right):", again(answers), file=sys.stderr)
            print("What Cookiecutter says below only means that these answers were refused.", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    # Single quotes, since the filter escapes those; backslashes are JSON's.
    sys.exit(main(json.loads(r'{{ cookiecutter | tojson }}')))  # fmt: skip
