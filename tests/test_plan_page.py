"""docs/plan/index.html in a real browser: the arithmetic of sizing.py, a form that its URL restores, and blocks that
open what the page says."""

import json
import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import chromium
import pytest
from baking import PROJECT, ROOT, load

PAGE = ROOT / "docs" / "plan" / "index.html"
sizing = load(ROOT / PROJECT / "flask_pooling" / "sizing.py")
INPUTS = 10_000
# What the page's own functions say of many inputs at once.
OUTCOMES = """
(%s).map((numbers) => {
  try {
    const p = plan(numbers);
    return { workers: p.workers, threads: p.threads, pool_size: p.pool_size, notes: p.notes, sum: sum(p),
      connections_per_instance: connectionsPerInstance(p), connections_peak: connectionsPeak(p),
      connections_usable: connectionsUsable(p), role_limit: roleLimit(p), pooler_sizes: poolerSizes(p),
      others: serversOf(p).slice(1).map((each) => [each.server, sum(each), connectionsPeak(each), roleLimit(each)]) };
  } catch (error) {
    if (!(error instanceof PlanError)) throw error;
    return { error: error.message, remedies: error.remedies.map(({ name, value }) => [name, value]) };
  }
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    with chromium.opened() as page:
        yield page


def numbers(chance: random.Random) -> dict[str, Any]:
    """Draw inputs of a plan: mostly of everyday size, so that many just fit or just do not; some at the limits."""

    def one(usual: int, most: int, least: int = 1) -> int:
        return chance.choice([chance.randint(least, usual)] * 9 + [chance.randint(least, most)])

    def perhaps(usual: int, most: int) -> int | None:
        return one(usual, most) if chance.random() < 0.25 else None

    names = chance.sample(["worker", "beat", "mail"], chance.choice([0, 0, 1, 2, 3]))
    made = {
        "cpus": chance.choice([chance.randint(1, 16), round(chance.uniform(0.01, 16), 2), chance.uniform(0.01, 4096)]),
        "memory_mib": chance.choice([128, 256, 512, 1024, 2048, chance.randint(1, 500), one(16_384, 1_000_000)]),
        "max_connections": one(500, 262_143),
        "instances": one(20, 262_143),
        "reserved": one(20, 100_000, least=0),
        "worker_class": chance.choice(["gthread", "gthread", "sync"]),
        "worker_memory_mib": chance.choice([150, one(600, 100_000)]),
        "workers": perhaps(14, 1000),
        "threads": perhaps(8, 1000),
        "pool_size": perhaps(12, 1000),
        "max_overflow": chance.choice([0, 0, one(10, 1000)]),
        "pooler": chance.choice(["none", "none", "pgbouncer"]),
        "poolers": one(6, 1000),
        "binds": chance.choice([0, 0, one(4, 100)]),
        "jobs": {name: {"copies": one(10, 99_999), "connections": one(10, 99_999)} for name in names},
        "bind_servers": {
            name: {"max_connections": one(300, 262_143), "reserved": one(20, 100_000, least=0)}
            for name in chance.sample(["a", "b+c", "d.e-f+g+h"], chance.choice([0, 0, 1, 2]))
        },
    }
    if chance.random() < 0.2:  # where the sum is about to fit exactly
        made["max_connections"] = (
            3 + made["reserved"] + (1 + made["binds"]) * chance.randint(0, 16) + chance.randint(0, 1)
        )
    return made


def outcome(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return sizing.py's answer, in the form of OUTCOMES."""
    jobs = {name: sizing.Job(**job) for name, job in inputs["jobs"].items()}
    servers = {name: sizing.BindServer(**each) for name, each in inputs["bind_servers"].items()}
    try:
        plan = sizing.plan(**inputs | {"jobs": jobs, "bind_servers": servers})
    except sizing.PlanError as error:
        return {"error": str(error), "remedies": [[each.name, each.value] for each in error.remedies]}
    first, *others = plan.servers.values()
    names = ("workers", "threads", "pool_size", "sum", "connections_per_instance", "connections_peak")
    names += ("connections_usable", "role_limit", "pooler_sizes")
    more = [[each.server, each.sum, each.connections_peak, each.role_limit] for each in others]
    return {name: getattr(first, name) for name in names} | {"notes": list(plan.notes), "others": more}


