"""docs/supported-models.md says what the tests compare, no more and no less."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.families import FAMILIES, KNOWN_AS

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "support_table.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python scripts/support_table.py --write"


def test_control_a_row_less_changes_the_table(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = script.page()
    monkeypatch.setattr(script, "FAMILIES", [family for family in FAMILIES if family.name != "mistral-window"])
    changed = [line for line, old in zip(script.page().split("\n"), before.split("\n"), strict=True) if line != old]
    assert len(changed) == 1
    assert changed[0].startswith("| `MistralForCausalLM` ")


def test_a_family_without_rows_has_no_parity_to_show(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "FAMILIES", [])
    assert script.row_of("LlamaForCausalLM")[2:] == ["–", "yes", *["–"] * 6]


def test_every_architecture_says_what_is_published_under_it() -> None:
    assert set(KNOWN_AS) == {family.architecture for family in FAMILIES}
