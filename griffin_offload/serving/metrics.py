"""Counters for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .respond import Ended

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one server."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter("griffin_requests", "Requests that were answered.", ["path", "status"], registry=own)
        self.cancelled = Counter("griffin_cancelled", "Requests whose client left before the end.", registry=own)
        self._prompt = Counter("griffin_prompt_tokens", "Tokens of prompts.", ["how"], registry=own)
        self._tokens = Counter("griffin_generated_tokens", "Tokens of answers.", registry=own)
        self._read = Counter("griffin_read_bytes", "Bytes of the model that were read.", registry=own)
        self._first = Histogram(
            "griffin_first_token_seconds", "From a request's turn to its first token.", buckets=SECONDS, registry=own
        )
        self._wait = Histogram("griffin_wait_seconds", "In the queue.", buckets=SECONDS, registry=own)
        self._speed = Gauge("griffin_tokens_per_second", "Of the last answer, after its first token.", registry=own)
        self._resident = Gauge("griffin_resident_bytes", "Of the model that is in memory.", registry=own)
        self._peak = Gauge("griffin_peak_bytes", "Measured during the last answer.", ["what"], registry=own)
        Gauge("griffin_waiting", "Requests in the queue.", registry=own).set_function(waiting)
        Gauge("griffin_running", "Requests that are being answered.", registry=own).set_function(running)

    def waited(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def ended(self, event: Ended) -> None:
        """Count a finished answer."""
        report = event.report
        self._prompt.labels("reused").inc(event.cached)
        self._prompt.labels("computed").inc(event.prompt_tokens - event.cached)
        self._tokens.inc(event.tokens)
        self._read.inc(report.bytes_read)
        self._first.observe(event.first_s)
        self._speed.set(report.decode_tokens_per_s)
        self._resident.set(report.plan.resident_bytes)
        self._peak.labels("measured").set(report.measured_peak)
        self._peak.labels("planned").set(report.plan.peak)

    def text(self) -> bytes:
        return generate_latest(self._registry)
