"""Every error a caller can cause, as a type that can be caught.

All of them derive from `MiniVLLMError`. Those that a wrong argument causes are also `ValueError`s, so
that code written for other engines keeps working. Messages name the field and the limit.
"""


class MiniVLLMError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidParameterError(MiniVLLMError, ValueError):
    """A field of a request or of a configuration is out of range.

    `field` is the name the caller used, so that a server can return it as `param`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PromptTooLongError(InvalidParameterError):
    """The prompt does not fit the model's context or the KV cache pool."""


class ConfigError(MiniVLLMError, ValueError):
    """The engine cannot be built from these arguments on this machine."""


class KVCacheTooSmallError(ConfigError):
    """Not even one request of `max_model_len` tokens fits the KV cache."""


class CheckpointError(MiniVLLMError, ValueError):
    """A checkpoint is missing, truncated, mis-shaped or names files outside its folder."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but its architecture (or an option of it) is not implemented."""


class RequestError(MiniVLLMError, RuntimeError):
    """One request failed inside the engine; the others go on."""


class EngineDeadError(MiniVLLMError, RuntimeError):
    """The engine stopped and cannot serve any more."""


class OverloadedError(MiniVLLMError, RuntimeError):
    """The engine has as many unfinished requests (or their tokens) as it was allowed to queue, or is shutting down.

    reason: 'max_num_queued_reqs', 'max_num_queued_tokens', 'text_work' (too many prompts wait to be tokenised),
        'engine_restarting' or 'shutting_down', the label of the rejection's counter.
    retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, reason: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
