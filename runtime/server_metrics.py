"""Numbers for Prometheus and lines for the log: counts, times and sizes, never contents.

Neither holds text of a question or answer, a file name, an identifier of a study or anything a
caller typed: a label or log field is always one of our own words or a number.
"""

import logging
import traceback

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from medmo_edge.runtime.answers import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOG = logging.getLogger("medmo_edge.server")

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES = {
    "questions_waiting": "Questions in the queue",
    "answers_running": "Answers that are being written",
    "studies": "Studies kept",
    "study_bytes": "Bytes of uploaded files kept",
}


class Metrics:
    """All metrics of one server; methods may be called from any thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "medmo_edge_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=registry,
        )
        self._answers = Counter(
            "medmo_edge_answers", "Answers by how they ended", ["finish"], registry=registry
        )
        self._tokens = Counter("medmo_edge_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._first = _times("time_to_first_token", "From request to first text", registry)
        self._whole = _times("answer", "From request to the end of the answer", registry)
        self._bugs = Counter(
            "medmo_edge_unexpected_errors", "Failures that are bugs", registry=registry
        )
        self._gauges = {
            name: Gauge(f"medmo_edge_{name}", what, registry=registry)
            for name, what in _GAUGES.items()
        }
        self._info = Info("medmo_edge_server", "What is served", registry=registry)

    def describe(self, **facts: str) -> None:
        """Constant facts: version, target, backend, manifest hash."""
        self._info.info(facts)

    def request(self, route: str, status: int, seconds: float, request_id: str) -> None:
        """One finished request; ``route`` is the pattern, not the path."""
        self._requests.labels(route, str(status)).inc()
        LOG.info("%s %d %.0f ms %s", route, status, 1000 * seconds, request_id)

    def first_token(self, seconds: float) -> None:
        """Seconds from the request to the first text."""
        self._first.observe(seconds)

    def answered(self, answer: Answer, seconds: float) -> None:
        """A finished answer and its seconds from the request on."""
        times = answer.timings
        self._whole.observe(seconds)
        self._answers.labels(answer.finish_reason).inc()
        self._tokens.labels("prompt").inc(times.prompt_tokens)
        self._tokens.labels("reused").inc(times.reused_tokens)
        self._tokens.labels("new").inc(times.new_tokens)

    def bug(self, error: BaseException) -> None:
        """An unexpected failure: where it happened, not what its message says."""
        self._bugs.inc()
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        places = " < ".join(f"{_short(each.filename)}:{each.lineno}" for each in frames[::-1])
        LOG.error("unexpected %s at %s", type(error).__name__, places)

    def lost(self, where: str, kind: str) -> None:
        """An error of type ``kind`` that nobody caught, e.g. in a library's thread."""
        self._bugs.inc()
        LOG.error("unexpected %s in a %s", kind, where)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name].set(value)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


def _times(name: str, what: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"medmo_edge_{name}_seconds", what, buckets=_SECONDS, registry=registry)


def _short(path: str) -> str:
    return "/".join(path.replace("\\", "/").split("/")[-2:])
