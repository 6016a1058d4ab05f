"""schemathesis reads /openapi.json and sends what it can think of: no 5xx, and no answer that is not documented."""

import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.entrypoints.server.rig import RunningServer, running_server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance"


def schemathesis(server: RunningServer, folder: Path, num_examples: int, *options: str) -> None:
    """Fails with its report."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--checks", CHECKS,
        "--max-examples", str(num_examples), "--seed", "1", "--generation-database", "none", "--no-color",
        "--request-timeout", "60", "--suppress-health-check", "too_slow", "--warnings", "off", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Test cases" in done.stdout
    assert "Traceback" not in server.output()
    assert httpx2.get(f"{server.url}/load", timeout=20).json() == {"server_load": 0}


def test_examples_of_every_operation_are_answered_as_documented(server: RunningServer, tmp_path: Path) -> None:
    schemathesis(server, tmp_path, 4, "--phases", "examples,fuzzing")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_examples_of_every_operation_are_answered_as_documented(tmp_path: Path) -> None:
    options = ("--served-model-name", "tiny", "--max-model-len", "128", "--enable-debug-steps", "--enable-dev-mode")
    with running_server(*options) as server:
        schemathesis(server, tmp_path, 300)


def test_the_document_is_complete(server: RunningServer) -> None:
    """Every operation says what it answers; every body is described by a schema of its own."""
    document = httpx2.get(f"{server.url}/openapi.json", timeout=20).json()
    operations = [(path, op) for path, methods in document["paths"].items() for op in methods.values()]
    assert len(operations) >= 20
    for path, operation in operations:
        assert operation["responses"]["200"], path
        assert operation["responses"]["default"]["content"]["application/json"], path
        assert "422" not in operation["responses"], path
        if "requestBody" in operation:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            schema = document["components"]["schemas"][reference.rpartition("/")[2]]
            assert schema["additionalProperties"] is False and schema["properties"], path
    assert "HTTPValidationError" not in json.dumps(document)