def test_the_arithmetic_is_that_of_the_library(browser: chromium.Page, request: pytest.FixtureRequest):
    """Numbers, notes, errors and what would help are the same for 10,000 random inputs. One that differed is tried
    again in the next run."""
    seed = random.randrange(2**32)  # noqa: S311  # no secret
    chance = random.Random(seed)  # noqa: S311
    print(f"seed {seed}")
    browser.open(PAGE.as_uri())
    assert request.config.cache
    kept = request.config.cache.get("plan_page/different", [])
    inputs = [*kept, *(numbers(chance) for _ in range(INPUTS))]
    said = browser.ask(OUTCOMES % json.dumps(inputs))
    expected = [outcome(each) for each in inputs]
    different = [(given, want, got) for given, want, got in zip(inputs, expected, said, strict=True) if want != got]
    request.config.cache.set("plan_page/different", [given for given, _, _ in different[:1]])
    assert different[:1] == [], f"{len(different)} of {INPUTS} differ; seed {seed}"
    # As many kinds of answer as there are. Otherwise this would say little.
    errors = [each["error"] for each in expected if "error" in each]
    assert INPUTS / 5 < len(errors) < INPUTS * 4 / 5
    kinds = ("a sync worker has", "is less than WEB_THREADS", "no connection is left for pgbouncer", "the jobs alone")
    kinds += ("the server of ", "help: DB_BIND_SERVERS=", "the server of d.e-f+g+h: no connection is left for")
    kinds += ("for the master holds fewer", "has to serve at least", "slots each = ")
    assert [kind for kind in kinds if not any(kind in error for error in errors)] == []


# --- the page ---------------------------------------------------------------------------------------------------------

SIZES = {"narrow": (390, 844), "wide": (1280, 900)}
FITS = "instances=2&jobs=worker%3D2x4%2Cbeat%3D1x1"
QUERIES = {
    "fits": FITS,
    "does not fit": "instances=60",
    "behind poolers": "replicas=6&surge=1&pooler=pgbouncer&poolers=2&preset=neon-0.25-cu",
    "wrong": "instances=x&cpus=nan&jobs=Worker&pooler=odyssey&preset=none-such",
}
# Everything at once, each with a value of its own.
ALL = {
    "instances": "7", "replicas": "5", "surge": "1", "cpus": "3.5", "memory_mib": "2048", "preset": "supabase-large",
    "max_connections": "160", "reserved": "12", "jobs": "worker=2x4,beat=1x1", "binds": "1", "pooler": "pgbouncer",
    "bind_servers": "reports=100,audit+archive=200:5",
    "poolers": "2", "workers": "3", "threads": "2", "pool_size": "3", "max_overflow": "1", "worker_class": "gthread",
    "worker_memory_mib": "200", "seconds": "0.1",
}  # fmt: skip
FORM = "Object.fromEntries(Object.keys(FIELDS).map((name) => [name, id(name).value]))"
TEXT = "document.getElementById('{}').textContent"
CONTRAST = """
(() => {
  const numbers = (colour) => (colour.match(/[0-9.]+/g) || []).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(node.parentNode) : colour;
  };
  return [...document.querySelectorAll("main *")]
    .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .filter((node) => node.checkVisibility() && !["OPTION", "OPTGROUP"].includes(node.tagName))
    .map((node) => {
      const [one, other] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
      return [(one + 0.05) / (other + 0.05), node.outerHTML.slice(0, 80)];
    }).filter(([contrast]) => contrast < 4.5);
})()
"""


def opened(browser: chromium.Page, query: str, *size: int, scheme: str = "light") -> None:
    browser.console.clear()
    browser.open(f"{PAGE.as_uri()}?{query}", *(size or SIZES["wide"]), scheme)


def text(browser: chromium.Page, name: str) -> str:
    return str(browser.ask(TEXT.format(name)))


def query_of(browser: chromium.Page) -> dict[str, str]:
    return browser.ask("Object.fromEntries(new URLSearchParams(location.search))")


def test_it_is_small_and_asks_nobody(browser: chromium.Page):
    """It is one file, of less than 80 kB. It asks for nothing else, and could not: its own policy forbids it."""
    assert PAGE.stat().st_size < 80_000
    assert [path.name for path in PAGE.parent.iterdir()] == ["index.html"]
    opened(browser, FITS)
    assert browser.console == []
    assert browser.ask("performance.getEntriesByType('resource').length") == 0
    sent = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    answer = browser.tell("Runtime.evaluate", expression=sent, awaitPromise=True, returnByValue=True)
    assert answer["result"]["value"] == "refused"
    assert "violates the following Content Security Policy" in browser.console[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("query", QUERIES)
def test_it_fits_every_screen(browser: chromium.Page, query: str, size: str, scheme: str):
    """Nothing sticks out, the colours are those that were asked for, and every text stands out from what is behind."""
    opened(browser, QUERIES[query], *SIZES[size], scheme=scheme)
    assert browser.console == []
    assert browser.ask("document.documentElement.scrollWidth") == SIZES[size][0]
    colour = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) > 3 * 128) == (scheme == "light")
    assert browser.ask(CONTRAST) == []


