"""Names and values as real environments have them: injected by others, misspelt, with bytes around them."""

import re
from typing import ClassVar

import pytest

from flask_pooling import Settings, SettingsError

pytestmark = [pytest.mark.sqlite, pytest.mark.usefixtures("production")]  # no database in it: once is enough

# Of Kubernetes for its Services, of Docker's links, of hosting platforms, of CI, and of other frameworks.
FOREIGN = """
    DB_PORT DB_HOST DB_NAME DB_USER DB_USERNAME DB_PASS DB_PASSWORD DB_DATABASE DB_URL DB_URI DB_DSN DB_DRIVER
    DB_ENGINE DB_DIALECT DB_CONNECTION DB_SSL DB_SSLMODE DB_SCHEMA DB_CHARSET DB_ROOT_PASSWORD DB_HOSTNAME
    DB_PREFIX DB_ADDR DB_VENDOR DB_TYPE DB_SOCKET DB_READ_HOST DB_WRITE_HOST DB_REPLICA_URL DB_INSTANCE
    DB_BACKUP DB_BACKUP_S3_BUCKET DB_MIGRATE DB_ADAPTER DB_CLUSTER_ID DB_SECRET_ARN DB_IAM_ROLE
    DB_PROXY_ENDPOINT DB_LOG_LEVEL DB_ECHO DB_DEBUG DB_CA_CERT DB_TEST_NAME DB_1_NAME DB_1_PORT
    DB_ENV_POSTGRES_PASSWORD DB_ENV_PG_VERSION DB_SERVICE_HOST DB_SERVICE_PORT DB_SERVICE_PORT_POSTGRES
    DB_PORT_5432_TCP DB_PORT_5432_TCP_ADDR DB_PORT_5432_TCP_PORT DB_PORT_5432_TCP_PROTO DB_POOLER_SERVICE_HOST
    DB_POOLER_SERVICE_PORT DB_POOLER_PORT DB_POOLER_PORT_6432_TCP DB_POOLER_PORT_6432_TCP_ADDR
    DB_POOLER_PORT_6432_TCP_PORT DB_POOLER_PORT_6432_TCP_PROTO DB_PRIMARY_SERVICE_HOST DB_REPLICA_PORT
    DB_PROD_PORT DB_POOL_SERVICE_HOST DB_POOL_SERVICE_PORT DB_POOL_PORT DB_POOL_PORT_5432_TCP_ADDR
    DB_MAX_SERVICE_HOST DB_BINDS_SERVICE_HOST WEB_PORT WEB_URL WEB_DOMAIN WEB_ROOT WEB_USER WEB_PASSWORD
    WEB_NAME WEB_ENV WEB_SERVER WEB_SERVICE_HOST WEB_SERVICE_PORT WEB_SERVICE_PORT_HTTP WEB_PORT_80_TCP
    WEB_PORT_80_TCP_ADDR WEB_PORT_80_TCP_PORT WEB_PORT_80_TCP_PROTO WEB_PROD_PORT WEB_PROD_SERVICE_HOST
    WEB_PROD_SERVICE_PORT WEB_PROD_PORT_80_TCP WEB_PROD_PORT_80_TCP_ADDR WEB_PROD_PORT_80_TCP_PORT
    WEB_PROD_PORT_80_TCP_PROTO WEB_PROXY_PORT WEB_PROXY_SERVICE_HOST WEB_PROXY_PORT_80_TCP_PORT
    WEB_PROBE_SERVICE_HOST WEB_PROBE_SERVICE_PORT WEB_PROBE_PORT_80_TCP_ADDR WEB_PROBE_PORT_80_TCP_PORT
    WEB_HOST_SERVICE_HOST WEB_HOST_PORT WEB_HOST_PORT_80_TCP WEB_WORKER_SERVICE_HOST WEB_WORKER_PORT
    WEB_WORKER_SERVICE_PORT WEB_ENV_NODE_VERSION WEB_1_PORT WEB_1_NAME WEB_MEMORY WEB_DYNO WEB_SOCKET_URL
    WEB_CONCURRENCY_SET_BY WEB_VITALS_ID WEB_BASE_URL WEB_API_KEY WEB_IMAGE WEB_TAG WEB_REPLICAS WEB_CPU
    WEB_LOG_LEVEL WEB_PUBLIC_URL WEB_STATIC_ROOT WEB_CONSOLE_PORT WEB_TEST_PORT WEB_DEV_PORT WEB_PREPROD_PORT
    WEB_PROMO_PORT WEB_PROD2_PORT WEB_HTTP_PORT WEB_HTTPS_PORT WEB_WORKERS WEB_MAX_REQUESTS WEB_RELOAD
    WEB_ACCESS_LOG WEB_BIND WEB_KEEPALIVE APP_NAME APP_PORT APP_URL APP_KEY APP_DEBUG APP_ID APP_ROOT APP_HOME
    APP_DIR APP_PATH APP_USER APP_VERSION APP_SECRET APP_HOST APP_DOMAIN APP_TIMEZONE APP_LOCALE
    APP_SERVICE_HOST APP_SERVICE_PORT APP_PORT_8000_TCP APP_PORT_8000_TCP_ADDR APP_PORT_8000_TCP_PORT
    APP_PORT_8000_TCP_PROTO APP_PROD_PORT APP_JOBS_SERVICE_HOST APP_JOBS_SERVICE_PORT APP_JOBS_PORT
    APP_JOBS_PORT_80_TCP_ADDR APP_ENV_NODE_VERSION APP_ENVIRONMENT APP_CONFIG APP_LOG_LEVEL APP_BUILD_ID
    APP_COMMIT APP_GIT_SHA APP_REGION APP_INSTANCE_ID APP_INSTANCE_NAME APP_INSTANCE_INDEX APP_SETTINGS
    APP_MODULE APP_FILE APP_STAGE APP_TIER APP_ENDPOINT APP_ENVS_DIR APP_RUNTIME APP_INSIGHTS_KEY APP_TOKEN
    APP_POOL_ID APP_POOL_CONFIG DYNO HEROKU_APP_NAME HEROKU_APP_ID HEROKU_SLUG_COMMIT HEROKU_POSTGRESQL_AQUA_URL
    RENDER RENDER_SERVICE_ID RENDER_INSTANCE_ID FLY_APP_NAME FLY_REGION FLY_ALLOC_ID K_SERVICE K_REVISION
    HOSTNAME RAILWAY_ENVIRONMENT RAILWAY_SERVICE_NAME GITHUB_ACTIONS GITHUB_TOKEN CI JENKINS_URL BUILD_NUMBER
    VERCEL_ENV VERCEL_URL VERCEL_GIT_COMMIT_SHA DATABASE_URL_UNPOOLED DATABASE_PRIVATE_URL DATABASE_PUBLIC_URL
    DATABASE_URI POSTGRES_URL POSTGRES_PRISMA_URL POSTGRES_URL_NON_POOLING PGHOST_UNPOOLED SECRET_KEY_BASE
    KUBERNETES_SERVICE_HOST KUBERNETES_PORT KUBERNETES_PORT_443_TCP_ADDR WEBSITE_HOSTNAME WEBSITES_PORT
    WEBSITE_INSTANCE_ID AWS_EXECUTION_ENV ECS_CONTAINER_METADATA_URI COMPOSE_PROJECT_NAME CELERY_BROKER_URL
    REDIS_URL MAX_CONNECTIONS STATEMENT_TIMEOUT POOL_SIZE UVICORN_PORT WEBHOOK_TIMEOUT WEBDRIVER_TIMEOUT WEBHOST
    MAPP_ENV
"""
MISSPELT = """
    DB_POOLSIZE DB_POOL_SZIE DB_POOL_SIZES DB_POOL_SIZ DB_POOL_SISE DB_POOLS_SIZE DB_POL_SIZE DB_POOL__SIZE
    DB_POOL_SIZE_ DB_POOL DB_POOLL_SIZE DB_POOL-SIZE DB_MAX_CONNECTION DB_MAXCONNECTIONS DB_MAX_CONECTIONS
    DB_MAX_CONNECTONS DB_MAX_CONNEXIONS DB_MAX_CONNECTIOSN DB_MAXIMUM_CONNECTIONS DB_MAX_OVERLOW DB_MAXOVERFLOW
    DB_MAX_OVERFLOWS DB_MAX_OVER_FLOW DB_MAX_OVERFOLW DB_MAX_OVERLFOW DB_STATMENT_TIMEOUT DB_STATEMENT_TIMOUT
    DB_STATEMENT_TIME_OUT DB_STATEMENTS_TIMEOUT DB_STATEMENT_TIMEOUTS DB_STATEMENT_TIMEOUT_MS DB_BUDGETCHECK
    DB_BUGDET_CHECK DB_BUDGET_CHEK DB_BUDGET_CHECKS DB_POOL_TIMOUT DB_POOLTIMEOUT DB_POOL_TIMEOUTS
    DB_POOL_TIEMOUT DB_CONECT_TIMEOUT DB_CONNECT_TIMOUT DB_CONNECTION_TIMEOUT DB_CONNECT_TIME_OUT
    DB_CONNNECT_TIMEOUT DB_MAX_LIFE_TIME DB_MAX_LIFTIME DB_MAXLIFETIME DB_MAX_LIVETIME DB_RESERVED_CONNECTION
    DB_RESERVE_CONNECTIONS DB_RESERVEDCONNECTIONS DB_RESEVED_CONNECTIONS DB_RESERVED_CONECTIONS DB_POLER
    DB_POOLRES DB_BIND DB_BNIDS WEB_TREADS WEB_THREAD WEB_THRAEDS WEB_THREDS WEB_THREEADS WEB_CONCURENCY
    WEB_CONCURRENCE WEB_CONCURRANCY WEB_CONCURRENY WEB_CONCURRENCIES WEB_CONCURRRENCY WEB_TIMOUT WEB_TIME_OUT
    WEB_TIMEOUTS WEB_GRACEFULL_TIMEOUT WEB_GRACEFUL_TIMOUT WEB_GRACEFULTIMEOUT WEB_GRACEFULY_TIMEOUT
    WEB_GRACE_TIMEOUT WEB_TRUSTED_PROXY WEB_TRUSTED_PROXYS WEB_TRUSTEDPROXIES WEB_TRUST_PROXIES
    WEB_TRUSTET_PROXIES WEB_WORKERCLASS WEB_WORKER_CLAS WEB_WORKERS_CLASS WEB_WORKER_MEMORY WEB_WORKER_MEMORY_MB
    WEB_WORKER_MEM_MIB WEB_WORKER_MEMROY_MIB WEB_WORKER_MEMORY_MIBS WEB_HOSTS WEB_HSOT WEB_HOTS WEB_HOAST
    WEB_PROBEPORT WEB_PROBES_PORT WEB_PROB_PORT WEB_PROBE_PROT WEB_PORBE_PORT APP_EVN APP_ENVV APP_ENVS
    APP_INSTANCE APP_INSTANCS APP_INSTENCES APP_ISTANCES APP_INTSANCES APP_JBOS APP_JOBSS APP_JOSB APP_NEV
"""


