"""Requests of the HTTP server as metrics, named as vLLM's server names them.

`HttpMetrics.observe` is called once a request, after its last byte. The labels are bounded whatever clients send: a
handler is the template of a route, never a path, and methods that are none are one.
"""

from prometheus_client.registry import CollectorRegistry

from mini_vllm.engine.metrics.series import counter, histogram, summary

UNMATCHED = "none"
"""The handler of requests that no route takes."""

UNCOUNTED_HANDLERS = frozenset({"/metrics", "/health", "/ping", "/load", "/version"})
"""What monitors ask every few seconds would hide everything else."""

FEW_BUCKETS = (0.1, 0.5, 1.0)
MANY_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip

_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})


class HttpMetrics:
    """How many requests each route had, how long they took, and how large they were."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = counter(
            registry, "http_requests", "Requests by method, status and handler.", ("method", "status", "handler")
        )
        self._request_size = summary(
            registry, "http_request_size_bytes", "Bytes of request bodies by handler.", ("handler",)
        )
        self._response_size = summary(
            registry, "http_response_size_bytes", "Bytes of response bodies by handler.", ("handler",)
        )
        self._duration_of_all = histogram(
            registry, "http_request_duration_highr_seconds", "Duration of all requests.", (), MANY_BUCKETS
        ).labels()
        self._duration = histogram(
            registry,
            "http_request_duration_seconds",
            "Duration of requests by method and handler, in few buckets.",
            ("method", "handler"),
            FEW_BUCKETS,
        )

    def observe(
        self, method: str, handler: str | None, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """One request that is over, streamed or not.

        handler: the route's template, such as '/v1/responses/{response_id}'; None where no route matched.
        status: of the response, or 499 when the client left before there was one.
        """
        if handler in UNCOUNTED_HANDLERS:
            return
        handler = handler or UNMATCHED
        method = method if method in _METHODS else "other"
        self._requests.labels(method, f"{status // 100}xx", handler).value += 1
        self._request_size.labels(handler).observe(request_bytes)
        self._response_size.labels(handler).observe(response_bytes)
        self._duration_of_all.observe(seconds)
        self._duration.labels(method, handler).observe(seconds)
