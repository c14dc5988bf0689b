"""Online inference: what waits goes out to a live worker, together with what else waits for the same model.

At most two calls are in flight per worker; what arrives meanwhile goes out in the next ones, and no timer holds
anything back. A worker that dies costs one retry. Nothing here touches the database while a request waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final, final

import aiohttp
import numpy as np
from jaxtyping import Float32

from service.contract.errors import IsthmusError, Malformed, TooMany, Unauthenticated, Unavailable
from service.contract.wire import (
    Arrays,
    ComposeCall,
    EmbedCall,
    ExamineAnswer,
    ExamineCall,
    ModelRef,
    unpack,
    unpack_error,
)
from service.inference.line import Line, Part, Request, write
from service.inference.workers import Worker, Workers

if TYPE_CHECKING:
    import sqlalchemy as sa

    from service.contract.settings import Settings

log = logging.getLogger(__name__)

OFF_LOOP_BYTES: Final = 1 << 20  # from here on, copying takes long enough to be done in a thread
GRACE_S: Final = 15.0  # how long requests wait for a worker that is being restarted
CONNECT_S: Final = 2.0
LAST_WORD_S: Final = 1.0  # the worker minds the deadline itself, and says so


@final
@dataclass(frozen=True)
class Timings:
    """Where the time of a request went, milliseconds; over several calls the longest wait and the sum of the work."""

    queue_ms: float
    inference_ms: float


@final
@dataclass(eq=False)
class Call:
    """Parts of requests on their way to a worker."""

    worker: Worker
    parts: list[Part]
    sent_at: float


@final
@dataclass(frozen=True)
class Reply:
    """What a worker said."""

    status: int
    body: bytes
    queue_ms: float
    inference_ms: float


@final
class Gateway:
    """Requests in, vectors out. Every method belongs to the event loop."""

    def __init__(self, settings: Settings, engine: sa.Engine) -> None:
        self._timeout_s = settings.request_timeout_s
        self._max_waiting = settings.max_waiting
        self._workers = Workers(settings, engine, self._on_workers)
        self._line = Line()
        self._calls: dict[Call, asyncio.Task[None]] = {}
        self._num_items = 0
        self._serial = count()
        self.num_calls = 0  # sent since the start

    async def start(self) -> None:
        """Find the workers."""
        await self._workers.start()

    async def stop(self) -> None:
        """Fail what waits, end what is in flight."""
        for request in self._line.all():
            request.fail(Unavailable("the service is stopping"))
        tasks = list(self._calls.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._workers.stop()

    def ready(self) -> bool:
        """Tell whether a worker can be called."""
        return self._workers.any_ready()

    async def embed(
        self, model: ModelRef, modality: str, sequences: list[list[np.ndarray]]
    ) -> tuple[Float32[np.ndarray, "item dim"], Timings]:
        """Embed items, each a list of token sequences of one modality.

        Raises what the model says of an item (`item` is its place), NotFound for a model that is not in the store,
        TooMany if too many items wait, Unavailable if no worker answers in time.
        """
        call = EmbedCall(model=model, modality=modality)
        kinds = {f"{sequence.dtype.str}{sequence.shape[1:]}" for item in sequences for sequence in item}
        if len(kinds) != 1:
            msg = "sequences of one modality have one dtype and one width, and there is at least one"
            raise ValueError(msg)
        group = ("embed", model.artifact, model.digest, modality, *kinds)
        request = self._request(group, model, call.model_dump(mode="json"), items=sequences)
        await self._wait_for(request)
        ordered = [arrays["vectors"] for _, (_, arrays) in sorted(request.answers.items(), key=lambda kept: kept[0])]
        return np.concatenate(ordered) if len(ordered) > 1 else ordered[0], _timings(request)

    async def compose(self, call: ComposeCall, arrays: Arrays) -> tuple[dict[str, Any], Arrays, Timings]:
        """Compose vectors, as the call says; the document is a `ComposeAnswer`.

        Raises what `embed` raises, and Invalid where the legs cannot be composed so.
        """
        model = call.legs[0].model
        group = ("compose", str(next(self._serial)))  # nothing that could be shared
        document = call.model_dump(mode="json", by_alias=True)
        request = self._request(group, model, document, arrays=arrays)
        await self._wait_for(request)
        ((answer, found),) = request.answers.values()
        return answer, found, _timings(request)

    async def examine(self, call: ExamineCall) -> ExamineAnswer:
        """Look at a pair of modalities that was never trained.

        Raises Invalid if the model keeps no banks for it, and what `compose` raises.
        """
        group = ("examine", str(next(self._serial)))
        request = self._request(group, call.model, call.model_dump(mode="json", by_alias=True))
        await self._wait_for(request)
        ((answer, _),) = request.answers.values()
        return ExamineAnswer.model_validate(answer)

    def _request(
        self,
        group: tuple[str, ...],
        model: ModelRef,
        document: dict[str, Any],
        *,
        items: list[list[np.ndarray]] | None = None,
        arrays: Arrays | None = None,
    ) -> Request:
        return Request(
            group=group,
            model=model.artifact,
            document=document,
            items=items or [],
            arrays=arrays or {},
            deadline=time.monotonic() + self._timeout_s,
            done=asyncio.get_running_loop().create_future(),
        )

    async def _wait_for(self, request: Request) -> None:
        if self._num_items and self._num_items + request.num_items > self._max_waiting:
            raise TooMany(f"{self._num_items} items wait for inference already", code="queue_full")
        if (missing := self._missing()) is not None:
            self._workers.look_again()  # so that whoever tries again finds what is new
            raise missing
        self._num_items += request.num_items
        self._line.add(request)
        self._pump()
        try:
            async with asyncio.timeout(max(0.0, request.deadline - time.monotonic())):
                await request.done
        except TimeoutError:
            raise Unavailable(f"not served within {self._timeout_s:g} s", code="deadline") from None
        finally:
            self._num_items -= request.num_items
            request.done.cancel()
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """Hang up on calls that nobody waits for any more: the worker then drops what it has not started."""
        for call, task in list(self._calls.items()):
            if any(one is request for one, _ in call.parts) and not any(one.is_open for one, _ in call.parts):
                task.cancel()

    def _missing(self) -> Unavailable | None:
        if not self._workers.any_known():
            return Unavailable("no worker serves: start one with the lane `serve`", code="no_worker")
        if not self._workers.any_ready() and time.monotonic() - self._workers.ready_at > GRACE_S:
            return Unavailable("no inference process is ready", code="no_worker")
        return None

    def _on_workers(self) -> None:
        # Requests in the line outlast a short absence: a supervisor that restarts has no row for a moment.
        if not self._workers.any_ready() and time.monotonic() - self._workers.ready_at > GRACE_S:
            for request in self._line.all():
                request.fail(self._missing() or Unavailable())
        self._pump()

    def _pump(self) -> None:
        while (head := self._line.head()) is not None:
            worker = self._workers.choose(head.model, head.avoid)
            if worker is None:
                return
            self._send(worker, self._line.take())

    def _send(self, worker: Worker, parts: list[Part]) -> None:
        now = time.monotonic()
        call = Call(worker, parts, now)
        worker.enter()
        self.num_calls += 1
        task = asyncio.create_task(self._attend(call))
        task.add_done_callback(lambda done: _fail_on_bug(call, done))
        self._calls[call] = task

    async def _attend(self, call: Call) -> None:
        try:
            reply = await self._post(call)
            if reply.status == 200:
                await self._deliver(call, reply)
            else:
                self._refused(call, unpack_error(reply.status, reply.body))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self._workers.lost(call.worker)
            for request, part in call.parts:  # nothing was started, so nothing is used up
                self._line.put_back(request, part)
        except (aiohttp.ClientError, TimeoutError):
            self._workers.lost(call.worker)
            self._try_again(call, Unavailable("the inference process was lost twice", code="worker_lost"))
        except Malformed:
            self._try_again(call, Unavailable("the inference process cannot be understood", code="bad_answer"))
        finally:
            del self._calls[call]
            call.worker.leave()
            self._pump()

    async def _post(self, call: Call) -> Reply:
        size = sum(array.nbytes for request, _ in call.parts for array in request.arrays.values())
        size += sum(request.costs[at] << 10 for request, part in call.parts for at in range(*part))
        body = await asyncio.to_thread(write, call.parts) if size > OFF_LOOP_BYTES else write(call.parts)
        remaining_s = max(0.0, max(request.deadline for request, _ in call.parts) - time.monotonic())
        headers = {"x-deadline-ms": f"{1000 * remaining_s:.0f}"}
        timeout = aiohttp.ClientTimeout(total=remaining_s + LAST_WORD_S, sock_connect=CONNECT_S)
        async with call.worker.client.post("/call", data=body, headers=headers, timeout=timeout) as response:
            queue_ms, inference_ms = (float(response.headers.get(f"x-{name}-ms", 0)) for name in ("queue", "inference"))
            return Reply(response.status, await response.read(), queue_ms, inference_ms)

    async def _deliver(self, call: Call, reply: Reply) -> None:
        body = reply.body
        document, arrays = await asyncio.to_thread(unpack, body) if len(body) > OFF_LOOP_BYTES else unpack(body)
        num_items = sum(end - begin for _, (begin, end) in call.parts)
        is_embed = bool(call.parts[0][0].items)
        if is_embed and ("vectors" not in arrays or len(arrays["vectors"]) != num_items):
            raise Malformed("an answer without its vectors")
        offset = 0
        for request, part in call.parts:
            request.queue_ms = max(request.queue_ms, 1000 * (call.sent_at - request.queued_at) + reply.queue_ms)
            request.inference_ms += reply.inference_ms
            size = part[1] - part[0]
            request.take(part, document, {"vectors": arrays["vectors"][offset : offset + size]} if is_embed else arrays)
            offset += size

    def _refused(self, call: Call, error: IsthmusError) -> None:
        if isinstance(error, Unauthenticated):  # a matter between us and the worker, not of the caller's key
            error = Unavailable("the worker does not accept ISTHMUS_WORKER_TOKEN", code="worker_token")
        if isinstance(error, Unavailable) and error.code != "deadline":
            self._try_again(call, error)
        elif len(call.parts) > 1:
            for request, part in call.parts:  # one of them is to blame: apart, it harms nobody else
                request.is_alone = True
                self._line.put_back(request, part)
        else:
            ((request, (begin, _)),) = call.parts
            if error.item is not None:
                error.item += begin
            request.fail(error)

    def _try_again(self, call: Call, error: Unavailable) -> None:
        """Send parts once more, on another worker if there is one; fail what has been sent once more already."""
        for request, part in call.parts:
            # Two calls of a request that are lost at the same time are one loss.
            if request.avoid and call.sent_at >= request.lost_at:
                request.fail(error)
                continue
            request.avoid.add(call.worker.id)
            request.lost_at = time.monotonic()
            request.is_alone = True
            self._line.put_back(request, part)


def _fail_on_bug(call: Call, task: asyncio.Task[None]) -> None:
    """End the requests of a call that met an error nobody foresaw: they must not wait for their deadline."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a call to an inference process failed", exc_info=error)
        for request, _ in call.parts:
            request.fail(IsthmusError("the gateway failed", code="gateway_failed"))


def _timings(request: Request) -> Timings:
    return Timings(request.queue_ms, request.inference_ms)