class OfAnApp(Settings):
    """An app adds names of its own. The template's is strict."""

    strict: ClassVar[bool] = True

    app_env: str = "production"


def problems(monkeypatch: pytest.MonkeyPatch, /, kind: type[Settings] = OfAnApp, **environ: str) -> tuple[str, ...]:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    try:
        kind.load()
    except SettingsError as error:
        return error.problems
    return ()


def test_names_of_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a hundred, with numbers, addresses and words for values."""
    foreign = FOREIGN.split()
    assert len(foreign) >= 100
    for value in ("tcp://10.0.0.1:80", "80", "10.0.0.1", "x"):
        assert problems(monkeypatch, OfAnApp, **dict.fromkeys(foreign, value)) == ()


def test_misspelt_names_are_caught(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """More than a hundred: refused where they can be nothing else, and warned of where they are less near. A setting
    that is ignored in silence is how the guide's keys went wrong."""
    misspelt = MISSPELT.split()
    assert len(misspelt) >= 100
    refused = problems(monkeypatch, OfAnApp, **dict.fromkeys(misspelt, "5"))
    found = {re.split("[:=]", problem)[0] for problem in (*refused, *caplog.messages)}
    assert all("did you mean " in problem for problem in (*refused, *caplog.messages))
    for name in ("APP_INSTANCE", "DB_POOLSIZE", "WEB_THREAD"):
        assert any(problem.startswith(f"{name}='5': ") for problem in refused)
    assert len(refused) > 40
    assert len(set(misspelt) - found) < 12


