"""``GET /metrics``, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from moesaic.serve.server.stats import Gauge

MEDIA_TYPE = CONTENT_TYPE_LATEST
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_REQUESTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class EngineCollector(Collector):
    """The engine's numbers as they were last seen, made into metrics when somebody asks."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge

    def collect(self) -> Iterator[Metric]:
        """What the engine has and has done."""
        stats = self._gauge.engine
        gauges = {
            "queue_sequences": (stats.waiting, "Sequences that wait for a place in the batch."),
            "batch_sequences": (stats.running, "Sequences that run."),
            "kv_pages": (stats.pages_total, "Pages of the KV cache."),
            "kv_pages_used": (stats.pages_used, "Pages that hold running sequences."),
            "kv_pages_cached": (stats.pages_cached, "Free pages that hold prefixes."),
            "adapter_slots": (stats.slots_total, "Places for experts of adapters, of all layers."),
            "adapter_slots_used": (stats.slots_used, "Places that hold one."),
        }
        for name, (now, text) in gauges.items():
            yield GaugeMetricFamily(f"moesaic_{name}", text, value=now)
        counters = {
            "steps": (stats.steps, "Forward passes."),
            "prompt_tokens": (stats.prompt_tokens, "Tokens of prompts."),
            "cached_tokens": (stats.cached_tokens, "Tokens of prompts that were found in the prefix tree."),
            "generated_tokens": (stats.generated_tokens, "New tokens."),
            "preemptions": (stats.preemptions, "Sequences that gave their pages back and were computed again."),
            "finished_requests": (stats.finished, "Requests that ended."),
        }
        for name, (count, text) in counters.items():
            yield CounterMetricFamily(f"moesaic_{name}", text, value=count)
        in_flight = GaugeMetricFamily("moesaic_adapter_sequences", "Sequences in flight.", labels=["adapter"])
        for adapter, running in stats.adapters.items():
            in_flight.add_metric([adapter], running)
        yield in_flight
        rows = CounterMetricFamily(
            "moesaic_expert_rows", "Rows that an expert has computed.", labels=["layer", "expert"]
        )
        for layer, load in stats.expert_load.items():
            for expert, count in enumerate(load):
                rows.add_metric([layer, str(expert)], count)
        yield rows


class Metrics:
    """Everything that is counted, in a registry of its own: two servers may live in one process."""

    def __init__(self, gauge: Gauge) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(gauge))
        self.first_token = self._times("time_to_first_token", "From a request to its first token.", _REQUESTS)
        self.between_tokens = self._times("time_between_tokens", "From one token of a sequence to its next.", _STEPS)
        self.request = self._times("request", "From a request to its last token.", _REQUESTS)
        self._responses = Counter(
            "moesaic_http_responses", "Answers, by route and status.", ["route", "status"], registry=self._registry
        )
        self._errors = Counter(
            "moesaic_errors", "Errors that clients were told, by code.", ["code"], registry=self._registry
        )

    def responded(self, route: str, status: int) -> None:
        """An answer has begun."""
        self._responses.labels(route, str(status)).inc()

    def erred(self, code: str) -> None:
        """A client was told of an error; ``code``: the error's own, or its HTTP status."""
        self._errors.labels(code).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _times(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"moesaic_{name}_seconds", text, buckets=buckets, registry=self._registry)
