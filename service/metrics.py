"""Every Prometheus metric, defined once.

API and worker are separate processes and each exports what it saw itself, so that sums over processes are right. The
gauges of the queue are asked of the queue at each scrape of the API. No label ever holds a prompt, an id or a raw path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

from service.jobs import ArtifactInfo, SelfTest
from service.queue.client import Stats, Swept

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

HTTP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
WAIT_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
JOB_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 240, 300, 420, 600, 900, 1200, 1800, 3600)
STEP_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60)
VIEWS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace="lowbit", registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, namespace="lowbit", registry=REGISTRY)


def _histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
    return Histogram(name, text, labels, namespace="lowbit", buckets=tuple(buckets), registry=REGISTRY)


# The API
http_requests = _counter("http_requests", "Requests answered", "method", "route", "code")
http_request_seconds = _histogram(
    "http_request_duration_seconds", "From request to the start of its answer", HTTP_SECONDS, "method", "route"
)
event_streams = _gauge("event_streams", "Callers that follow a job's events now")
jobs_submitted = _counter("jobs_submitted", "Jobs created", "kind", "artifact")
jobs_rejected = _counter("jobs_rejected", "Submissions refused, by the problem's type", "reason")

# The queue, as the API sees it
queue_depth = _gauge("queue_depth", "Jobs ready for a worker", "artifact")
queue_delayed = _gauge("queue_delayed", "Jobs waiting for a retry")
queue_running = _gauge("queue_running", "Jobs held by a worker")
queue_dead_letters = _gauge("queue_dead_letters", "Jobs given up after as many attempts as allowed")
queue_oldest_age_seconds = _gauge("queue_oldest_age_seconds", "How long the next job has been ready", "artifact")
queue_backlog_seconds = _gauge("queue_backlog_seconds", "Ready jobs times the mean of the last ones", "artifact")
queue_workers = _gauge("queue_workers", "Living workers")
queue_up = _gauge("queue_up", "1 where the queue server answered this scrape")

# What time did to a job; counted by whoever saw it, worker or API
jobs_finished = _counter("jobs_finished", "Jobs that ended", "kind", "artifact", "outcome")
job_failures = _counter("job_failures", "Attempts that failed", "reason")
jobs_requeued = _counter("jobs_requeued", "Jobs that came back to the queue", "reason")

# The worker
job_queue_wait_seconds = _histogram("job_queue_wait_seconds", "From ready to claimed", WAIT_SECONDS, "kind", "artifact")
job_seconds = _histogram("job_duration_seconds", "From claim to commit", JOB_SECONDS, "kind", "artifact")
stage_seconds = _histogram("stage_duration_seconds", "fetch, load, run, upload", JOB_SECONDS, "stage", "artifact")
artifact_load_seconds = _gauge("artifact_load_seconds", "How long the last load of an artifact took", "artifact")
denoise_step_seconds = _histogram("denoise_step_seconds", "Between two steps of a video", STEP_SECONDS, "artifact")
recon_frames = _histogram("recon_frames", "Views of a scene", VIEWS, "artifact")
cache_bytes = _gauge(
    "cache_bytes", "What the last job cached of what its attention lost, on the device or the host", "artifact", "place"
)
artifact = _gauge(
    "artifact_info", "1 for each artifact a worker holds", "artifact", "family", "method", "bits", "density"
)
kernel_version = _gauge(
    "kernel_version", "1 for the version that an op runs by, as tested at the start", "op", "version"
)
artifact_selftest = _gauge(
    "artifact_selftest", "1 for what the self-test said: passed, fallback, refused", "artifact", "verdict"
)
selftest_seconds = _gauge("selftest_seconds", "How long the self-test of an artifact took", "artifact")
kernels_compiled = _counter("kernels_compiled", "Kernels that Triton made ready: new, or from the disk", "cache")
kernel_compile_seconds = _counter("kernel_compile_seconds", "What that took", "cache")
worker_state = _gauge(
    "worker_state",
    "1 for the state it is in: starting, short-of-memory in its self-test, ready, busy, draining, or refused",
    "state",
)
worker_beat_age_seconds = _gauge("worker_beat_age_seconds", "Since the worker last told the queue that it lives")
worker_lease_lost = _counter("worker_lease_lost", "Jobs that another attempt took over while this worker ran them")
duplicates_suppressed = _counter("duplicate_results_suppressed", "Finished results that were refused by the fence")
queue_errors = _counter("queue_errors", "Calls of the queue server that failed")

STATES = ("starting", "short-of-memory", "ready", "busy", "draining", "refused")
VERDICTS = ("passed", "fallback", "refused")


def in_state(state: str) -> None:
    for name in STATES:
        worker_state.labels(name).set(name == state)


def holds(infos: Iterable[ArtifactInfo]) -> None:
    artifact.clear()
    for info in infos:
        density = "1" if info.density is None else f"{info.density:g}"
        artifact.labels(info.name, info.family, info.method or "none", info.bits or "none", density).set(1)


def tested(found: Mapping[str, SelfTest]) -> None:
    """What the self-test of each artifact found, by the artifacts' names."""
    kernel_version.clear()
    for name, one in found.items():
        for verdict in VERDICTS:
            artifact_selftest.labels(name, verdict).set(verdict == one.verdict)
        selftest_seconds.labels(name).set(one.seconds)
        for op, version in one.versions.items():
            kernel_version.labels(op, version).set(1)


def compiled(seconds: float, cached: bool) -> None:
    """Of one kernel."""
    cache = "hit" if cached else "miss"
    kernels_compiled.labels(cache).inc()
    kernel_compile_seconds.labels(cache).inc(seconds)


def count_swept(swept: Iterable[Swept]) -> None:
    for one in swept:
        if one.what == "requeued":
            jobs_requeued.labels("worker-lost").inc()
            job_failures.labels("worker-lost").inc()
            continue
        if one.what == "dead":
            job_failures.labels("worker-lost").inc()
        outcome = "failed" if one.what == "dead" else one.what
        jobs_finished.labels(one.kind, one.artifact, outcome).inc()


def show_queue(stats: Stats | None) -> None:
    """None where the queue server did not answer: its gauges then keep no stale value."""
    queue_up.set(stats is not None)
    for gauge in (queue_depth, queue_oldest_age_seconds, queue_backlog_seconds):
        gauge.clear()
    nan = float("nan")
    queue_delayed.set(stats.delayed if stats else nan)
    queue_running.set(stats.running if stats else nan)
    queue_dead_letters.set(stats.dead if stats else nan)
    queue_workers.set(stats.workers if stats else nan)
    for lane in stats.lanes if stats else ():
        queue_depth.labels(lane.artifact).set(lane.ready)
        queue_oldest_age_seconds.labels(lane.artifact).set(lane.oldest_seconds)
        queue_backlog_seconds.labels(lane.artifact).set(lane.ready * lane.job_seconds)
