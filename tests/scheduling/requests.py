"""Requests as a scheduler sees them."""

from __future__ import annotations

from triton_trio.lifecycle import Event
from triton_trio.request import InferenceRequest


def make(
    label: str = "",
    *,
    rows: int = 1,
    priority: int = 0,
    timeout: float = 0,
    shape: object = None,
    at: float = 0.0,
) -> InferenceRequest:
    """A checked request; ``timeout`` in seconds, ``at`` for queues that are filled by hand."""
    request = InferenceRequest({}, request_id=label, priority=priority, timeout_us=int(timeout * 1e6))
    request.batch_size = rows
    request.signature = shape
    request.enqueued_at = at
    return request


def labels(requests: object) -> str:
    """``"abc"``: the labels of an iterable of requests."""
    return "".join(request.request_id for request in requests)  # type: ignore[attr-defined]


def admitted(request: InferenceRequest) -> InferenceRequest:
    request.admit("m", 1, lambda request, place: None)
    return request


def queued(request: InferenceRequest) -> InferenceRequest:
    admitted(request).advance(Event.ENQUEUE)
    return request
