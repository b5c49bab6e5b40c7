"""Requirements are pinned once, with hashes, and say nothing about where they came from."""

import re
from pathlib import Path

import pytest
import yaml
from baking import PROJECT, ROOT

LOCKS = [
    ROOT / "requirements" / "bake.txt",
    ROOT / "requirements" / "test.txt",
    ROOT / "requirements" / "deploy.txt",
    ROOT / "requirements" / "blocks.txt",
    ROOT / PROJECT / "requirements" / "prod.txt",
    ROOT / PROJECT / "requirements" / "dev.txt",
    ROOT / "tests" / "bench" / "requirements.txt",
]
BAKE, TEST, DEPLOY, BLOCKS, PROD, DEV, BENCH = LOCKS


def pins(lock: Path) -> dict[str, str]:
    """Read the version of each package in a lock file."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;\\]+)", lock.read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_pinned_with_hashes(lock: Path):
    """Each requirement has one version and at least one hash."""
    for requirement in re.sub(r"\\\n", " ", lock.read_text()).splitlines():
        if requirement and not requirement.lstrip().startswith("#"):
            assert re.fullmatch(r"[a-z0-9-]+==[^ ]+( ; [^\\]+?)?( +--hash=sha256:[0-9a-f]{64})+ *", requirement)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_no_address_and_no_path(lock: Path):
    """A lock file names no package index and no folder of the machine that made it."""
    text = lock.read_text()
    assert "://" not in text
    assert not re.search(r"(^|\s)/\w", text)
    assert ("{" + "{" in text) == (lock in {TEST, DEPLOY, BLOCKS, BENCH})


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_robot_can_renew_it(lock: Path):
    """Its header has the options with which it was compiled. Dependabot takes them from there, in its ecosystem `uv`.
    In `pip`, it would compile for one Python only."""
    folder = ROOT / PROJECT if lock in {PROD, DEV} else ROOT
    name = lock.relative_to(folder)
    command = lock.read_text().splitlines()[1]
    assert command.startswith("#    uv pip compile --universal --generate-hashes --python-version 3.11 ")
    assert command.endswith(f" {name.with_suffix('.in')} -o {name}")
    robot = yaml.safe_load((folder / ".github" / "dependabot.yml").read_text())
    (uv,) = (update for update in robot["updates"] if update["package-ecosystem"] == "uv")
    assert f"/{name.parent}" in uv.get("directories", [uv.get("directory")])
    assert "pip" not in {update["package-ecosystem"] for update in robot["updates"]}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_holds_what_is_asked_for(lock: Path):
    """Every name in the .in file is pinned in the .txt file beside it."""
    asked = re.findall(r"^([a-z][a-z0-9-]*)", lock.with_suffix(".in").read_text(), re.MULTILINE)
    assert asked
    assert [name for name in asked if name not in pins(lock)] == []


@pytest.mark.parametrize(("smaller", "larger"), [(PROD, DEV), (PROD, BENCH), (BAKE, TEST)])
def test_one_is_part_of_the_other(smaller: Path, larger: Path):
    """Tests run on the versions that the service runs on: the larger set holds the smaller."""
    assert pins(smaller).items() <= pins(larger).items()


def test_one_version_across_the_repository():
    """A package that both the template's tests and the project need has one version."""
    template, project = pins(TEST), pins(DEV)
    assert {name for name in template.keys() & project.keys() if template[name] != project[name]} == set()
