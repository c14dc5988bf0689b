"""Where this process is: read from the environment once, at the start, and passed down. Never a module global."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of every process, each from `ISTHMUS_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="ISTHMUS_", frozen=True, extra="ignore")

    data: Annotated[Path, Field(description="folder for the database, the store and sockets")] = Path("isthmus-data")
    database_url: Annotated[str | None, Field(description="SQLAlchemy URL; default: SQLite in the data folder")] = None
    store_url: Annotated[
        str | None, Field(description="fsspec URL of the store; default: a folder in the data folder")
    ] = None

    import_folders: Annotated[
        str | None,
        Field(
            description="folders of the worker's machine that models may be imported from, separated by ':'; default: "
            "`imports` in the data folder; alike for API and workers"
        ),
    ] = None

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    insecure: Annotated[bool, Field(description="serve without keys on a bind that is not loopback")] = False
    api_key: Annotated[
        SecretStr | None,
        Field(description="a key with every scope that exists from the first start on: isk_ and 32 hex digits"),
    ] = None
    docs: Annotated[bool, Field(description="serve /docs and /openapi.json")] = True

    lanes: Annotated[str, Field(description="what this worker does: of train, bulk, serve")] = "train,bulk,serve"
    worker_listen: Annotated[
        str | None, Field(description="host:port for inference from other hosts; default: a unix socket")
    ] = None
    worker_advertise: Annotated[
        str | None, Field(description="URL under which the API reaches worker_listen; default: by this host's name")
    ] = None
    worker_token: Annotated[SecretStr | None, Field(description="shared secret of API and workers over TCP")] = None

    tick_s: Annotated[float, Field(gt=0, description="supervisor: claim, promote, look at cancel flags")] = 1.0
    heartbeat_s: Annotated[float, Field(gt=0)] = 5.0
    worker_ttl_s: Annotated[float, Field(gt=0, description="a worker silent for this long is dead")] = 20.0
    cancel_grace_s: Annotated[float, Field(ge=0, description="a runner that ignores a cancel this long is killed")] = (
        10.0
    )
    shutdown_grace_s: Annotated[float, Field(ge=0, description="time to checkpoint on SIGTERM")] = 20.0
    job_retention_days: Annotated[
        float,
        Field(
            ge=0,
            description="finished jobs go after this long, with events, metrics, reports and checkpoints; 0: never. "
            "Models, data sets and embedding sets stay",
        ),
    ] = 90.0
    preload: Annotated[
        bool, Field(description="keep one idle runner per lane, torch imported: 1.4 s against 186 MB")
    ] = True
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:N")] = "auto"
    serve_memory_fraction: Annotated[float, Field(gt=0, le=1, description="GPU share of inference beside a runner")] = (
        0.2
    )
    model_cache_bytes: Annotated[int, Field(ge=0, description="weights kept in memory by the inference process")] = (
        4 << 30
    )
    metrics_listen: Annotated[
        str | None, Field(description="worker: host:port of its own metrics for Prometheus; default: not served")
    ] = None
    serve_batch_tokens: Annotated[int, Field(ge=256, description="padded tokens in one batch of inference")] = 16_384

    max_body_bytes: Annotated[int, Field(ge=1024, description="JSON bodies")] = 64 << 20
    max_upload_bytes: Annotated[int, Field(ge=1024, description="data set uploads")] = 64 << 30
    max_items: Annotated[int, Field(ge=1, description="items in one request")] = 2048
    max_tokens: Annotated[int, Field(ge=1, description="tokens in one request")] = 1 << 20
    max_pixels: Annotated[int, Field(ge=1, description="pixels of one image")] = 40_000_000
    max_audio_s: Annotated[float, Field(gt=0, description="seconds of one sound")] = 600.0
    body_timeout_s: Annotated[float, Field(gt=0, description="longest silence within the body of a request")] = 30.0
    request_timeout_s: Annotated[float, Field(gt=0, description="longest wait for inference")] = 60.0
    max_waiting: Annotated[int, Field(ge=1, description="items waiting for inference per API process; more is 429")] = (
        8192
    )

    def resolved_database_url(self) -> str:
        """Return the database URL, with the driver that we ship for PostgreSQL."""
        url = self.database_url or f"sqlite:///{self.data.resolve() / 'isthmus.db'}"
        for plain in ("postgres://", "postgresql://"):
            if url.startswith(plain):
                return "postgresql+psycopg://" + url[len(plain) :]
        return url

    def resolved_store_url(self) -> str:
        """Return the store's URL."""
        return self.store_url or str(self.data.resolve() / "store")

    def resolved_import_folders(self) -> tuple[Path, ...]:
        """Return the folders that models may be imported from."""
        if self.import_folders is None:
            return (self.data.resolve() / "imports",)
        return tuple(Path(part).resolve() for part in self.import_folders.split(os.pathsep) if part)

    def lane_set(self) -> frozenset[str]:
        """Return the lanes of this worker.

        Raises ValueError for an unknown lane.
        """
        lanes = frozenset(part.strip() for part in self.lanes.split(",") if part.strip())
        if unknown := lanes - {"train", "bulk", "serve"}:
            msg = f"ISTHMUS_LANES: unknown lane {', '.join(sorted(unknown))} (of train, bulk, serve)"
            raise ValueError(msg)
        return lanes