@pytest.mark.parametrize("query", ["fits", "does not fit", "behind poolers"])
def test_nothing_is_said_by_colour_alone(browser: chromium.Page, query: str):
    """Each part of the bar has a pattern that no other has, and its number in words; so has the verdict."""
    opened(browser, QUERIES[query])
    patterns = browser.ask("[...document.querySelectorAll('#bar i')].map((i) => getComputedStyle(i).backgroundImage + "
                           "(i.className === 'free'))")  # fmt: skip
    assert len(patterns) >= 3
    assert len(set(patterns)) == len(patterns)
    key = browser.ask("[...document.querySelectorAll('#key li')].map((li) => li.textContent)")
    assert len(key) == len(patterns) + 1
    said = browser.ask("id('bar').getAttribute('aria-label')")
    assert [words for words in key[:-1] if words not in said] == []
    assert text(browser, "verdict")[0] == ("✕" if query == "does not fit" else "✓")


def test_a_shared_url_restores_the_form(browser: chromium.Page):
    """Every field comes back, and what the page makes of it. What the page puts into its URL is the same again."""
    opened(browser, urlencode(ALL))
    assert browser.ask(FORM) == ALL
    said = text(browser, "sum")
    assert said.startswith(
        "7 instances x 3 workers x (3 + 1) x 2 databases + 18 for jobs = 186 clients of 2 x pgbouncer"
    )
    assert [line.partition(" x (3 + 1)")[0] for line in said.split("\n")[1:]] == [
        "the server of reports: 7 instances x 3 workers",
        "the server of audit+archive: 7 instances x 3 workers",
    ]
    browser.ask("changed({ target: id('cpus') })")
    assert query_of(browser) == ALL
    browser.open(browser.ask("location.href"))
    assert (browser.ask(FORM), text(browser, "sum")) == (ALL, said)


def test_the_fields_are_the_numbers_of_the_plan(browser: chromium.Page):
    """The names in the URL are those of `flask pool plan --json`, and four for what is not a number of the plan."""
    opened(browser, "")
    fields = set(browser.ask("Object.keys(FIELDS)"))
    names = set(sizing.Plan.__dataclass_fields__) - {"notes", "server"}
    assert fields - {"replicas", "surge", "preset", "seconds"} == names


def test_each_change_is_in_the_url(browser: chromium.Page):
    """Nothing is in it before; afterwards a reader who is sent it sees the same."""
    opened(browser, "")
    assert query_of(browser) == {}
    browser.ask("id('instances').select()")
    browser.tell("Input.insertText", text="60")
    assert query_of(browser)["instances"] == "60"
    assert text(browser, "error").startswith("60 instances x 2 connections for 2 slots each = 120 > 87 usable")
    browser.ask("id('reset').click()")
    assert query_of(browser) == {}
    assert text(browser, "sum").startswith("2 instances x 3 workers x (4 + 0) = 24 of 87 connections")


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("instances=x", "instances='x': is not a whole number from 1 to 262143"),
        ("instances=0", "instances='0': is not a whole number from 1 to 262143"),
        ("instances=-1", "instances='-1': is not"),
        ("instances=1e3", "instances='1e3': is not"),
        ("instances=99999999999999999999", "is not a whole number"),
        ("cpus=nan", "cpus='nan': is not a number from 0.01 to 4096"),
        ("cpus=Infinity", "cpus='Infinity': is not a number"),
        ("jobs=worker", "jobs='worker': each job is name=COPIESxCONNECTIONS"),
        ("jobs=a%3D1x1%2Ca%3D2x2", "a is given twice"),
        ("jobs=web%3D1x1", "web is a reserved name"),
        ("jobs=__proto__%3D1x1", "each job is name="),
        ("bind_servers=reports", "bind_servers='reports': each server is BIND=MAX_CONNECTIONS"),
        ("bind_servers=a%3D50%2Cb%2Ba%3D50", "a is given twice"),
        ("pooler=odyssey", "pooler='odyssey': is not one of none, pgbouncer"),
        ("worker_class=gevent", "worker_class='gevent': is not one of gthread, sync"),
        ("surge=some&replicas=2", "surge='some': is not a number of pods"),
        ("preset=constructor", "preset='constructor': is not a plan that is known here"),
        ("instances=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E", "instances='<img src=x onerror=alert(1)>': is not"),
    ],
)
def test_a_wrong_value_in_the_url(browser: chromium.Page, query: str, problem: str):
    """It is shown where it was entered and named with its value, and the page works on when it is corrected."""
    opened(browser, query)
    assert problem in text(browser, "error")
    assert text(browser, "sum") == ""
    assert browser.ask("document.querySelectorAll('[aria-invalid=true]').length") == 1
    assert browser.ask("document.querySelectorAll('#error *').length") == 0
    browser.ask("id('reset').click()")
    assert text(browser, "sum").startswith("2 instances")
    assert browser.console == []


