"""One structured line for each cancelled request: never a traceback, never an error level.

The line is written when the request holds nothing any more.  For a request that was executing, that is when its device
let go, so the line can say what the cancel cost.
"""

from __future__ import annotations

import logging

from ..batch import Member
from ..request import InferenceRequest

LOGGER = logging.getLogger("triton_trio.cancel")


def log_cancelled(request: InferenceRequest, member: Member | None = None) -> None:
    """``member`` is given if the request was executing; its device resources have just been released."""
    of = request.cancelled_for
    if of is None or not LOGGER.isEnabledFor(logging.INFO):
        return
    request = of
    queued_until = request.bound_at or request.ended_at
    queued_ms = (queued_until - request.enqueued_at) * 1e3 if request.enqueued_at else 0.0
    after_ms = 0.0 if member is None else member.seconds_after_cancel * 1e3
    steps = 0 if member is None else member.steps_after_cancel
    reason = request.reason.value if request.reason else ""
    LOGGER.info(
        "cancelled request id=%r model=%s version=%d reason=%s stage=%s queued_ms=%.3f device_ms_after_cancel=%.3f "
        "device_steps_after_cancel=%d generation=%d",
        request.request_id,
        request.model_name,
        request.model_version,
        reason,
        request.stage.value,
        queued_ms,
        after_ms,
        steps,
        request.generation,
        extra={
            "request_id": request.request_id,
            "model": request.model_name,
            "reason": reason,
            "stage": request.stage.value,
            "queued_ms": queued_ms,
            "device_ms_after_cancel": after_ms,
            "device_steps_after_cancel": steps,
        },
    )
