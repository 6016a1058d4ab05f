"""The arguments of the server, as `EngineArgs` are those of the engine: vLLM's names, help and section with each field.

The command line is made from these fields. A value that cannot work is refused here, before a socket is bound or a
model is loaded.
"""

import dataclasses
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mini_vllm.engine.arg_values import parse_size
from mini_vllm.exceptions import ConfigError

SECTIONS = {
    "server": "server",
    "security": "security",
    "api": "names and templates",
    "limits": "limits of one request",
    "overload": "overload and shutdown",
    "observe": "observability",
}


def _arg(default: Any, section: str, help: str, **more: Any) -> Any:
    """more: `choices`, and `many`: 'words' for several after one flag, 'repeat' for a flag that may come again."""
    return field(default=default, metadata={"section": section, "help": help, **more})


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """Everything that can be set when the server is started. Raises `ConfigError` naming the argument."""

    host: str = _arg("127.0.0.1", "server", "Address to listen on; 0.0.0.0 is every IPv4 address of this machine.")
    port: int = _arg(8000, "server", "Port to listen on; 0 takes a free one, which is printed.")
    uds: str | None = _arg(
        None, "server", "Listen on this Unix socket, which only this user may open, instead of host and port."
    )
    root_path: str = _arg("", "server", "Prefix under which a proxy shows the server, such as /llm.")
    ssl_keyfile: str | None = _arg(None, "server", "Private key of the TLS certificate.")
    ssl_certfile: str | None = _arg(None, "server", "TLS certificate (PEM, with its chain); serves https.")
    ssl_ca_certs: str | None = _arg(None, "server", "Certificates of those who may sign a client's certificate.")
    ssl_cert_reqs: int = _arg(0, "server", "Client certificates: 0 none, 1 optional, 2 required.", choices=(0, 1, 2))
    ssl_ciphers: str | None = _arg(None, "server", "OpenSSL's list of ciphers for TLS 1.2. Default: OpenSSL's own.")

    api_key: tuple[str, ...] = _arg(
        (), "security",
        "A key that requests must carry, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; may be repeated. Guards "
        "all but /health and /ping. Others see it in the list of processes: --api-key-file or VLLM_API_KEY are better.",
        many="repeat",
    )  # fmt: skip
    api_key_file: str | None = _arg(
        None, "security", "File of keys, one a line: KEY, or NAME:KEY (the name appears in fair sharing); # comments."
    )
    share_prefix_cache: bool = _arg(
        False, "security", "Let API keys share cached prefixes; by default each has its own part of the prefix cache."
    )
    allowed_origins: tuple[str, ...] = _arg(
        (), "security", "Origins whose pages may call the server (CORS), as a JSON list or repeated; off by default.",
        many="repeat",
    )  # fmt: skip
    allowed_methods: tuple[str, ...] = _arg(("*",), "security", "Methods that these may use.", many="repeat")
    allowed_headers: tuple[str, ...] = _arg(("*",), "security", "Headers that these may send.", many="repeat")
    allow_credentials: bool = _arg(False, "security", "Whether these may send cookies and the like.")
    disable_fastapi_docs: bool = _arg(False, "security", "Leave out /docs, /redoc and /openapi.json.")
    enable_debug_steps: bool = _arg(
        False, "security", "Add /debug/steps: what the last steps did and why each waiting request waits."
    )
    enable_dev_mode: bool = _arg(
        False, "security", "Add /reset_prefix_cache and /server_info (as does VLLM_SERVER_DEV_MODE=1)."
    )

    served_model_name: tuple[str, ...] = _arg(
        (), "api", "Names the model answers to; responses and metrics bear the first. Default: as --model was given.",
        many="words",
    )  # fmt: skip
    chat_template: str | None = _arg(
        None, "api", "Jinja file of the chat template, or the template itself. Default: the model's."
    )
    chat_template_content_format: str = _arg(
        "auto", "api",
        "How templates see content: string joins the parts of a message, openai hands over the list; auto looks.",
        choices=("auto", "string", "openai"),
    )  # fmt: skip
    default_chat_template_kwargs: Mapping[str, Any] | None = _arg(
        None, "api", "JSON object of variables for the chat template; those of a request win."
    )
    trust_request_chat_template: bool = _arg(
        False, "api", "Let requests bring a chat template of their own. It runs in a sandbox with a time limit."
    )
    response_role: str = _arg("assistant", "api", "Role of the message in answers of /v1/chat/completions.")
    enable_force_include_usage: bool = _arg(False, "api", "End every stream with usage, asked for or not.")
    max_stored_responses: int = _arg(1000, "api", "Responses of /v1/responses that are kept, the latest; 0 keeps none.")
    max_stored_response_bytes: int = _arg(64 << 20, "api", "Bytes these may have together, such as 64M.", size=True)

    max_request_body_bytes: int = _arg(32 << 20, "limits", "Bytes of a request's body, such as 32M.", size=True)
    max_header_bytes: int = _arg(64 << 10, "limits", "Bytes of a request's line and headers together.", size=True)
    max_n: int = _arg(128, "limits", "Samples a request may ask for with n (of each of its prompts).")
    max_batched_prompts: int = _arg(1024, "limits", "Prompts in one request of /v1/completions.")
    max_messages: int = _arg(10_000, "limits", "Messages of a chat.")
    max_stop_strings: int = _arg(64, "limits", "Stop strings of a request.")
    max_logit_bias: int = _arg(1024, "limits", "Entries of logit_bias.")
    max_tools: int = _arg(128, "limits", "Tools of a request.")
    max_chat_template_chars: int = _arg(100_000, "limits", "Characters of a chat template that a request brings.")
    text_timeout: float = _arg(30.0, "limits", "Seconds that tokenising, or rendering the template, may take.")

    max_num_queued_reqs: int | None = _arg(
        None, "overload", "Requests, waiting and running, beyond which new ones get 503. Default: no limit."
    )
    max_num_queued_tokens: int | None = _arg(
        None, "overload", "The same for the tokens of their prompts. Default: no limit."
    )
    stream_interval: int = _arg(1, "overload", "Tokens per streamed event; more means less work for the server.")
    sse_keep_alive_interval: float = _arg(
        0.0, "overload", "Seconds of silence after which a stream gets a comment, so that proxies keep it; 0 is never."
    )
    shutdown_timeout: float = _arg(
        30.0, "overload",
        "Seconds that requests may go on after SIGTERM or Ctrl-C (new ones get 503); then they are aborted. 0 aborts "
        "them at once.",
    )  # fmt: skip
    watchdog_timeout: float = _arg(
        300.0, "overload", "Seconds without a sign of life after which the engine counts as hung and is killed."
    )
    restart_engine: bool = _arg(
        False, "overload", "When the engine dies, start another instead of leaving; requests in flight get an error."
    )

    uvicorn_log_level: str = _arg(
        "info", "observe", "Of the HTTP server.", choices=("critical", "error", "warning", "info", "debug", "trace")
    )
    disable_uvicorn_access_log: bool = _arg(False, "observe", "No log line for each request.")
    disable_access_log_for_endpoints: str | None = _arg(
        None, "observe", "Paths without such a line, with commas between, such as /health,/metrics."
    )
    record_trace: str | None = _arg(
        None, "observe", "Write a line per request (arrival, lengths, shared prefixes; no text) to this file."
    )
    otlp_traces_endpoint: str | None = _arg(
        None, "observe", "Send a span per request to this OpenTelemetry collector, such as http://localhost:4317."
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._set(f.name, _checked(f, getattr(self, f.name)))
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: must be from 0 to 65535, got {self.port}")
        if (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_cert_reqs) and not self.ssl_certfile:
            raise ConfigError("ssl_certfile: is needed for the other ssl arguments to mean anything")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ConfigError("ssl_ca_certs: is needed to check client certificates (ssl_cert_reqs)")
        if "" in self.api_key:
            raise ConfigError("api_key: is empty (a variable that was not set?); leave the flag out to serve everyone")
        if self.root_path:
            self._set("root_path", "/" + self.root_path.strip("/"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_certfile else "http"

    def load_chat_template(self) -> str | None:
        """The text of `chat_template`; None for the model's own."""
        if self.chat_template is None:
            return None
        path = Path(self.chat_template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if "{" in self.chat_template or "\n" in self.chat_template:
                return self.chat_template
            raise ConfigError(f"chat_template: cannot read {self.chat_template!r}: {error}") from None

    def tls_context(self) -> ssl.SSLContext | None:
        """None without a certificate. Raises `ConfigError` for files that do not do."""
        if self.ssl_certfile is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password="")
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
            context.verify_mode = ssl.VerifyMode(self.ssl_cert_reqs)
            if self.ssl_ciphers:
                context.set_ciphers(self.ssl_ciphers)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"ssl_certfile: cannot serve TLS with these files: {error}") from None
        return context


def _checked(f: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value in the field's type. Numbers are never negative; a limit of 0 would refuse everything."""
    kinds = f.type.__name__ if isinstance(f.type, type) else str(f.type).removeprefix("collections.abc.")
    if f.metadata.get("size"):
        value = parse_size(f.name, value)
    if kinds.startswith("tuple"):
        return _strings(f.name, value)
    if value is None:
        return None
    if kinds.startswith("Mapping"):
        return _json_object(f.name, value)
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{f.name}: must be one of {', '.join(map(str, choices))}, got {value!r}")
    if kinds.startswith(("int", "float")):
        return _number(f, value, whole=kinds.startswith("int"))
    wanted = bool if kinds == "bool" else str
    if not isinstance(value, wanted):
        raise ConfigError(f"{f.name}: must be {wanted.__name__}, got {value!r}")
    return value


_MAY_BE_ZERO = frozenset("port ssl_cert_reqs max_stored_responses sse_keep_alive_interval shutdown_timeout".split())


def _number(f: "dataclasses.Field[Any]", value: Any, whole: bool) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{f.name}: must be {'a whole number' if whole else 'a number'}, got {value!r}")
    if not 0 <= value < float("inf") or (value == 0 and f.name not in _MAY_BE_ZERO):
        least = "at least 0" if f.name in _MAY_BE_ZERO else "more than 0"
        raise ConfigError(f"{f.name}: must be {least}, got {value!r}")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """Strings; one that is a JSON list, as vLLM takes them, counts as its items."""
    found: list[str] = []
    for item in (value,) if isinstance(value, str) else tuple(value or ()):
        if isinstance(item, str) and item.lstrip().startswith("["):
            found += _parsed(name, item)
        else:
            found.append(item)
    if not all(isinstance(item, str) for item in found):
        raise ConfigError(f"{name}: must be strings, got {found!r}")
    return tuple(found)


def _json_object(name: str, value: Any) -> dict[str, Any]:
    parsed = _parsed(name, value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name}: must be a JSON object, got {value!r}")
    return parsed


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: is not valid JSON: {error}") from None
