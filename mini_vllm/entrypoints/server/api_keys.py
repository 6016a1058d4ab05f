"""API keys: where they come from, how one is recognised, and the part of the prefix cache it gets.

Keys are kept and compared as digests under a secret of this process, all of them every time, so that the time taken
says nothing about any of them. Nothing here needs to outlive the process: the prefix cache does not either.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

_ENVIRONMENT = ("MINI_VLLM_API_KEY", "VLLM_API_KEY")
_NAMED = re.compile(r"([A-Za-z0-9_.@-]{1,64}):(.+)")


@dataclass(frozen=True)
class Owner:
    """Who a key stands for. Keys of the same name are one owner, so that a key can be replaced without a gap.

    cache_scope: see `RequestContext`.
    """

    name: str
    cache_scope: str | None


class ApiKeys:
    """keys: pairs of name and key. share_prefix_cache: give owners no parts of their own."""

    def __init__(self, keys: Iterable[tuple[str, str]], share_prefix_cache: bool = False) -> None:
        self._secret = secrets.token_bytes(32)
        self._owners: dict[bytes, Owner] = {}
        for name, key in keys:
            digest = self._digest(key.encode())
            if self._owners.setdefault(digest, self._owner(name, share_prefix_cache)).name != name:
                raise ConfigError(f"api_key: {name!r} and {self._owners[digest].name!r} have the same key")

    def __len__(self) -> int:
        return len(self._owners)

    def find(self, presented: bytes) -> Owner | None:
        """Whose key this is, in a time that depends on the number of keys alone."""
        digest = self._digest(presented)
        found = None
        for known, owner in self._owners.items():
            if hmac.compare_digest(digest, known):
                found = owner
        return found

    def _owner(self, name: str, share_prefix_cache: bool) -> Owner:
        scope = None if share_prefix_cache else self._digest(b"cache scope of " + name.encode()).hex()
        return Owner(name, scope)

    def _digest(self, key: bytes) -> bytes:
        return hmac.new(self._secret, key, hashlib.sha256).digest()


def load_api_keys(
    given: Iterable[str], file: str | None, environment: Mapping[str, str] = os.environ
) -> list[tuple[str, str]]:
    """Names and keys of the flag and the file; of the environment only if there are neither."""
    keys = [(f"key-{i}", key) for i, key in enumerate(given, start=1)]
    if file is not None:
        keys += _read(file)
    if not keys:
        keys = [("key-1", environment[name]) for name in _ENVIRONMENT if environment.get(name)][:1]
    for name, key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"api_key: the key of {name!r} must be visible ASCII, as headers are")
    return keys


def _read(path: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: cannot read {path!r}: {error}") from None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("api_key_file: others can read %s; chmod 600 is better", path)
    keys = []
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            named = _NAMED.fullmatch(line)
            keys.append((named[1], named[2].strip()) if named else (f"line-{number}", line))
    if not keys:
        raise ConfigError(f"api_key_file: {path!r} has no keys")
    return keys
