"""Architecture name to model class. A family of this package is one file and one row here; others register.

A model from outside comes in one of two ways, both described in docs/adding-a-model.md: `ModelRegistry.register_model`
in a running program, or an entry point of an installed package in the group `mini_vllm.models`. Modules are imported
when their architecture is first asked for, so that one family's imports never slow another's; what goes wrong then is
an `UnsupportedModelError` that names the module, never a family silently missing.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from torch import nn

from mini_vllm.exceptions import ConfigError, UnsupportedModelError
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

ENTRY_POINT_GROUP = "mini_vllm.models"
GUIDE = "docs/adding-a-model.md"
REQUIRED_METHODS = ("forward", "compute_logits", "embed_input_ids", "load_weights")
"""What the engine calls on a model; see `models/llama.py` for their shapes."""

_MODELS: dict[str, str | type[nn.Module]] = {
    "GPT2LMHeadModel": "mini_vllm.models.gpt2:GPT2LMHeadModel",
    "Gemma2ForCausalLM": "mini_vllm.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "mini_vllm.models.gemma3:Gemma3ForCausalLM",
    "Llama4ForCausalLM": "mini_vllm.models.llama4:Llama4ForCausalLM",
    "LlamaForCausalLM": "mini_vllm.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "mini_vllm.models.mistral:MistralForCausalLM",
    "OPTForCausalLM": "mini_vllm.models.opt:OPTForCausalLM",
    "Phi3ForCausalLM": "mini_vllm.models.phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "mini_vllm.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "mini_vllm.models.qwen3:Qwen3ForCausalLM",
    "StableLmForCausalLM": "mini_vllm.models.stablelm:StableLmForCausalLM",
}


class ModelRegistry:
    """The architectures this engine can serve."""

    @staticmethod
    def supported_architectures() -> list[str]:
        """Names that `resolve` knows: those of this package, those registered, those of entry points."""
        return sorted({*_MODELS, *(point.name for point in _entry_points())})

    @staticmethod
    def register_model(architecture: str, model: str | type[nn.Module]) -> None:
        """Serve `architecture` (a name in config.json) with `model`: a class, or "module:Class", imported when needed.

        A name that exists already is replaced, with a warning. Raises `ConfigError` if `model` is neither.
        """
        if isinstance(model, str):
            module, colon, name = model.partition(":")
            if not (module and colon and name):
                raise ConfigError(f"register_model: {model!r} must be 'module:Class'")
        elif not isinstance(model, type):
            raise ConfigError(f"register_model: must be given a class or 'module:Class', got {model!r}")
        if architecture in _MODELS:
            logger.warning(
                "architecture %s is served by %s from now on, not %s", architecture, model, _MODELS[architecture]
            )
        _MODELS[architecture] = model

    @staticmethod
    def resolve(architectures: Sequence[str]) -> type[nn.Module]:
        """The class of the first supported name.

        Raises `UnsupportedModelError`: no name is supported (listing those that are), or the model's module does not
        import or is not one.
        """
        for architecture in architectures:
            if architecture in _MODELS:
                model = _MODELS[architecture]
                return _checked(architecture, _load(architecture, model) if isinstance(model, str) else model)
            if points := [point for point in _entry_points() if point.name == architecture]:
                return _checked(architecture, _load(architecture, _only(points)))
        raise UnsupportedModelError(
            f"config.json: architectures {list(architectures)} is not supported; supported are "
            f"{', '.join(ModelRegistry.supported_architectures())}. {GUIDE} shows how to add one"
        )


def _entry_points() -> Sequence[EntryPoint]:
    """What installed packages offer. This package's own architectures are not theirs to replace."""
    points = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _MODELS:
            logger.warning("entry point %s is ignored: the architecture is registered already", _describe(point))
        else:
            points.append(point)
    return points


def _only(points: Sequence[EntryPoint]) -> str:
    if len({point.value for point in points}) > 1:
        raise UnsupportedModelError(
            f"architecture {points[0].name}: several packages offer it: {'; '.join(map(_describe, points))}"
        )
    return f"{points[0].module}:{points[0].attr}"


def _describe(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "an unknown package"
    return f"{point.name} = {point.value} of {package}"


def _load(architecture: str, path: str) -> object:
    """The object at "module:Class". Whatever its import raises becomes an error that names it."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise UnsupportedModelError(
            f"architecture {architecture}: its model {path!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _checked(architecture: str, model: object) -> type[nn.Module]:
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        raise UnsupportedModelError(f"architecture {architecture}: {model!r} is no torch.nn.Module class")
    missing = [name for name in REQUIRED_METHODS if not callable(getattr(model, name, None))]
    # nn.Module has a forward of its own, which only raises.
    missing += ["forward"] if model.forward is nn.Module.forward else []
    if missing:
        raise UnsupportedModelError(
            f"architecture {architecture}: {model.__name__} has no {', '.join(missing)}; see {GUIDE}"
        )
    return model
