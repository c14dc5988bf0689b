"""What a handler may ask for in its signature: the running service, and a caller with the scope that is needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, cast, final

import anyio
import anyio.to_thread
from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.catalogue import Catalogue
from service.contract.settings import Settings
from service.contract.store import Store
from service.contract.tokens.decode import Limits
from service.database import Database
from service.edge.queue_gauges import QueueGauges
from service.edge.telemetry import Telemetry
from service.followers import Followers
from service.inference.examinations import Examinations
from service.inference.gateway import Gateway
from service.inference.label_cache import LabelCache
from service.keys import Caller, Keys, Scope
from service.known_sets import KnownSets

T = TypeVar("T")


@final
@dataclass
class Service:
    """Everything that is open while the process serves."""

    settings: Settings
    limits: Limits
    database: Database
    store: Store
    gateway: Gateway
    catalogue: Catalogue
    sets: KnownSets
    keys: Keys
    followers: Followers
    labels: LabelCache
    telemetry: Telemetry
    queue_gauges: QueueGauges
    examinations: Examinations = field(default_factory=Examinations)
    # Threads for each kind of work, so that none of them can starve another.
    token_threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(4))
    file_threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(16))
    draining: bool = False

    async def in_file_thread(self, work: Callable[[], T]) -> T:
        """Run what reads or writes the store."""
        return await anyio.to_thread.run_sync(work, limiter=self.file_threads)


def service_of(app: Any) -> Service:
    """Return the service of a running application."""
    return cast("Service", app.state.service)


async def _current(request: Request) -> Service:
    return service_of(request.app)


def request_id_of(request: Request) -> str:
    """Return the id under which this request is logged, and which its answer carries."""
    return cast("str", request.scope["isthmus.request_id"])


_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="`isthmus keys create` prints one")


def _may(scope: Scope) -> Callable[[Request, HTTPAuthorizationCredentials | None], Awaitable[Caller]]:
    async def check(
        request: Request, _key: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Caller:
        caller = cast("Caller", request.scope["isthmus.caller"])  # the middleware knows who it is
        caller.require(scope)
        return caller

    return check


Running = Annotated[Service, Depends(_current)]
Reader = Annotated[Caller, Depends(_may("read"))]
Inferrer = Annotated[Caller, Depends(_may("infer"))]
Writer = Annotated[Caller, Depends(_may("write"))]
Admin = Annotated[Caller, Depends(_may("admin"))]
IdempotencyKey = Annotated[
    str | None,
    Header(description="the same key and body get the first answer for 24 hours; 1 to 255 printable ASCII characters"),
]
