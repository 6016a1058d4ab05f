"""What all handlers share: the engine, the arguments, and what the server itself knows about its condition."""

import enum
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from mini_vllm.engine.metrics.prometheus import ServerMetrics
from mini_vllm.engine.protocol import EngineClient
from mini_vllm.entrypoints.server.api_keys import ApiKeys, load_api_keys
from mini_vllm.entrypoints.server.serve_args import ServeArgs


class Phase(enum.StrEnum):
    """What the server is doing; `READY` is the only one in which it takes requests."""

    READY = "ready"
    DRAINING = "shutting down"
    DEAD = "dead"


@dataclass
class ServerState:
    """One server.

    model_names: what requests may call the model; responses and metrics bear the first.
    model_root: where the model is, as the user gave it.
    chat_template: the text of --chat-template; None for the model's own.
    metrics: what /metrics shows; None where nobody looks.
    response_store: of /v1/responses, made by its module.
    num_in_flight: HTTP requests under way, of any kind but those that ask how the server is.
    """

    engine: EngineClient
    args: ServeArgs
    model_names: tuple[str, ...]
    model_root: str = ""
    chat_template: str | None = None
    api_keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    metrics: ServerMetrics | None = None
    response_store: Any = None
    phase: Phase = Phase.READY
    num_in_flight: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        return self.model_names[0]


def make_state(
    engine: EngineClient, args: ServeArgs, model: str, *, api_keys: ApiKeys | None = None, **more: Any
) -> ServerState:
    """The state of a server of this engine. model: as the user named it; more: other fields of `ServerState`.

    api_keys: in place of those that the arguments (and the environment) name.
    """
    from mini_vllm.entrypoints.openai.responses.store import ResponseStore

    if api_keys is None:
        api_keys = ApiKeys(load_api_keys(args.api_key, args.api_key_file), args.share_prefix_cache)
    return ServerState(
        engine=engine,
        args=args,
        model_names=args.served_model_name or (model,),
        model_root=model,
        chat_template=args.load_chat_template(),
        api_keys=api_keys,
        response_store=ResponseStore(args.max_stored_responses, args.max_stored_response_bytes),
        **more,
    )


def state_of(connection: HTTPConnection) -> ServerState:
    """The server that a request came to."""
    state: ServerState = connection.app.state.server
    return state
