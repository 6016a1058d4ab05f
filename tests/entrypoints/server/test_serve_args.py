"""Arguments of the server: what cannot work is refused before anything starts."""

import os
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.entrypoints.server.api_keys import ApiKeys, load_api_keys
from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.exceptions import ConfigError


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"port": 70_000}, "port: must be from 0 to 65535"),
        ({"port": -1}, "port: must be at least 0"),
        ({"port": "8000"}, "port: must be a whole number"),
        ({"max_n": 0}, "max_n: must be more than 0"),
        ({"max_n": True}, "max_n: must be a whole number"),
        ({"text_timeout": float("inf")}, "text_timeout: must be more than 0"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout: must be at least 0"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs: must be more than 0"),
        ({"max_request_body_bytes": "lots"}, "max_request_body_bytes: must be an integer"),
        ({"uvicorn_log_level": "loud"}, "uvicorn_log_level: must be one of critical"),
        ({"ssl_cert_reqs": 3}, "ssl_cert_reqs: must be one of 0, 1, 2"),
        ({"ssl_keyfile": "k.pem"}, "ssl_certfile: is needed"),
        ({"ssl_certfile": "c.pem", "ssl_cert_reqs": 2}, "ssl_ca_certs: is needed"),
        ({"api_key": ("",)}, "api_key: is empty"),
        ({"api_key": (1,)}, "api_key: must be strings"),
        ({"allowed_origins": '["a"'}, "allowed_origins: is not valid JSON"),
        ({"default_chat_template_kwargs": "[]"}, "default_chat_template_kwargs: must be a JSON object"),
        ({"host": 3}, "host: must be str"),
        ({"restart_engine": "yes"}, "restart_engine: must be bool"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        ServeArgs(**wrong)


def test_values_are_read_as_vllm_reads_them() -> None:
    args = ServeArgs(
        allowed_origins='["https://a", "https://b"]',  # type: ignore[arg-type]
        max_request_body_bytes="1M",  # type: ignore[arg-type]
        default_chat_template_kwargs='{"enable_thinking": false}',  # type: ignore[arg-type]
        root_path="llm/",
    )
    assert args.allowed_origins == ("https://a", "https://b")
    assert args.max_request_body_bytes == 1 << 20
    assert args.default_chat_template_kwargs == {"enable_thinking": False}
    assert args.root_path == "/llm"


def test_a_chat_template_is_a_file_or_the_template_itself(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("from a file {{ messages }}")
    assert ServeArgs(chat_template=str(file)).load_chat_template() == "from a file {{ messages }}"
    assert ServeArgs(chat_template="{{ messages }}").load_chat_template() == "{{ messages }}"
    assert ServeArgs().load_chat_template() is None
    with pytest.raises(ConfigError, match="chat_template: cannot read"):
        ServeArgs(chat_template=str(tmp_path / "none.jinja")).load_chat_template()


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("nonsense")
    for path in (file, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="ssl_certfile: cannot serve TLS"):
            ServeArgs(ssl_certfile=str(path)).tls_context()


# -- keys ----------------------------------------------------------------------------------------------------


def test_keys_come_from_flags_a_file_or_else_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nalice:a-key\n\n  bob:b:with:colons \nplain-key\n")
    file.chmod(0o600)
    environment = {"VLLM_API_KEY": "from-environment"}
    assert load_api_keys(["x"], str(file), environment) == [
        ("key-1", "x"), ("alice", "a-key"), ("bob", "b:with:colons"), ("line-5", "plain-key"),
    ]  # fmt: skip
    assert load_api_keys([], None, environment) == [("key-1", "from-environment")]
    assert load_api_keys([], None, environment | {"MINI_VLLM_API_KEY": "ours"}) == [("key-1", "ours")]
    assert load_api_keys([], None, {"VLLM_API_KEY": ""}) == []


def test_a_file_of_keys_that_others_can_read_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mini_vllm.entrypoints.server import api_keys

    warnings: list[str] = []
    monkeypatch.setattr(api_keys.logger, "warning", lambda text, *args: warnings.append(text % args))
    file = tmp_path / "keys"
    file.write_text("key\n")
    for mode, count in ((0o600, 0), (0o644, 1)):
        os.chmod(file, mode)
        load_api_keys([], str(file), {})
        assert len(warnings) == count
    assert "chmod 600" in warnings[0]


@pytest.mark.parametrize(
    ("content", "says"), [("", "has no keys"), ("# nothing\n", "has no keys"), ("a b\n", "visible ASCII")]
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=says):
        load_api_keys([], str(file), {})
    with pytest.raises(ConfigError, match="api_key_file: cannot read"):
        load_api_keys([], str(tmp_path / "missing"), {})


def test_keys_of_one_name_are_one_owner_and_one_key_has_one_name() -> None:
    keys = ApiKeys([("alice", "old"), ("alice", "new"), ("bob", "other")])
    assert keys.find(b"old") == keys.find(b"new") != keys.find(b"other")
    assert keys.find(b"") is None and keys.find(b"ol") is None and keys.find(b"\xff") is None
    with pytest.raises(ConfigError, match="the same key"):
        ApiKeys([("alice", "same"), ("bob", "same")])


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    from mini_vllm.entrypoints.server import api_keys

    keys = ApiKeys([(str(i), f"key {i}") for i in range(10)])
    compared: list[int] = []
    real = api_keys.hmac.compare_digest
    monkeypatch.setattr(api_keys.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    for presented in (b"key 0", b"key 9", b"none"):
        compared.clear()
        keys.find(presented)
        assert len(compared) == 10
