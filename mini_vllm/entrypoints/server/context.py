"""Who asks: what the middleware found out about one HTTP request before any handler runs."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from mini_vllm.request import Tenant


@dataclass(frozen=True)
class RequestContext:
    """request_id: of the X-Request-Id header, the client's own or ours.
    key_name: of the API key; '' where there are none.

    cache_scope: what the server puts before every cache salt of this key, so that no other key can share its prefixes;
        None where all share.
    arrival_time: seconds on the monotonic clock.
    """

    request_id: str
    arrival_time: float
    key_name: str = ""
    cache_scope: str | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """Whose stored responses this request may see."""
        return self.key_name

    def tenant(self, user: str | None = None) -> Tenant:
        """For fair sharing. `user` is what the body says; it is told apart inside the key only."""
        return Tenant(self.key_name, user or "")

    def cache_salt(self, asked: str | None = None) -> str | None:
        """The salt of the prefix cache: what the body asks for, within what the key may share."""
        if self.cache_scope is None:
            return asked
        if asked is None:
            return self.cache_scope
        return hmac.new(self.cache_scope.encode(), asked.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def context_of(connection: HTTPConnection) -> RequestContext:
    """What the middleware left in the scope of a request."""
    context: RequestContext = connection.scope["state"]["context"]
    return context
