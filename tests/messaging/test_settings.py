"""What users are promised of settings: names, defaults, and refusals that say it all at once."""

from __future__ import annotations

from typing import Any

import pytest

from mesh import ConfigurationError, MessageBusConfig, RedisMessageBroker

SECRET = "hunter2"


def test_the_settings_of_the_contract_can_be_given() -> None:
    config = MessageBusConfig(
        broker_type="redis",
        redis_host="localhost",
        redis_port=6379,
        consumer_buffer_size=1000,
        log_level="DEBUG",
    )

    shown = config.to_dict()
    assert (shown["broker_type"], shown["redis_host"], shown["redis_port"]) == (
        "redis",
        "localhost",
        6379,
    )
    assert (shown["consumer_buffer_size"], shown["log_level"]) == (1000, "DEBUG")


def test_an_empty_environment_gives_the_defaults() -> None:
    config = MessageBusConfig.from_env({})

    assert config == MessageBusConfig()
    assert (config.redis_host, config.redis_port, config.redis_password) == (
        "localhost",
        6379,
        None,
    )
    assert config.consumer_buffer_size == 1000
    assert config.consumer_max_retries == 3
    assert config.consumer_retry_delay_ms == 100
    assert config.log_level == "INFO"
    assert config.log_events is True


def test_every_variable_of_the_contract_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "LEGION_BROKER_TYPE": "redis",
        "REDIS_HOST": "redis.example",
        "REDIS_PORT": "6380",
        "REDIS_PASSWORD": SECRET,
        "LEGION_CONSUMER_BUFFER_SIZE": "7",
        "LEGION_CONSUMER_MAX_RETRIES": "0",
        "LEGION_CONSUMER_RETRY_DELAY_MS": "2.5",
        "LEGION_LOG_LEVEL": "warning",
        "LEGION_LOG_EVENTS": "false",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    assert MessageBusConfig.from_env() == MessageBusConfig(
        broker_type="redis",
        redis_host="redis.example",
        redis_port=6380,
        redis_password=SECRET,
        consumer_buffer_size=7,
        consumer_max_retries=0,
        consumer_retry_delay_ms=2.5,
        log_level="WARNING",
        log_events=False,
    )


def test_what_the_journal_keeps_is_set_by_age_and_size() -> None:
    """Nothing, and an empty word, mean for ever: what is forgotten does not come back."""
    names = "LEGION_JOURNAL_MAX_AGE_S", "LEGION_JOURNAL_MAX_BYTES"

    def kept(*values: str) -> tuple[float, int]:
        config = MessageBusConfig.from_env(dict(zip(names, values, strict=False)))
        assert config.to_dict()["journal_max_age_s"] == config.journal_max_age_s
        return config.journal_max_age_s, config.journal_max_bytes

    assert kept() == (7 * 86_400, 0)
    assert kept("3600", "2000000") == (3600, 2_000_000)
    assert kept("0", "0") == (0, 0)
    assert kept("", "") == (0, 0)
    with pytest.raises(ConfigurationError) as refused:
        kept("5", "-1")
    assert refused.value.problems == [
        "LEGION_JOURNAL_MAX_AGE_S=5: must be 0 (keep for ever), or 60 to 3e+09 seconds",
        "LEGION_JOURNAL_MAX_BYTES=-1: must be 0 (no limit), or at least 1048576",
    ]


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    config = MessageBusConfig(redis_password=SECRET, redis_sentinel_password=SECRET)

    assert config.to_dict()["redis_password"] == "***"
    assert SECRET not in f"{config} {config!r} {config.to_dict()}"
    assert MessageBusConfig().to_dict()["redis_password"] is None


