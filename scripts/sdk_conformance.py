"""Run the test suites of the OpenAI and Anthropic Python SDKs against a mini_vllm server.

    python scripts/sdk_conformance.py                     starts a server on the bundled model, runs both suites
    python scripts/sdk_conformance.py --url http://...    against one that runs already
    python scripts/sdk_conformance.py --json report.json
    python scripts/sdk_conformance.py --no-fixtures       without making the responses that the tests want to fetch

The suites come out of the SDKs' source distributions (of the versions installed here), fetched into `.conformance/`
with an environment of their own; nothing of them is kept in this repository. The report says what passed, and for
what failed the first line of why.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from anthropic.resources.messages.messages import DEPRECATED_MODELS

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".conformance"
ALIASES = (
    "stdlib-llama-3.7m",
    "gpt-6-astra",
    "gpt-3.5-turbo-instruct",
    "model",
    "claude-opus-5-5",
    "model_id",
    "claude-1.3",
)
"""Names of models that the suites ask for."""
BUILD_NEEDS = ("hatchling", "hatch-fancy-pypi-readme")
TEST_NEEDS = (
    "pytest", "pytest-asyncio", "pytest-xdist", "pytest-timeout", "respx", "dirty-equals", "inline-snapshot",
    "time-machine", "rich", "http-snapshot[httpx]", "hypothesis", "importlib-metadata", "trio", "opentelemetry-sdk",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """One SDK's tests of the endpoints that exist here. path: what its base URL ends with."""

    package: str
    path: str
    files: tuple[str, ...]


SUITES = {
    "openai": Suite(
        "openai",
        "/v1",
        ("test_completions.py", "test_models.py", "chat/test_completions.py", "test_responses.py", "responses"),
    ),
    "anthropic": Suite("anthropic", "", ("test_messages.py", "test_models.py")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="A server to test; it must serve the aliases: " + ", ".join(ALIASES))
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the whole report here.")
    parser.add_argument("--no-fixtures", action="store_true", help="Do not load scripts/sdk_fixtures.py.")
    parser.add_argument("--verbose", action="store_true", help="List every failure.")
    args = parser.parse_args()
    names = list(SUITES) if args.suite == "all" else [args.suite]
    python = prepare([SUITES[name] for name in names])
    with contextlib.nullcontext(args.url) if args.url else own_server() as url:
        report = {name: run_suite(SUITES[name], python, url, not args.no_fixtures) for name in names}
    for name, result in report.items():
        show(name, result, args.verbose)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


# -- getting the suites -------------------------------------------------------------------------------------------


def prepare(suites: list[Suite]) -> Path:
    """The interpreter of an environment that has the SDKs and what their tests need; sources beside it."""
    python = WORK / "venv" / "bin" / "python"
    versions = [f"{suite.package}=={importlib.metadata.version(suite.package)}" for suite in suites]
    if not python.exists():
        print("making .conformance/venv ...", file=sys.stderr)
        venv.create(WORK / "venv", with_pip=True)
        pip(python, "install", *BUILD_NEEDS, *TEST_NEEDS)
    pip(python, "install", *(f"{name.replace('==', '[aiohttp]==')}" for name in versions))
    for name in versions:
        if not source_folder(name).is_dir():
            pip(python, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(WORK), name)
            with tarfile.open(next(WORK.glob(name.replace("==", "-") + "*.tar.gz"))) as archive:
                archive.extractall(WORK, filter="data")
    return python


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def source_folder(name_and_version: str) -> Path:
    return WORK / name_and_version.replace("==", "-")


# -- the server ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """A server on the bundled model under all the names the suites use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mini_vllm.entrypoints.cli.main", "serve", "--port", str(port)]
    names = (*ALIASES, *DEPRECATED_MODELS)  # a test asks for each of these, to see the SDK's warning
    log = WORK / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--served-model-name", *names], stdout=file, stderr=file, cwd=ROOT)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def wait_until_healthy(url: str, server: "subprocess.Popen[bytes]", log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}; see {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {seconds:.0f} s; see {log}")


# -- running ------------------------------------------------------------------------------------------------------


def run_suite(suite: Suite, python: Path, url: str, fixtures: bool) -> dict[str, Any]:
    """What passed and failed, by the test's name. fixtures: whether to make what the tests expect to be there."""
    folder = source_folder(f"{suite.package}=={importlib.metadata.version(suite.package)}")
    junit = WORK / f"{suite.package}.xml"
    files = [f"tests/api_resources/{name}" for name in suite.files]
    options = ["-n0", "-q", "--timeout=60", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={junit}", *files]
    if fixtures:
        options += ["-p", "sdk_fixtures"]
    path = os.pathsep.join((str(folder), str(ROOT / "scripts")))
    environment = os.environ | {"TEST_API_BASE_URL": url + suite.path, "PYTHONPATH": path}
    subprocess.run([str(python), "-m", "pytest", *options], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    return read_junit(junit) | {"version": importlib.metadata.version(suite.package)}


def read_junit(path: Path) -> dict[str, Any]:
    passed, failed, skipped = [], {}, []
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.api_resources.')}::{case.get('name')}"
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            failed[name] = first_line(problem.get("message", ""))
        elif case.find("skipped") is not None:
            skipped.append(name)
        else:
            passed.append(name)
    return {"passed": passed, "failed": failed, "skipped": skipped}


def _is_blocking(test: str) -> bool:
    return "::" in test and "Async" not in test


def _as_for_vllm(test: str) -> bool:
    """The part of the suites that the numbers for vLLM in docs/conformance.md are about."""
    return _is_blocking(test) and not test.startswith("responses.")


def first_line(message: str) -> str:
    """Why a test failed, in a line: the server's own message where there is one."""
    found = re.search(r"'message': (?:'([^']*)'|\"([^\"]*)\")", message)
    text = next((part for part in found.groups() if part), "") if found else message.splitlines()[0] if message else ""
    return text[:200]


def show(name: str, result: dict[str, Any], verbose: bool) -> None:
    counts = ", ".join(f"{len(result[kind])} {kind}" for kind in ("passed", "failed", "skipped"))
    print(f"{name} {result['version']}: {counts}")
    for what, wanted in (("blocking clients", _is_blocking), ("of these the files vLLM was measured on", _as_for_vllm)):
        passed, failed = (sum(map(wanted, result[kind])) for kind in ("passed", "failed"))
        print(f"  {what}: {passed} passed, {failed} failed")
    for why, count in Counter(result["failed"].values()).most_common():
        print(f"  {count:4} x {why}")
    if verbose:
        for test in result["failed"]:
            print(f"    {test}")


if __name__ == "__main__":
    raise SystemExit(main())
