"""Fields that several request bodies have and that change nothing here, or cannot be done here, with the reasons.

The reasons are for clients: an accepted field's stands in `docs/api-fields.md`, a refused one's in the 400 as well.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mini_vllm.entrypoints.server.fields import Refused


def only(*values: Any) -> Callable[[Any], bool]:
    """For `Refused.neutral`: these values ask for nothing."""
    return lambda value: value in values


ACCEPTED_BY_ALL: Mapping[str, str] = {
    "metadata": "Kept by OpenAI for its dashboards; here requests are not kept.",
    "store": "Nothing is stored by this endpoint.",
    "service_tier": "There is one tier.",
    "safety_identifier": "For OpenAI's own abuse detection.",
    "prompt_cache_key": "Prefixes are found by their content; `cache_salt` keeps them apart.",
    "prompt_cache_options": "Prefixes are cached as long as there is room.",
    "prompt_cache_retention": "Prefixes are cached as long as there is room.",
    "session_id": "A hint for routers in front of several servers.",
    "mm_payload": "Says how to return images, which a text model never does.",
    "return_mm_kwargs": "Says how to return images, which a text model never does.",
}

_NO_STRUCTURE = "Constrained decoding is not available in this release; only {'type': 'text'} is"
_TEXT_ONLY = "This model takes and gives text only"
_ONE_ENGINE = "There is no transfer between engines in this release"

REFUSED_BY_ALL: Mapping[str, Refused] = {
    "response_format": Refused(_NO_STRUCTURE, lambda value: isinstance(value, dict) and value == {"type": "text"}),
    "structured_outputs": Refused("Constrained decoding is not available in this release"),
    "thinking_token_budget": Refused("Reasoning is not told apart from the answer in this release"),
    "repetition_detection": Refused("Is not available in this release; see repetition_penalty"),
    "watermarking": Refused("Is not available"),
    "kv_transfer_params": Refused(_ONE_ENGINE),
    "ec_transfer_params": Refused(_ONE_ENGINE),
    "routed_experts_prompt_start": Refused("Routed experts are not reported", only(0)),
    "return_token_offsets": Refused("Is not available; logprobs of /v1/completions have text_offset"),
    "media_io_kwargs": Refused(_TEXT_ONLY),
    "mm_processor_kwargs": Refused(_TEXT_ONLY),
}