def test_pods_of_a_rolling_deploy(browser: chromium.Page):
    """Instances may be reckoned from replicas and surge, as the generated tests/test_deploy.py does."""
    for query, pods in (("replicas=4&surge=1", "6"), ("replicas=4", "6"), ("replicas=2&surge=100%25", "4"),
                        ("replicas=1", "2"), ("replicas=10&surge=0", "10")):  # fmt: skip
        opened(browser, query)
        assert browser.ask("id('instances').value") == pods
        assert browser.ask("id('instances').readOnly")


def test_presets(browser: chromium.Page):
    """Each fills in the limit, and what the provider keeps for itself; its source and the day are said."""
    opened(browser, "")
    presets = browser.ask("PRESETS")
    assert len(presets) > 40
    for key, preset in presets.items():
        assert preset["source"].startswith("https://"), key
        assert preset["limit"] >= 20
        assert preset["reserved"] == 7 + preset["kept"]
    browser.ask("id('preset').value = 'azure-b1ms'; changed({ target: id('preset') })")
    assert (query_of(browser)["max_connections"], query_of(browser)["reserved"]) == ("50", "22")
    assert "learn.microsoft.com" in text(browser, "preset-hint")
    assert "read on 20" in text(browser, "preset-hint")
    browser.ask("id('max_connections').value = '51'; changed({ target: id('max_connections') })")
    assert "preset" not in query_of(browser)
    opened(browser, "preset=render-16-gb")
    assert "of 387 connections (400 - 3" in text(browser, "sum")


FOCUSABLE = "[...document.querySelectorAll('input, select, button, a[href], pre')].filter((n) => n.checkVisibility())"


def test_by_keyboard(browser: chromium.Page):
    """Tab goes through all of it in the order in which it is read, and shows where it is. A remedy and a copy are one
    Enter each."""
    opened(browser, "instances=60")
    browser.tell("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    count = browser.ask(f"window.order = {FOCUSABLE}; order.length")
    for position in range(count):
        browser.press("Tab", 9)
        assert browser.ask("order.indexOf(document.activeElement)") == position
        assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.ask("document.querySelectorAll('#remedies button')[1].focus()")
    browser.press("Enter", 13, "\r")
    assert query_of(browser)["instances"] == "43"
    assert text(browser, "verdict").startswith("✓ It fits")
    assert browser.ask("document.activeElement.id") == "verdict"
    while browser.ask("document.activeElement.textContent") != "Copy":
        browser.press("Tab", 9)
    browser.press("Enter", 13, "\r")
    browser.wait_for("id('copied').textContent === 'Copied: Environment'")
    read = {"expression": "navigator.clipboard.readText()", "awaitPromise": True}
    assert browser.tell("Runtime.evaluate", **read)["result"]["value"] == text(browser, "block-environment")


@pytest.mark.parametrize("query", QUERIES)
def test_a_screen_reader_has_a_name_for_everything(browser: chromium.Page, query: str):
    """Each control and each picture has a name; an error is announced with its field."""
    opened(browser, QUERIES[query])
    nodes = browser.tell("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "combobox", "button", "link", "img", "image", "form", "region", "group", "list"}
    named = {role: [] for role in roles}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if not node["ignored"] and role in roles:
            named[role].append(node.get("name", {}).get("value", ""))
    assert len(named["textbox"]) >= 14
    assert len(named["combobox"]) == 3
    assert [(role, names) for role, names in named.items() if role != "list" and not all(names)] == []
    assert all(len(set(named[role])) == len(named[role]) for role in ("textbox", "combobox", "button"))
    assert browser.ask("[id('verdict'), id('sum'), id('error')].every((n) => n.closest('[role=status]'))")
    described = browser.ask("[...document.querySelectorAll('[aria-invalid=true]')].map((n) => "
                            "id(n.getAttribute('aria-describedby') || '')?.textContent)")  # fmt: skip
    assert all(described) or query != "wrong"
