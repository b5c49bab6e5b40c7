"""Random environments against the settings, in one process: `python random_environments.py COUNT SEED`."""

import json
import os
import sys
from collections import Counter
from unittest import mock

import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

from app.config import Settings
from flask_pooling import PlanError, SettingsError, process
from flask_pooling.engine import engine_options

NAMES = {name.upper() for name in Settings.model_fields}
SECRET = "correcthorsebatterystaple0123456789xyz"  # noqa: S105
PASSWORD = "hunter2hunter2"  # noqa: S105
NUMBER = st.integers(0, 40).map(str) | st.integers(-5, 10**7).map(str) | st.floats(allow_nan=True).map(str)
CHOICE = st.sampled_from(
    ["production", "development", "testing", "none", "pgbouncer", "enforce", "off", "sync", "gthread"]
)
URL = st.sampled_from(
    [
        f"postgresql://app:{PASSWORD}@db/service",
        f"postgres://app:{PASSWORD}@db:5432/service?sslmode=require",
        f"mysql://app:{PASSWORD}@db/service",
        f"postgresql://app:{PASSWORD}@db:port/service",
        f"postgresql://app:{PASSWORD}@/service?host=one:5432,two:5432",
        f"postgresql://app:{PASSWORD}@/service?host=one&port=port",
        "sqlite:///file.db",
        "sqlite://",
        "sqlite:///:memory:",
        f"app:{PASSWORD}",
    ]
)
VALUE = st.text(max_size=20).map(lambda text: text.replace("\0", "")) | NUMBER | CHOICE
MISSPELT = st.sampled_from(
    ["DB_POOLSIZE", "WEB_CONCURENCY", "APP_ENVIRONMENT", "DB_PORT", "WEB_SERVICE_HOST", "SQLALCHEMY_POOL_SIZE"]
)
SANE = st.fixed_dictionaries({"APP_ENV": CHOICE.filter(lambda v: v in {"production", "development", "testing"}),
                              "DATABASE_URL": URL, "SECRET_KEY": st.just(SECRET)})  # fmt: skip
WILD = st.dictionaries(
    st.sampled_from(sorted(NAMES)) | MISSPELT, VALUE | URL.filter(lambda url: "://" in url), max_size=4
)
SMALL = st.dictionaries(
    st.sampled_from(sorted(NAMES - {"APP_ENV", "DATABASE_URL", "SECRET_KEY"})), NUMBER | CHOICE, max_size=2
)

outcomes: Counter[str] = Counter()


WEB = {"APP_ENV": "production", "DATABASE_URL": "postgresql://app@db/service", "SECRET_KEY": SECRET}


@seed(int(sys.argv[2]))
@settings(max_examples=int(sys.argv[1]), deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.one_of(SMALL, WILD), SANE)
@example({"WEB_WORKER_MEMORY_MIB": "90000"}, WEB)  # more than there is: the plan refuses it, not the settings
def start(changes: dict[str, str], sane: dict[str, str]) -> None:
    environ = {**sane, **changes}
    try:
        with mock.patch.dict(os.environ, environ, clear=True):
            made = Settings.load()
            process.of(made)
            plan = made.plan
    except (SettingsError, PlanError) as error:
        refusal = error
    else:
        refusal = None
    if refusal:
        outcomes["refused"] += 1
        text = str(refusal)
        assert text.strip(), "refused without a reason"
        assert len(text) < 5000, "an endless error"
        assert not [part for part in (PASSWORD, SECRET) if part in text], f"a secret in: {text}"
        return
    outcomes["served"] += 1
    sa.create_engine(made.database, **engine_options(made, made.database, process="web"))
    assert not [part for part in (PASSWORD, SECRET) if part in repr(made)], "a secret in the settings' repr"
    assert plan.slots >= 2
    assert plan.pooler != "none" or plan.connections_peak <= plan.connections_usable, plan
    assert plan.connections_per_worker >= plan.threads, plan


start()
json.dump(outcomes, sys.stdout)