def test_all_refusals_come_at_once_with_variable_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigurationError) as refused:
        MessageBusConfig.from_env(
            {
                "LEGION_BROKER_TYPE": "carrier-pigeon",
                "REDIS_PORT": "65536",
                "LEGION_CONSUMER_BUFFER_SIZE": "many",
                "LEGION_CONSUMER_MAX_RETRIES": "-1",
                "LEGION_CONSUMER_RETRY_DELAY_MS": "nan",
                "LEGION_LOG_LEVEL": "LOUD",
                "LEGION_LOG_EVENTS": "perhaps",
                "LEGION_BROKER_TYP": "zmq",
            }
        )

    assert sorted(refused.value.problems) == [
        "LEGION_BROKER_TYP: no such setting; did you mean LEGION_BROKER_TYPE?",
        "LEGION_BROKER_TYPE=carrier-pigeon: must be one of memory, zmq, redis",
        "LEGION_CONSUMER_BUFFER_SIZE=many: must be a whole number",
        "LEGION_CONSUMER_MAX_RETRIES=-1: must be 0 to 1000",
        "LEGION_CONSUMER_RETRY_DELAY_MS=nan: must be a finite number",
        "LEGION_LOG_EVENTS=perhaps: must be true or false",
        "LEGION_LOG_LEVEL=LOUD: must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL",
        "REDIS_PORT=65536: must be 1 to 65535",
    ]
    assert str(refused.value).splitlines() == refused.value.problems


@pytest.mark.parametrize(
    "variable", ["LEGION_REDIS_PASSWORD", "LEGION_PASSWORD", "REDIS_HOST", "LEGION_REDIS_SENTINELS"]
)
def test_a_password_in_the_wrong_place_is_not_shown(variable: str) -> None:
    """Under a misspelt name, or as part of what should have been no URL."""
    environ = {variable: f"redis://ann:{SECRET}@host:70000", "LEGION_BROKER_TYPE": "?"}

    with pytest.raises(ConfigurationError) as refused:
        MessageBusConfig.from_env(environ)

    assert SECRET not in str(refused.value)
    assert "ann" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://ann:{SECRET}/x@h",
        f"redis://ann:{SECRET}#x@h:1",
        f"redis://ann:1?{SECRET}=x@h",
        f"redis://ann:[{SECRET}]@h",
        f"redis://ann:x://{SECRET}@h",
        f"ann:{SECRET}@h",
        f"{SECRET}@h",
    ],
)
def test_a_password_that_breaks_its_url_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as by_setting:
        MessageBusConfig(redis_url=url)
    with pytest.raises(ConfigurationError) as by_argument:
        RedisMessageBroker(url=url)

    assert SECRET not in f"{by_setting.value} {by_argument.value!r} {by_argument.value}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "zmq"),
        ({"redis_password": "s"}, "redis at 127.0.0.1:6379, database 0, mesh 'default'"),
        ({"redis_socket": "/run/r"}, "redis at unix:/run/r, database 0, mesh 'default'"),
        (
            {"redis_url": "redis://h:7/3", "mesh_name": "b"},
            "redis at h:7, database 3, mesh 'b'",
        ),
        ({"redis_cluster": True}, "redis cluster at 127.0.0.1:6379, database 0, mesh 'default'"),
        (
            {"redis_sentinels": (("b", 2), ("a", 1))},
            "redis at mymaster by the sentinels a:1,b:2, database 0, mesh 'default'",
        ),
    ],
)
def test_a_fabric_has_words_without_secrets(given: dict[str, Any], words: str) -> None:
    config = MessageBusConfig(broker_type="redis" if given else "zmq", **given)

    assert config.fabric() == words