@pytest.mark.parametrize(
    ("name", "value", "means"),
    [
        ("DB_POOL", "5", "DB_POOL_SIZE"),
        ("DB_TIMEOUT", "5", "DB_CONNECT_TIMEOUT"),
        ("DB_CONNECTION_TIMEOUT", "5", "DB_CONNECT_TIMEOUT"),
        ("DB_BIND", "0.0.0.0", "DB_BINDS"),
        ("APP_INSTANCE", "i-0abc", "APP_INSTANCES"),
    ],
)
def test_a_name_of_another_program_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, means: str
) -> None:
    """With the right name."""
    assert problems(monkeypatch, OfAnApp, **{name: value}) == ()
    assert caplog.messages == [f"{name}: no such setting; did you mean {means}?"]


@pytest.mark.parametrize("name", ["APP_INSTANCE", "DB_POOLSIZE", "WEB_THREAD", "DB_BIND"])
def test_in_an_app_that_was_there_before_nothing_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Its environment may be full of names of its own."""
    assert problems(monkeypatch, Settings, **{name: "3"}) == ()
    assert caplog.messages[0].startswith(f"{name}: no such setting; did you mean {name[:3]}")


@pytest.mark.parametrize("around", ["\ufeff{}", '"{}"', "'{}'"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "8000"), ("DB_POOL_TIMEOUT", "4"), ("DB_POOLER", "none"), ("WEB_HOST", "::"), ("APP_JOBS", "a=1x1")],
)
def test_bytes_around_a_value_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, around: str) -> None:
    """Quotes that `docker run --env-file` leaves, a byte order mark. They are shown."""
    (problem,) = problems(monkeypatch, OfAnApp, **{name: around.format(value)})
    assert problem.startswith(f"{name}={around.format(value)!r}: ")


@pytest.mark.parametrize("name", [name.upper() for name in OfAnApp.model_fields])
def test_what_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Compose's and Helm's `${X:-}`."""
    assert problems(monkeypatch, OfAnApp, **{name: ""}) == ()
    assert getattr(OfAnApp.load(), name.lower()) == getattr(OfAnApp.load(), name.lower())


