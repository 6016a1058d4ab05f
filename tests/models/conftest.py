"""What the tests of models share: each family's checkpoint and oracle, made once."""

from collections.abc import Callable

import pytest

from mini_vllm.ops import linear as ops
from tests.families import BY_NAME
from tests.models.oracle import Oracle


@pytest.fixture(scope="session")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """The oracle of a row of tests/families.py, by its name."""
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = Oracle.make(BY_NAME[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights stay as the checkpoint has them, where a test looks at them or changes them."""
    monkeypatch.setattr(ops, "native_linear", lambda weight: None)
