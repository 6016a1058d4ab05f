"""Models from outside the package: the one docs/adding-a-model.md writes, installed as a package of its own."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mini_vllm.exceptions import ConfigError, UnsupportedModelError
from mini_vllm.models import registry
from mini_vllm.models.llama import LlamaForCausalLM
from mini_vllm.models.registry import ModelRegistry
from tests.families import Family
from tests.integration.rig import Job, Rig, greedy, run
from tests.models.oracle import BROKEN, NUM_GREEDY, TOLERANCE, Oracle

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-model.md"
MODULE = "granite_for_the_test"
PATH = f"{MODULE}:GraniteForCausalLM"
GRANITE = Family(
    "granite",
    {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": False, "mlp_bias": False,
        "embedding_multiplier": 1.5, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 0.5,
    },
)  # fmt: skip


@pytest.fixture(autouse=True)
def _registry_of_its_own(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A folder on the path with the page's code as a module; imports of it are forgotten afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / f"{MODULE}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_for_the_test")]:
        del sys.modules[name]


def install(folder: Path, *points: str, package: str = "granite") -> None:
    """What an installer leaves behind: metadata with entry points."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("\n".join(["[mini_vllm.models]", *points]), encoding="utf-8")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Oracle:
    return Oracle.make(GRANITE, tmp_path_factory.mktemp("granite"))


def test_the_model_of_the_guide_equals_transformers_when_installed(oracle, package):
    install(package, f"GraniteForCausalLM = {PATH}")
    assert "GraniteForCausalLM" in ModelRegistry.supported_architectures()
    assert oracle.error(oracle.model()) < TOLERANCE
    prompts = [prompt for prompt in oracle.prompts if len(prompt) + NUM_GREEDY <= GRANITE.max_model_len]
    engine = Rig(oracle.folder).engine(budget=19)
    jobs = [Job(tuple(prompt), greedy(NUM_GREEDY)) for prompt in prompts]
    assert run(engine, jobs).tokens == oracle.their_greedy(prompts)


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
)
def test_control_without_one_of_its_multipliers_parity_fails(oracle, package, key):
    ModelRegistry.register_model("GraniteForCausalLM", PATH)
    assert oracle.error(oracle.model(raw=oracle.config.raw | {key: 1.0})) > BROKEN


def test_a_model_is_registered_by_path_without_importing_it_or_as_a_class(package):
    ModelRegistry.register_model("GraniteForCausalLM", PATH)
    assert MODULE not in sys.modules
    model_class = ModelRegistry.resolve(["Unheard", "GraniteForCausalLM"])
    assert (model_class.__module__, model_class.__name__) == (MODULE, "GraniteForCausalLM")
    ModelRegistry.register_model("AnotherForCausalLM", model_class)
    assert ModelRegistry.resolve(["AnotherForCausalLM"]) is model_class


def test_a_registered_model_replaces_one_of_the_package_and_says_so(caplog):
    class Mine(LlamaForCausalLM):
        pass

    ModelRegistry.register_model("LlamaForCausalLM", Mine)
    assert ModelRegistry.resolve(["LlamaForCausalLM"]) is Mine
    assert "architecture LlamaForCausalLM is served by" in caplog.text


def test_an_entry_point_does_not_replace_one_of_the_package(package, caplog):
    install(package, f"LlamaForCausalLM = {PATH}")
    assert ModelRegistry.resolve(["LlamaForCausalLM"]) is LlamaForCausalLM
    ModelRegistry.supported_architectures()
    assert f"entry point LlamaForCausalLM = {PATH} of granite is ignored" in caplog.text


def test_an_entry_point_that_two_packages_offer_is_refused_naming_both(package):
    install(package, f"GraniteForCausalLM = {PATH}")
    install(package, "GraniteForCausalLM = elsewhere:Granite", package="other")
    with pytest.raises(
        UnsupportedModelError, match="several packages offer it: .*of granite; .*of other|other; .*granite"
    ):
        ModelRegistry.resolve(["GraniteForCausalLM"])


@pytest.mark.parametrize(
    ("source", "path", "named"),
    [
        ("import a_module_that_is_nowhere", "bad_for_the_test:X", "ModuleNotFoundError: .*a_module_that_is_nowhere"),
        ("1 / 0", "bad_for_the_test:X", "ZeroDivisionError: division by zero"),
        ("", "bad_for_the_test:X", "AttributeError: .*has no attribute 'X'"),
        ("X = 3", "bad_for_the_test:X", "3 is no torch.nn.Module class"),
        ("class X: pass", "bad_for_the_test:X", "X.* is no torch.nn.Module class"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["registered", "installed"])
def test_a_model_that_does_not_load_is_an_error_that_names_it(package, how, source, path, named):
    (package / "bad_for_the_test.py").write_text(source, encoding="utf-8")
    if how == "registered":
        ModelRegistry.register_model("BadForCausalLM", path)
    else:
        install(package, f"BadForCausalLM = {path}")
    with pytest.raises(UnsupportedModelError, match=rf"architecture BadForCausalLM: .*{named}"):
        ModelRegistry.resolve(["BadForCausalLM"])


def test_a_class_without_the_engines_methods_is_refused_naming_them():
    class Half(nn.Module):
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    ModelRegistry.register_model("HalfForCausalLM", Half)
    with pytest.raises(
        UnsupportedModelError, match=r"Half has no embed_input_ids, load_weights, forward; see docs/add"
    ):
        ModelRegistry.resolve(["HalfForCausalLM"])


@pytest.mark.parametrize("model", ["no_colon", "module:", ":Class", 3])
def test_registering_something_else_is_refused(model):
    with pytest.raises(ConfigError, match="register_model: "):
        ModelRegistry.register_model("X", model)


def test_an_unknown_architecture_lists_what_is_supported_and_the_way_out(package):
    install(package, f"GraniteForCausalLM = {PATH}")
    with pytest.raises(UnsupportedModelError) as error:
        ModelRegistry.resolve(["UnheardForCausalLM"])
    listed = ", ".join(sorted([*registry._MODELS, "GraniteForCausalLM"]))
    for expected in ("['UnheardForCausalLM']", f"supported are {listed}. ", "docs/adding-a-model.md"):
        assert expected in str(error.value)
    assert GUIDE.is_file()
