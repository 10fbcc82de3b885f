"""Where a model's instances run, and what each must hold to execute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..descriptors import enum_name


@dataclass(frozen=True, slots=True)
class RateLimiterResource:
    name: str
    count: int  #: held by an execution
    is_global: bool = False  #: one pool for the server, or one for each device


@dataclass(frozen=True, slots=True)
class RateLimiter:
    """``priority`` 2 gets half the executions of priority 1."""

    resources: tuple[RateLimiterResource, ...] = ()
    priority: int = 1


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """``count`` like instances on the CPU, or on each of ``gpus``."""

    name: str = ""  #: empty: the model's name, and the group's number if the model lists its groups
    kind: str = "KIND_AUTO"  #: or ``KIND_CPU``, ``KIND_GPU``, ``KIND_MODEL``
    count: int = 1
    gpus: tuple[int, ...] = ()  #: device numbers; empty: the backend's choice
    rate_limiter: RateLimiter = RateLimiter()
    passive: bool = False  #: loaded, but never given work
    host_policy: str = ""
    profile: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """For each instance, the device that ``gpus`` has for it; without a list, its own number."""
        return tuple(gpu for gpu in self.gpus for _ in range(self.count)) or tuple(range(self.count))

    @classmethod
    def read(cls, message: Any) -> InstanceGroup:
        """From a ``ModelInstanceGroup``."""
        limiter = message.rate_limiter
        return cls(
            name=message.name,
            kind=enum_name(message, "kind"),
            count=message.count,
            gpus=tuple(message.gpus),
            rate_limiter=RateLimiter(
                tuple(RateLimiterResource(r.name, r.count, getattr(r, "global")) for r in limiter.resources),
                limiter.priority or 1,
            ),
            passive=message.passive,
            host_policy=message.host_policy,
            profile=tuple(message.profile),
        )

    def write(self, message: Any) -> None:
        """Into an empty ``ModelInstanceGroup``."""
        message.MergeFrom(
            type(message)(
                name=self.name,
                kind=self.kind,
                count=self.count,
                gpus=self.gpus,
                passive=self.passive,
                host_policy=self.host_policy,
                profile=self.profile,
            )
        )
        if self.rate_limiter != RateLimiter():
            message.rate_limiter.priority = self.rate_limiter.priority
            for resource in self.rate_limiter.resources:
                fields = {"name": resource.name, "count": resource.count, "global": resource.is_global}
                message.rate_limiter.resources.add(**fields)