@pytest.mark.parametrize("name", ["\ufeffDB_POOL_SIZE", " DB_POOL_SIZE", "DB_POOL_SIZE\r"])
def test_bytes_around_a_name_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A byte order mark at the start of a file would make its first line count for nothing."""
    (problem,) = problems(monkeypatch, OfAnApp, **{name: "5"})
    assert "did you mean DB_POOL_SIZE?" in problem
    assert "\ufeff" not in problem


@pytest.mark.parametrize(
    ("value", "host", "bind"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0", "0.0.0.0", "0.0.0.0:8000"),
        ("localhost", "localhost", "localhost:8000"),
        ("::", "::", "[::]:8000"),
        ("[::]", "::", "[::]:8000"),
        ("::1", "::1", "[::1]:8000"),
        ("[::1]", "::1", "[::1]:8000"),
        ("2001:DB8:0::7", "2001:db8::7", "[2001:db8::7]:8000"),
        ("fe80::1%eth0", "fe80::1%eth0", "[fe80::1%eth0]:8000"),
    ],
)
def test_every_way_to_write_an_address(monkeypatch: pytest.MonkeyPatch, value: str, host: str, bind: str) -> None:
    """With brackets or without."""
    monkeypatch.setenv("WEB_HOST", value)
    settings = Settings.load()
    assert (settings.web_host, settings.bind) == (host, bind)


@pytest.mark.parametrize("value", ["127.0.0.1:8000", "[::]:8000", "1:2", "a b", "http://x", "*"])
def test_what_is_no_address(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The port has a setting of its own."""
    (problem,) = problems(monkeypatch, WEB_HOST=value)
    assert problem == f"WEB_HOST={value!r}: is not an address; the port is set by PORT"


@pytest.mark.parametrize("name", [name.upper() for name in OfAnApp.model_fields])
@pytest.mark.parametrize("value", ["postgresql://u:{}@h/d", "mysql://u:{}@h/d", "worker=1x1,{},@", "{}@h", '["{}@h"]'])
def test_a_password_in_the_wrong_setting_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    said = "".join(problems(monkeypatch, OfAnApp, **{name: value.format("hunter2")}))
    assert "hunter2" not in said
    assert f"{name}=***" in said or not said
