"""The gateway against real inference processes, found through a real database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from service.contract.artifacts import Store
from service.contract.dialects import now, open_engine
from service.contract.errors import Invalid, NotFound, TooMany, Unavailable
from service.contract.host import boot_id
from service.contract.settings import Settings
from service.contract.tables import worker
from service.contract.wire import ComposeCall, ModelRef
from service.inference.gateway import Gateway

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def other(models: Store, publish_model: Callable[..., ModelRef]) -> ModelRef:
    return publish_model(models, "models/model_b/1", seed=2)


@pytest.fixture(scope="module")
def inference(folder: Path, run_inference: Any) -> Iterator[Any]:
    with run_inference(folder / "store", f"unix:{folder / 'socket'}") as running:
        yield running


@pytest.fixture
def rows(tmp_path: Path, sqlite_template: Path) -> Iterator[sa.Engine]:
    """A database without workers."""
    path = tmp_path / "isthmus.db"
    shutil.copy(sqlite_template, path)
    engine = open_engine(f"sqlite:///{path}")
    yield engine
    engine.dispose()


def add_worker(engine: sa.Engine, endpoint: str | None, name: str = "w1", **values: Any) -> None:
    row = {
        "id": name,
        "lanes": ["serve"],
        "kinds": [],
        "host": "here",
        "boot": boot_id(),
        "pid": 1,
        "endpoint": endpoint,
        "version": "0",
    }
    with engine.begin() as connection:
        connection.execute(sa.insert(worker).values(row | {"last_seen": now()} | values))


@contextlib.asynccontextmanager
async def opened(engine: sa.Engine, **settings: Any) -> AsyncGenerator[Gateway]:
    # The rows are written once, so they must outlive the test.
    gateway = Gateway(Settings.model_validate({"worker_ttl_s": 600.0} | settings), engine)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


@pytest.fixture
async def gateway(rows: sa.Engine, inference: Any) -> AsyncGenerator[Gateway]:
    add_worker(rows, inference.endpoint)
    async with opened(rows) as gateway:
        yield gateway


def texts(draw_tokens: Any, num: int, seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[draw_tokens(rng, "text")] for _ in range(num)]


async def test_vectors_come_back_in_order_with_their_timings(
    gateway: Gateway, model: ModelRef, draw_tokens: Any
) -> None:
    items = texts(draw_tokens, 20)
    vectors, timings = await gateway.embed(model, "text", items)
    assert vectors.shape == (20, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert timings.inference_ms > 0
    one_by_one = [(await gateway.embed(model, "text", [item]))[0][0] for item in items[:5]]
    np.testing.assert_allclose(vectors[:5], one_by_one, atol=1e-5)
    assert gateway.ready()


async def test_requests_that_come_together_share_calls(gateway: Gateway, model: ModelRef, draw_tokens: Any) -> None:
    items = texts(draw_tokens, 64)
    expected, _ = await gateway.embed(model, "text", items)
    before = gateway.num_calls
    answers = await asyncio.gather(*(gateway.embed(model, "text", [item]) for item in items))
    np.testing.assert_allclose(np.concatenate([vectors for vectors, _ in answers]), expected, atol=1e-5)
    assert gateway.num_calls - before < 16


async def test_models_and_modalities_never_share_a_call(
    gateway: Gateway, model: ModelRef, other: ModelRef, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(0)
    asked = [(ref, each) for ref in (model, other) for each in ("text", "image", "state", "code")] * 6
    items = [[draw_tokens(rng, modality)] for _, modality in asked]
    answers = await asyncio.gather(
        *(gateway.embed(ref, modality, [item]) for (ref, modality), item in zip(asked, items, strict=True))
    )
    for (ref, modality), item, (vectors, _) in zip(asked, items, answers, strict=True):
        np.testing.assert_allclose(vectors, (await gateway.embed(ref, modality, [item]))[0], atol=1e-5)


async def test_a_request_larger_than_a_call_is_cut_and_put_together_again(
    gateway: Gateway, model: ModelRef, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(1)
    items = [[draw_tokens(rng, "code")] for _ in range(1500)]  # about 48,000 tokens
    before = gateway.num_calls
    vectors, _ = await gateway.embed(model, "code", items)
    assert gateway.num_calls - before >= 3
    for at in (0, 700, 1499):
        np.testing.assert_allclose(vectors[at], (await gateway.embed(model, "code", [items[at]]))[0][0], atol=1e-5)


async def test_one_text_does_not_wait_for_a_caller_with_thousands(
    gateway: Gateway, model: ModelRef, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(2)
    items = [[draw_tokens(rng, "code")] for _ in range(4000)]
    async with asyncio.TaskGroup() as group:
        many = group.create_task(gateway.embed(model, "code", items))
        await asyncio.sleep(0)
        await gateway.embed(model, "code", items[:1])
        assert not many.done()


async def test_a_bad_item_fails_its_own_request_and_no_other(
    gateway: Gateway, model: ModelRef, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(3)
    good = [[draw_tokens(rng, "code")] for _ in range(3)]
    bad = [*good[:2], [np.array([1, 50], np.int32)]]  # 50 is one past the alphabet
    answers = await asyncio.gather(
        *(gateway.embed(model, "code", bad if at % 8 == 3 else good) for at in range(32)), return_exceptions=True
    )
    for at, answer in enumerate(answers):
        if at % 8 == 3:
            assert isinstance(answer, Invalid)
            assert answer.item == 2
        else:
            assert not isinstance(answer, BaseException), answer


async def test_an_unknown_model_is_not_found(gateway: Gateway, draw_tokens: Any) -> None:
    with pytest.raises(NotFound):
        await gateway.embed(ModelRef(artifact="models/none/1", digest="0" * 64), "text", texts(draw_tokens, 1))


async def test_what_was_composed_comes_back(gateway: Gateway, model: ModelRef, draw_tokens: Any) -> None:
    rng = np.random.default_rng(4)
    source, _ = await gateway.embed(model, "image", [[draw_tokens(rng, "image")] for _ in range(3)])
    target, _ = await gateway.embed(model, "state", [[draw_tokens(rng, "state")] for _ in range(5)])
    leg = {"model": model.model_dump()}
    call = ComposeCall.model_validate(
        {
            "legs": [leg | {"from": "image", "to": "text"}, leg | {"from": "text", "to": "state"}],
            "method": "marginal",
            "bank": True,
            "top_k": 2,
        }
    )
    document, arrays, timings = await gateway.compose(call, {"source": source, "target": target})
    assert arrays["index"].shape == arrays["log_ratio"].shape == (3, 2)
    assert document["bridge_size"] == 96
    assert timings.inference_ms > 0


async def test_without_a_worker_the_answer_says_what_is_missing(
    rows: sa.Engine, model: ModelRef, draw_tokens: Any
) -> None:
    async with opened(rows) as gateway:
        assert not gateway.ready()
        with pytest.raises(Unavailable, match="no worker serves") as caught:
            await gateway.embed(model, "text", texts(draw_tokens, 1))
        assert caught.value.retry_after_s >= 1


async def test_a_worker_that_appears_is_found(
    rows: sa.Engine, inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    async with opened(rows) as gateway:
        add_worker(rows, inference.endpoint)
        for _ in range(100):
            if gateway.ready():
                break
            await asyncio.sleep(0.05)
        await gateway.embed(model, "text", texts(draw_tokens, 1))


async def test_a_request_for_a_worker_that_does_not_answer_ends_at_its_deadline(
    rows: sa.Engine, tmp_path: Path, model: ModelRef, draw_tokens: Any
) -> None:
    add_worker(rows, f"unix:{tmp_path / 'nobody'}")
    async with opened(rows, request_timeout_s=0.3) as gateway:
        with pytest.raises(Unavailable, match=r"not served within 0\.3 s"):
            await gateway.embed(model, "text", texts(draw_tokens, 1))


async def test_too_many_waiting_items_are_refused_and_the_rest_is_served(
    rows: sa.Engine, inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    add_worker(rows, inference.endpoint)
    async with opened(rows, max_waiting=10) as gateway:
        answers = await asyncio.gather(
            *(gateway.embed(model, "text", texts(draw_tokens, 4)) for _ in range(5)), return_exceptions=True
        )
        assert [isinstance(answer, TooMany) for answer in answers] == [False, False, True, True, True]
        await gateway.embed(model, "text", texts(draw_tokens, 4))


async def test_a_caller_that_gives_up_leaves_nothing_behind(
    rows: sa.Engine, inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    add_worker(rows, inference.endpoint)
    rng = np.random.default_rng(5)
    async with opened(rows, max_waiting=6000) as gateway:
        items = [[draw_tokens(rng, "code")] for _ in range(6000)]
        async with asyncio.TaskGroup() as group:
            many = group.create_task(gateway.embed(model, "code", items))
            await asyncio.sleep(0.05)
            with pytest.raises(TooMany):
                await gateway.embed(model, "code", items[:10])
            many.cancel()
        assert many.cancelled()
        await gateway.embed(model, "code", items)  # the line is free again


async def test_a_worker_killed_mid_request_costs_a_retry_on_another(
    rows: sa.Engine, folder: Path, inference: Any, run_inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    items = texts(draw_tokens, 4)
    with run_inference(folder / "store", f"unix:{folder / 'second'}") as second:
        add_worker(rows, inference.endpoint, "w1")
        add_worker(rows, second.endpoint, "w2")
        async with opened(rows, request_timeout_s=20) as gateway:
            expected, _ = await gateway.embed(model, "text", items)
            os.kill(second.process.pid, signal.SIGSTOP)  # whatever reaches it now hangs in mid-request
            asked = [asyncio.create_task(gateway.embed(ref, "text", items)) for ref in _refs(model, 8)]
            asked += [asyncio.create_task(gateway.embed(model, "text", items)) for _ in range(8)]
            await asyncio.sleep(0.3)
            second.kill()
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for answer in answers[8:]:
                assert not isinstance(answer, BaseException), answer
                np.testing.assert_allclose(answer[0], expected, atol=1e-5)
            assert all(isinstance(answer, NotFound) for answer in answers[:8]), answers[:8]


def _refs(model: ModelRef, num: int) -> list[ModelRef]:
    # Models that do not exist, so that their names hash to either worker.
    return [ModelRef(artifact=f"models/none{at}/1", digest=model.digest) for at in range(num)]


async def test_a_worker_killed_and_started_again_serves_what_waited(
    rows: sa.Engine, folder: Path, run_inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    endpoint = f"unix:{folder / 'third'}"
    items = texts(draw_tokens, 4)
    add_worker(rows, endpoint)
    async with contextlib.AsyncExitStack() as stack:
        first = stack.enter_context(run_inference(folder / "store", endpoint))
        gateway = await stack.enter_async_context(opened(rows, request_timeout_s=50))
        expected, _ = await gateway.embed(model, "text", items)
        os.kill(first.process.pid, signal.SIGSTOP)
        asked = [asyncio.create_task(gateway.embed(model, "text", items)) for _ in range(8)]
        await asyncio.sleep(0.2)
        first.kill()
        again = run_inference(folder / "store", endpoint)
        await asyncio.to_thread(again.__enter__)
        stack.push(again.__exit__)
        for answer in await asyncio.gather(*asked):
            np.testing.assert_allclose(answer[0], expected, atol=1e-5)


async def test_a_silent_database_does_not_stop_inference(
    gateway: Gateway, rows: sa.Engine, model: ModelRef, draw_tokens: Any
) -> None:
    with rows.begin() as connection:
        connection.execute(sa.text("DROP TABLE worker"))
    await asyncio.sleep(1.5)  # the list was read again meanwhile, and could not be
    await gateway.embed(model, "text", texts(draw_tokens, 1))


async def test_over_tcp_the_token_is_sent_and_a_wrong_one_is_no_fault_of_the_caller(
    rows: sa.Engine, folder: Path, run_inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ("--token-env", "SOME_TOKEN")
    environment = {"SOME_TOKEN": "correct horse"}
    with run_inference(folder / "store", f"127.0.0.1:{port}", *arguments, environment=environment):
        # Reached over TCP, so it may be on another host.
        add_worker(rows, f"http://127.0.0.1:{port}", boot="another")
        async with opened(rows, worker_token="correct horse") as gateway:
            await gateway.embed(model, "text", texts(draw_tokens, 1))
        async with opened(rows, worker_token="wrong") as gateway:
            with pytest.raises(Unavailable, match="ISTHMUS_WORKER_TOKEN"):
                await gateway.embed(model, "text", texts(draw_tokens, 1))


async def test_a_row_with_a_broken_endpoint_hides_no_other_worker(
    rows: sa.Engine, inference: Any, model: ModelRef, draw_tokens: Any
) -> None:
    for at, endpoint in enumerate(["http://[", "gopher://x", "unix:", "http://127.0.0.1:1"]):
        add_worker(rows, endpoint, f"broken{at}")
    add_worker(rows, inference.endpoint)
    async with opened(rows) as gateway:
        await gateway.embed(model, "text", texts(draw_tokens, 1))
