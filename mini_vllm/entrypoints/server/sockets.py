"""Sockets to listen on, bound before a model is loaded, so that a port in use is told at once."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from mini_vllm.entrypoints.server.serve_args import ServeArgs
from mini_vllm.exceptions import ConfigError

_BACKLOG = 2048


@contextlib.contextmanager
def listening_socket(args: ServeArgs) -> Iterator[socket.socket]:
    """A socket that listens where the arguments say. Raises `ConfigError`. A Unix socket's file goes in the end."""
    if args.uds is None:
        with _tcp_socket(args.host, args.port) as sock:
            yield sock
        return
    path = Path(args.uds)
    with _unix_socket(path) as sock:
        identity = path.stat().st_ino
        try:
            yield sock
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == identity:  # not that of a server started since
                    path.unlink()


def url_of(args: ServeArgs, sock: socket.socket) -> str:
    """Where clients find the server; for a Unix socket, the URL to use through it."""
    if args.uds is not None:
        return f"{args.scheme}://localhost{args.root_path}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"{args.scheme}://{host}:{sock.getsockname()[1]}{args.root_path}"


def _tcp_socket(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        name = "host" if isinstance(error, socket.gaierror | UnicodeError) else "port"
        raise ConfigError(f"{name}: cannot listen on {host}:{port}: {_reason(error)}") from None


def _unix_socket(path: Path) -> socket.socket:
    """Open to this user alone from its first moment on."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(_BACKLOG)
        return sock
    except OSError as error:
        sock.close()
        raise ConfigError(f"uds: cannot listen on {path}: {_reason(error)}") from None
    except ConfigError:
        sock.close()
        raise


def _remove_stale(path: Path) -> None:
    """Take away the socket of a server that is gone; nothing else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"uds: {path} exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"uds: another server listens on {path}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