def test_settings_that_cannot_hold_together_are_named_like_the_others() -> None:
    """By the variables that somebody set, and together with everything else that is wrong."""
    with pytest.raises(ConfigurationError) as refused:
        MessageBusConfig.from_env(
            {
                "REDIS_URL": f"redis://ann:{SECRET}@one.example",
                "REDIS_HOST": "two.example",
                "REDIS_SOCKET": "/run/redis.sock",
                "REDIS_TLS": "yes",
                "LEGION_REDIS_CLUSTER": "yes",
                "LEGION_LOG_LEVEL": "LOUD",
            }
        )

    assert refused.value.problems[1:] == [
        (
            "REDIS_URL=redis://ann:***@one.example and REDIS_SOCKET=/run/redis.sock and"
            " REDIS_HOST=two.example: each says where Redis is; set one of them"
        ),
        (
            "LEGION_REDIS_CLUSTER=True: a cluster is reached by REDIS_HOST and REDIS_PORT, or"
            " REDIS_URL"
        ),
        (
            "REDIS_TLS=True and REDIS_SOCKET=/run/redis.sock: a Unix socket needs no TLS; unset one"
            " of them"
        ),
        "REDIS_URL=redis://ann:***@one.example and REDIS_TLS=True: write rediss://",
    ]
    with pytest.raises(ConfigurationError, match="redis_url=redis://h and redis_port=1: each says"):
        MessageBusConfig(redis_url="redis://h", redis_port=1)


URL = f"redis://ann:{SECRET}@h"
SHOWN = "REDIS_URL=redis://ann:***@h"


@pytest.mark.parametrize(
    ("environ", "problems"),
    [
        ({"REDIS_URL": f"{URL}/abc"}, [f"{SHOWN}/abc: must be redis://HOST:PORT/DB"]),
        (
            {"REDIS_URL": f"{URL}/5", "REDIS_DB": "3"},
            [f"{SHOWN}/5 and REDIS_DB=3: each says another database"],
        ),
        (
            {"REDIS_URL": f"{URL}/0", "REDIS_DB": "3"},
            [f"{SHOWN}/0 and REDIS_DB=3: each says another database"],
        ),
        (
            {"REDIS_URL": URL, "REDIS_PASSWORD": f"{SECRET}!", "REDIS_USERNAME": "bob"},
            [
                f"{SHOWN} and REDIS_USERNAME=bob: each says another user",
                f"{SHOWN} and REDIS_PASSWORD=***: each says another password",
            ],
        ),
        ({"REDIS_URL": URL, "REDIS_TLS": "true"}, [f"{SHOWN} and REDIS_TLS=True: write rediss://"]),
        (
            {"REDIS_URL": "unix:///s", "REDIS_TLS": "true", "LEGION_REDIS_CLUSTER": "yes"},
            [
                "REDIS_URL=unix:///s and REDIS_TLS=True: a Unix socket needs no TLS",
                "LEGION_REDIS_CLUSTER=True and REDIS_URL=unix:///s: a Unix socket leads to one",
            ],
        ),
        (
            {"REDIS_DB": "3", "LEGION_REDIS_CLUSTER": "yes"},
            ["LEGION_REDIS_CLUSTER=True and REDIS_DB=3: a cluster has no database but 0"],
        ),
        (
            {"REDIS_URL": f"{URL}/3", "LEGION_REDIS_CLUSTER": "yes"},
            [f"LEGION_REDIS_CLUSTER=True and {SHOWN}/3: a cluster has no database but 0"],
        ),
    ],
)
def test_what_a_url_says_and_what_others_say_is_the_same(
    environ: dict[str, str], problems: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        MessageBusConfig.from_env(environ)

    pairs = zip(refused.value.problems, problems, strict=True)
    assert [found[: len(wanted)] for found, wanted in pairs] == problems
    assert SECRET not in str(refused.value)


def test_a_url_may_repeat_what_others_say() -> None:
    same = {"REDIS_DB": "5", "REDIS_USERNAME": "ann", "REDIS_PASSWORD": SECRET}

    assert MessageBusConfig.from_env({"REDIS_URL": f"{URL}/5", **same}).redis_db == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("broker_type", "carrier-pigeon"),
        ("redis_port", 0),
        ("consumer_buffer_size", "1000"),
        ("consumer_max_retries", -1),
        ("log_level", "debug"),
    ],
)
def test_a_value_given_in_code_is_checked_too(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{field}={value}: must be"):
        MessageBusConfig(**{field: value})  # type: ignore[arg-type]
