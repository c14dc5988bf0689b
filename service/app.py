"""The API process: what is opened, what is mounted, what renders errors."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from service.catalogue import Catalogue
from service.contract.artifacts import open_store
from service.contract.dialects import open_engine, risks
from service.contract.errors import IsthmusError, Unavailable
from service.contract.manifest import code_version
from service.contract.settings import Settings
from service.contract.tokens.decode import Limits
from service.database import THREADS, Database
from service.deps import Service
from service.edge.docs import add_docs
from service.edge.middleware import Edge
from service.edge.problems import EVERYWHERE, on_http_exception, on_isthmus_error, on_validation_error
from service.edge.queue_gauges import QueueGauges
from service.edge.telemetry import Telemetry
from service.examples import add_examples
from service.followers import Followers
from service.inference.gateway import Gateway
from service.inference.label_cache import LabelCache
from service.keys import Keys, any_key, check_bind, ensure_key
from service.known_sets import KnownSets
from service.routes import (
    classify,
    compose,
    compositions,
    datasets,
    embedding_sets,
    embeddings,
    health,
    jobs,
    keys,
    limits,
    metrics,
    models,
    tokenize,
)

log = logging.getLogger(__name__)

SMALL_BODY_BYTES: Final = 1 << 20
"""Of requests that carry no data; what a job may say is bounded far below this."""

TAGS: Final = [
    {"name": "datasets", "description": "Pairs of modalities to learn from."},
    {"name": "jobs", "description": "Training, embedding and evaluation, followed as they run."},
    {"name": "models", "description": "What was trained."},
    {"name": "embedding sets", "description": "Vectors of whole data sets."},
    {"name": "inference", "description": "Embed, classify and compose a few items now."},
    {"name": "keys", "description": "Who may do what."},
    {"name": "limits", "description": "How much fits in a request."},
    {"name": "probes", "description": "For whatever watches this process; no key is needed."},
]


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Nothing is opened before it starts."""
    settings = settings or Settings()
    telemetry = Telemetry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        async with _open(settings, telemetry) as service:
            app.state.service = service
            yield

    app = FastAPI(
        title="Isthmus",
        summary="Train contrastive models on pairs of modalities, serve them, and compose modalities never paired.",
        version=code_version(),
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        openapi_tags=TAGS,
        redirect_slashes=False,
    )
    app.add_middleware(Edge, telemetry=telemetry, body_timeout_s=settings.body_timeout_s)
    app.add_exception_handler(IsthmusError, on_isthmus_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.include_router(health.router)
    app.include_router(metrics.router)
    for part in (limits, keys, jobs, models, compositions, embedding_sets):
        app.include_router(part.router, responses=EVERYWHERE, max_body_size=SMALL_BODY_BYTES)
    for part in (tokenize, embeddings, classify, compose):
        app.include_router(part.router, responses=EVERYWHERE, max_body_size=settings.max_body_bytes)
    app.include_router(datasets.router, responses=EVERYWHERE, max_body_size=settings.max_upload_bytes)
    if settings.docs:
        add_docs(app)
    app.openapi = lambda: _openapi(app)
    return app


@asynccontextmanager
async def _open(settings: Settings, telemetry: Telemetry) -> AsyncGenerator[Service]:
    """Open what the process serves from, and close it in the opposite order.

    Raises RuntimeError where others could call without a key.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as opened:
        engine = open_engine(settings.resolved_database_url(), pool_size=THREADS)
        for risk in risks(settings.resolved_database_url()):
            log.warning(risk)
        database = Database(engine)
        opened.push_async_callback(database.close)
        try:
            if settings.api_key is not None:
                key = settings.api_key.get_secret_value()
                await database.write(lambda conn: ensure_key(conn, key))
            check_bind(settings, has_key=await database.read(any_key))
        except Unavailable:
            log.warning("the database does not answer; requests that need it get 503 until it does")
        store = open_store(settings.resolved_store_url(), cache_dir=settings.data / "cache")
        gateway = Gateway(settings, engine)
        await gateway.start()
        opened.push_async_callback(gateway.stop)
        followers = Followers(database)
        opened.push_async_callback(followers.close)
        known_keys = Keys(settings, database)
        opened.push_async_callback(known_keys.close)
        queue_gauges = QueueGauges(database, ttl_s=settings.worker_ttl_s)
        opened.push_async_callback(queue_gauges.close)
        telemetry.registry.register(queue_gauges)
        opened.callback(telemetry.registry.unregister, queue_gauges)
        limits = Limits(max_pixels=settings.max_pixels, max_audio_s=settings.max_audio_s)
        service = Service(
            settings=settings,
            limits=limits,
            database=database,
            store=store,
            gateway=gateway,
            catalogue=Catalogue(database, store, limits),
            sets=KnownSets(database),
            keys=known_keys,
            followers=followers,
            labels=LabelCache(),
            telemetry=telemetry,
            queue_gauges=queue_gauges,
        )
        try:
            yield service
        finally:
            service.draining = True


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Describe the API once, with the bodies that handlers read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        schema["components"]["schemas"] |= json.loads(json.dumps(datasets.SCHEMAS))
        add_examples(schema["paths"])
        app.openapi_schema = schema
    return app.openapi_schema
