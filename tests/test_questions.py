"""The template's questions, and the use of each answer."""

import json
import re
from pathlib import Path

import pytest
from baking import PROJECT, Bake, Run, files

QUESTIONS = [
    "project_name",
    "project_slug",
    "description",
    "author_name",
    "postgres_max_connections",
    "app_instances",
]


@pytest.fixture(scope="module")
def asked(template: Path) -> dict:
    return json.loads((template / "cookiecutter.json").read_text())


def test_six_questions(asked: dict):
    """Six questions are asked, in this order; all else in cookiecutter.json is private."""
    assert [key for key in asked if not key.startswith("_")] == QUESTIONS


def test_prompts_are_for_people(asked: dict):
    """Every question has a sentence of its own, and there is no sentence without a question."""
    assert list(asked["__prompts__"]) == QUESTIONS
    for prompt in asked["__prompts__"].values():
        assert " " in prompt
        assert "_" not in prompt.replace("max_connections", "").replace("0-9 and _", "")


def test_defaults_bake(project: Path):
    """The defaults are good answers."""
    assert project.name == "my_service"
    assert "max_connections" in (project / "app" / "config.py").read_text().lower()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("project_name", "Zebra Crossing"),
        ("project_slug", "zebra_crossing"),
        ("description", "Lets zebras cross."),
        ("author_name", "Zebra Herself"),
        ("postgres_max_connections", "321"),
        ("app_instances", "7"),
    ],
)
def test_every_answer_is_used(bake: Bake, project: Path, question: str, answer: str):
    """Each answer, changed alone, changes a file, and stands in it."""
    before, after = files(project), files(bake(**{"project_slug": "my_service", question: answer}))
    assert before.keys() == after.keys()
    changed = [text.decode() for name, text in after.items() if text != before[name]]
    assert changed
    assert any(re.search(rf"\b{re.escape(answer)}", text) for text in changed)


def test_every_private_key_is_used(asked: dict, template: Path):
    """No key of cookiecutter.json is left over: the project, a hook or cookiecutter itself reads it."""
    own = {"__prompts__", "_jinja2_env_vars", "_copy_without_render"}
    source = "".join(
        path.read_text(errors="ignore")
        for folder in (PROJECT, "hooks")
        for path in (template / folder).rglob("*")
        if path.is_file()
    )
    private = [key for key in asked if key.startswith("_") and key not in own]
    assert [key for key in private if key not in source] == []


def test_copied_files_exist(asked: dict, template: Path):
    """Every file that is copied without rendering is there."""
    for pattern in asked["_copy_without_render"]:
        assert list((template / PROJECT).glob(pattern)), pattern


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("My Service", "my_service"),
        ("Crème Brûlée", "creme_brulee"),
        ("Smith & Sons", "smith_sons"),
        ('Bob\'s "Best" Service', "bob_s_best_service"),
        ("  ...dots.and-dashes -- ", "dots_and_dashes"),
        ("ÅNGSTRÖM_2000", "angstrom_2000"),
        ("東京", "dong_jing"),
        ("3 Little Pigs", "app_3_little_pigs"),
        ("9" * 50, "app_" + "9" * 36),
        ("!!!", "my_service"),
        ("word " * 20, "word_word_word_word_word_word_word_word"),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_slug_derives_from_the_name(cli: Run, template: Path, tmp_path: Path, name: str, slug: str):
    """The slug that is offered for a name is a valid one, at most 40 characters long, with no underscore at its end."""
    cli(template, "--no-input", "--accept-hooks=no", f"project_name={name}", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [slug]
    assert re.fullmatch("[a-z](?:[a-z0-9_]{0,38}[a-z0-9])?", slug)
