"""Claims about the project as a whole: what imports what, what runs without torch, how large things may grow."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mini_vllm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mini_vllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "jinja2", "msgspec", "numpy")
ABSENT = ("torch", "tokenizers", "safetensors", "jinja2", "msgspec", "transformers", "tqdm", "rich")
FOLDERS = ("mini_vllm", "tests", "benchmarks", "examples", "training", "scripts")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500

BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is absent in this test", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter; the test fails with its traceback if it ends badly."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Every module name that `tree` imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


# --- what an import costs ---------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = json.loads(run_python("import json, sys, mini_vllm; print(json.dumps(sorted(sys.modules)))"))
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)


def test_importing_the_offline_api_does_not_load_torch() -> None:
    code = (
        "import json, sys; from mini_vllm import LLM, LLMEngine, SamplingParams; print(json.dumps(sorted(sys.modules)))"
    )
    loaded = {name.partition(".")[0] for name in json.loads(run_python(code))}
    assert not loaded & {"torch", "transformers"}


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(mini_vllm, name) is not None for name in mini_vllm.__all__)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = mini_vllm.NoSuchThing  # type: ignore[attr-defined]


# --- torch absent -----------------------------------------------------------------------------------------

CONTROL_PLANE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*(PACKAGE / "core").glob("*.py"), PACKAGE / "toy.py", PACKAGE / "engine" / "core.py"]
    if path.name != "__init__.py"
)


def test_the_blocker_really_hides_torch() -> None:
    """Broken control of the two tests below: what they rely on does hide the module."""
    code = BLOCKER + "try:\n    import torch\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run_python(code).strip() == "torch"


def test_the_control_plane_imports_with_numpy_alone() -> None:
    imports = "\n".join(f"import {name}" for name in CONTROL_PLANE)
    assert run_python(f"{BLOCKER}\n{imports}\nprint('ok')").strip() == "ok"


def test_the_toy_engine_generates_with_numpy_alone() -> None:
    code = """
from mini_vllm import SamplingParams, ToyEngine
engine = ToyEngine(num_blocks=64, block_size=4, max_num_batched_tokens=8)
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
for prompt in ("hello world", "goodbye"):
    engine.add_request(prompt, params)
finished = []
while len(finished) < 2:
    finished += engine.step()
print([len(request.output_token_ids) for request in finished], "torch" in sys.modules)
"""
    assert run_python(BLOCKER + code).strip() == "[4, 4] False"


# --- what the sources may contain -------------------------------------------------------------------------


def test_the_package_never_imports_transformers_or_pickle() -> None:
    banned = {"transformers", "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in MODULES
        for name in imported_names(parse(path))
        if name.partition(".")[0] in banned
    ]
    assert not found


def test_only_one_module_speaks_to_the_hub() -> None:
    found = [path.name for path in MODULES if "huggingface_hub" in set(imported_names(parse(path)))]
    assert found == ["hub.py"]


def test_the_import_scan_sees_imports_inside_functions() -> None:
    """Broken control of the test above."""
    tree = ast.parse("def f():\n    import pickle\n    from transformers.models import x\n")
    assert list(imported_names(tree)) == ["pickle", "transformers.models"]


def calls_named(tree: ast.Module, names: set[str]) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("builtins.") in names
    ]


def test_the_package_never_evaluates_code_or_unpickles_tensors() -> None:
    banned = {"eval", "exec", "torch.load", "os.system"}
    found = {str(path.relative_to(ROOT)): lines for path in MODULES if (lines := calls_named(parse(path), banned))}
    found.pop("mini_vllm/models/pickle_convert.py")  # see below
    assert not found


def test_the_one_place_that_opens_pickles_takes_nothing_but_tensors_from_them() -> None:
    tree = parse(PACKAGE / "models" / "pickle_convert.py")
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert len(calls) == 1
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in calls[0].keywords]


def test_only_platforms_asks_what_hardware_this_is() -> None:
    questions = {"torch.cuda.is_available", "torch.backends.mps.is_available", "torch.cuda.get_device_capability"}
    found = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES
        if "platforms" not in path.relative_to(PACKAGE).parts
        if (lines := calls_named(parse(path), questions))
    }
    assert not found


# --- size and documentation -------------------------------------------------------------------------------


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: explaining a thing must not cost anything."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length(node)} lines"
        for path in MODULES
        for node in functions(parse(path))
        if length(node) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_no_file_is_longer_than_a_head_can_hold() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}


def test_every_module_says_what_lives_in_it() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(parse(path))
    ]
    assert not silent


# --- the project file -------------------------------------------------------------------------------------


def test_the_constraints_pin_every_declared_dependency_within_its_range() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(item for extra in extras for item in extra)]:
        requirement = requirements.Requirement(text)
        assert requirement.name in pins, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), text


def test_every_test_and_file_that_the_documents_name_exists() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    files = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*")}
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{document.name} names {name}"
        for name in re.findall(r"[\w/]+\.py\b", text):
            assert any(("/" + file).endswith("/" + name) for file in files), f"{document.name} names {name}"


def test_the_python_examples_of_the_readme_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    offline = [block for block in blocks if "import OpenAI" not in block]  # the other one: tests/conformance
    assert len(offline) == len(blocks) - 1 == 3
    out = run_python("\n".join(offline))
    assert "True" in out  # the second example prints `finished`


def test_every_extra_that_a_message_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for path in MODULES:
        for name in re.findall(r"mini-vllm\[([\w-]+)\]", path.read_text(encoding="utf-8")):
            assert name in extras, f"{path.relative_to(ROOT)} names mini-vllm[{name}]"


def test_the_project_files_name_no_package_index() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "scripts/setup_venv.sh", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "index-url" not in text and "find-links" not in text, name
