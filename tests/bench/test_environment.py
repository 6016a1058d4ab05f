"""collect-env: complete, plain data, and no secrets."""

import json

import pytest

from mini_vllm.bench.environment import (
    HIDDEN,
    collect_environment,
    compact_ranges,
    format_environment,
    redact_value,
    relevant_variables,
)
from mini_vllm.entrypoints.cli.main import main

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijkl",
    "HUGGING_FACE_HUB_TOKEN": "hf_zzzzzzzzzzzz",
    "MINI_VLLM_API_KEY": "open sesame",
    "HF_AUTH": "basic dXNlcg==",
    "HF_HEADERS": "Bearer abcdefgh12345",
    "HF_ENDPOINT": "https://user:hunter22@mirror.example/path",
    "MINI_VLLM_PASSWORD": "hunter23",
}


def test_variables_that_matter_are_kept_and_others_are_not() -> None:
    found = relevant_variables(
        {
            "OMP_NUM_THREADS": "2",
            "MINI_VLLM_LOGGING_LEVEL": "DEBUG",
            "HF_HOME": "/cache",
            "TOKENIZERS_PARALLELISM": "false",
            "LD_PRELOAD": "/lib/x.so",
            "PATH": "/bin",
            "AWS_SECRET_ACCESS_KEY": "no",
            "HFX": "no",
        }
    )
    assert found == {
        "HF_HOME": "/cache",
        "LD_PRELOAD": "/lib/x.so",
        "MINI_VLLM_LOGGING_LEVEL": "DEBUG",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_no_secret_is_ever_shown() -> None:
    found = relevant_variables(SECRETS)
    assert set(found) == set(SECRETS)  # that they are set may be what is wrong
    text = json.dumps(found)
    for secret in ("hf_abcdefghijkl", "hf_zzzzzzzzzzzz", "sesame", "dXNlcg", "abcdefgh12345", "hunter"):
        assert secret not in text
    assert found["HF_ENDPOINT"] == "https://...@mirror.example/path"
    assert found["HF_TOKEN"] == HIDDEN


def test_a_plain_value_is_left_as_it_is() -> None:
    """Broken control of the test above: redaction does not simply hide everything."""
    assert redact_value("/home/me/models") == "/home/me/models"
    assert redact_value("https://mirror.example") == "https://mirror.example"


def test_the_environment_names_versions_processor_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_VLLM_API_KEY", "open sesame")
    environment = collect_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["versions"]["mini_vllm"] and environment["versions"]["numpy"]
    assert environment["cpu"]["cpus_usable"] >= 1 and environment["device"]["description"]
    assert environment["torch"]["num_threads"] >= 1
    text = format_environment(environment)
    assert "sesame" not in text and "[cpu]" in text and environment["cpu"]["model"] in text


def test_ranges_of_cpus_are_short() -> None:
    assert compact_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert compact_ranges([]) == ""


def test_the_command_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    assert capsys.readouterr().out.startswith("[versions]")
    assert main(["collect-env", "--json"]) == 0
    assert "mini_vllm" in json.loads(capsys.readouterr().out)["versions"]
