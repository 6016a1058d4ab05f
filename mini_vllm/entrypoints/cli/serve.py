"""`mini-vllm serve`: serve a model over the APIs of OpenAI and Anthropic."""

import argparse
import dataclasses
import ipaddress
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mini_vllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from mini_vllm.entrypoints.cli.arguments import (
    HelpFormatter,
    add_arguments_of,
    add_engine_arguments,
    engine_args_from,
)
from mini_vllm.entrypoints.cli.config_file import with_config_file
from mini_vllm.entrypoints.cli.sectioned_help import SectionedHelp
from mini_vllm.entrypoints.server.serve_args import SECTIONS, ServeArgs
from mini_vllm.exceptions import ConfigError

if TYPE_CHECKING:
    from mini_vllm.entrypoints.server.state import ServerState

_EXAMPLES = """\
examples:
  mini-vllm serve                                       the bundled model at http://127.0.0.1:8000
  mini-vllm serve DIR --max-model-len 16k               a checkpoint of yours
  mini-vllm serve DIR --api-key-file keys --host 0.0.0.0
  mini-vllm serve --help=all                            every flag
  mini-vllm serve --help=scheduler                      those of a section
  mini-vllm serve --help=max-num-seqs                   one of them
"""
_ALWAYS_ON = "is always on here; leave the flag out"
_ALWAYS_OFF = "is not here, and never logged or sent; leave the flag out"
NOT_HERE: Mapping[str, str] = {
    "enable_request_id_headers": _ALWAYS_ON,
    "enable_prompt_tokens_details": _ALWAYS_ON,
    "enable_server_load_tracking": _ALWAYS_ON,
    "h11_max_header_count": "headers are parsed by httptools here; --max-header-bytes limits them",
    "h11_max_incomplete_event_size": "headers are parsed by httptools here; --max-header-bytes limits them",
    **dict.fromkeys(
        """api_server_count headless grpc grpc_port enable_auto_tool_choice tool_call_parser tool_parser_plugin
        tool_server exclude_tools_when_tool_choice_none lora_modules return_tokens_as_token_ids middleware
        enable_log_requests enable_log_outputs enable_log_deltas max_log_len log_error_stack enable_ssl_refresh
        enable_tokenizer_info_endpoint enable_offline_docs enable_per_request_metrics fingerprint_mode
        fingerprint_value enable_scale_out tokens_only trust_request_mm_kwargs allowed_media_domains
        profiler_config structured_outputs_config renderer_num_workers""".split(),
        "vLLM has this flag, but it is not supported here yet",
    ),
}  # fmt: skip
"""Flags of `vllm serve` that are none of ours, and why; `is_vllm_argument` knows those of the engine."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP (APIs of OpenAI and Anthropic)",
        description="Serve a model over the APIs of OpenAI and Anthropic.",
        usage="mini-vllm serve [MODEL] [options]",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.not_here = NOT_HERE
    parser.rewrite = with_config_file
    parser.add_argument(
        "model_tag", nargs="?", metavar="MODEL", help="The same as --model. Default: the bundled model."
    )
    parser.add_argument(
        "-h", "--help", nargs="?", const="", action=SectionedHelp, metavar="WHAT",
        help="Sections of flags; with =SECTION or =FLAG what that is, with =all everything.",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of flags, such as 'port: 9000'; the command line wins over it."
    )
    add_arguments_of(ServeArgs, SECTIONS, parser, {})
    add_engine_arguments(parser)
    parser.set_defaults(run=run, verbose=True)  # a server is watched through its log


def run(args: argparse.Namespace) -> int:
    from mini_vllm.entrypoints.server.launcher import run_server

    engine_args, serve_args = _engine_args(args), _serve_args(args)
    if serve_args.enable_debug_steps:
        engine_args = dataclasses.replace(engine_args, step_trace_detailed=True)
    model_name = DEFAULT_MODEL.name if engine_args.model is None else engine_args.model
    return run_server(engine_args, serve_args, model_name, _announce)


def _engine_args(namespace: argparse.Namespace) -> EngineArgs:
    if namespace.model_tag is not None:
        if getattr(namespace, "model", namespace.model_tag) != namespace.model_tag:
            raise ConfigError(f"model: {namespace.model_tag!r} and --model {namespace.model!r} are two models")
        namespace.model = namespace.model_tag
    args = engine_args_from(namespace)
    if args.model is None and args.num_threads is None:
        # its layers are so small that a second thread costs more than it does, and the API needs a core
        return dataclasses.replace(args, num_threads=1)
    return args


def _serve_args(namespace: argparse.Namespace) -> ServeArgs:
    names = {field.name for field in dataclasses.fields(ServeArgs)}
    return ServeArgs(**{name: value for name, value in vars(namespace).items() if name in names})


def _announce(state: "ServerState", sock: socket.socket) -> None:
    """What a person needs to try it."""
    from mini_vllm.entrypoints.server.sockets import url_of

    args, url = state.args, url_of(state.args, sock)
    where = f"{url} ({args.uds})" if args.uds else url
    options = f" --unix-socket {args.uds}" if args.uds else ""
    options += f" --cacert {args.ssl_certfile}" if args.ssl_certfile else ""
    key = " -H 'Authorization: Bearer KEY'" if len(state.api_keys) else ""
    print(
        f"\nServing {state.model_name} at {where}\n\n"
        f"  curl{options} {url}/v1/completions -H 'Content-Type: application/json'{key} \\\n"
        f"""    -d '{{"model": "{state.model_name}", "prompt": "def fib(n):", "max_tokens": 32}}'\n""",
        flush=True,
    )
    if not len(state.api_keys) and not _is_private(sock):
        print("Whoever reaches this address can use the server: --api-key-file asks for keys.\n", flush=True)


def _is_private(sock: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return sock.family == socket.AF_UNIX or ipaddress.ip_address(sock.getsockname()[0]).is_loopback
