"""Examples for the description of the API: one story, from a data set to an answer, each held to its own model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from service.contract.diagnostics import ModelComposition, ModelCompositionList
from service.contract.items import AudioItem, ImageItem, SumItem, SumPart
from service.contract.jobs import IngestArgs, TrainArgs
from service.contract.modality import ImageTokens, TextTokens
from service.contract.operations import (
    Classification,
    ClassifyRequest,
    ClassifyResponse,
    ComposeRequest,
    ComposeResponse,
    Composition,
    Diagnostics,
    Embedding,
    EmbeddingSetRef,
    EmbeddingsRequest,
    EmbeddingsResponse,
    Joint,
    Leg,
    Match,
    Prediction,
    TokenizeRequest,
    TokenizeResponse,
    Tokens,
    Usage,
)
from service.contract.recipe import Pair, Recipe
from service.contract.settings import Settings
from service.contract.towers import Tower
from service.contract.word import Word
from service.keys import CreateKey
from service.resources import (
    Checkpoint,
    CheckpointList,
    CreatedKey,
    Dataset,
    DatasetCreated,
    DatasetList,
    Deleted,
    EmbeddingSet,
    EmbeddingSetList,
    File,
    FileList,
    Job,
    JobEvent,
    JobEventList,
    JobList,
    Key,
    KeyList,
    Metrics,
    Model,
    ModelList,
    Progress,
    Sample,
    SampleList,
    Series,
)
from service.routes.health import Health, Readiness
from service.routes.limits import limits_of
from service.routes.models import UpdateModel

_AT: Final = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_LATER: Final = datetime(2026, 1, 2, 3, 9, 30, tzinfo=UTC)
_DATASET: Final = "ds_jh44zhj0cnjrv5ezq70b9ge77v"
_INGEST: Final = "job_4s7tcj702b2x1bxqtweytynrcz"
_TRAIN: Final = "job_7m1dq0x8h3w5n6v2k9rcz4b0ta"
_EMBED: Final = "job_2f8y5p3e1gs7j0w4m6xnq9vctd"
_MODEL: Final = "model_0fz2x7sj554cgxnmp24kfjy6rc"
_SET: Final = "emb_9xk37btzkjwdqx96cqvh2y5g0a"
_KEY: Final = "key_bp7m7t20c1dzg8ggz2hqrv35bt"
_SHA256: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_PNG: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEklEQVR42mNg"
    "gALG/wxogCQRAIxMBAFVvcDIAAAAAElFTkSuQmCC"
)
_WAV: Final = "data:audio/wav;base64,UklGRiwAAABXQVZFZm10IBAAAAABAAEAgD4AAAB9AAACABAAZGF0YQgAAAAAAABAAMAAAA=="
_USAGE: Final = Usage(prompt_tokens=20, total_tokens=20)

_recipe = Recipe(
    towers={
        "image": Tower(tokens=ImageTokens(size=28, patch=7, channels=1)),
        "text": Tower(tokens=TextTokens(max_length=32)),
    },
    pairs=[Pair(dataset=_DATASET, modalities=("image", "text"))],
)
_dataset = Dataset(
    id=_DATASET,
    name="captions",
    status="ready",
    created_at=_AT,
    job_id=_INGEST,
    num_samples=1442,
    num_rejected=0,
    rejects=[],
    modalities={"image": "image", "text": "text"},
    splits={"train": 1297, "holdout": 145},
    labels=["one", "two"],
    statistics={"text": {"mean_characters": 17.5}},
    digest=_SHA256,
    num_bytes=1_048_576,
)


def _job(job_id: str, args: IngestArgs | TrainArgs, **changes: Any) -> Job:
    about: dict[str, Any] = {
        "id": job_id,
        "kind": args.kind,
        "status": "queued",
        "name": "digits",
        "created_at": _AT,
        "run_at": _AT,
        "started_at": None,
        "finished_at": None,
        "attempt": 0,
        "max_attempts": 3,
        "priority": 5,
        "progress": None,
        "error": None,
        "result": None,
        "args": args.model_dump(mode="json"),
        "metadata": None,
    }
    return Job.model_validate(about | changes)


_ingest = _job(
    _INGEST, IngestArgs(dataset=_DATASET, source="s3://bucket/captions.tar"), name="captions", max_attempts=5
)
_train = _job(_TRAIN, TrainArgs(recipe=_recipe, name="digits"))
_running = Progress(done=300, total=600, unit="steps", eta_s=12.5)
_training = _train.model_copy(update={"status": "running", "started_at": _AT, "attempt": 1, "progress": _running})
_cancelled = _train.model_copy(update={"status": "cancelled", "finished_at": _LATER})
_model = Model(
    id=_MODEL,
    created=int(_LATER.timestamp()),
    owned_by="default",
    aliases=["digits"],
    modalities=["image", "text"],
    pairs=[["image", "text"]],
    dimensions=64,
    critic="cosine",
    logit_scales={"image+text": 15.1},
    logit_biases={},
    metrics={"loss": 0.42},
    state="ready",
    job_id=_TRAIN,
    digest=_SHA256,
    num_bytes=1_048_576,
    limits=None,
    tokenisers=None,
)
_described = _model.model_copy(
    update={
        "limits": {name: tower.tokens.max_length for name, tower in _recipe.towers.items()},
        "tokenisers": {name: tower.tokens for name, tower in _recipe.towers.items()},
    }
)
_set = EmbeddingSet(
    id=_SET,
    created_at=_LATER,
    job_id=_EMBED,
    model=_MODEL,
    model_digest=_SHA256,
    dataset=_DATASET,
    split="holdout",
    modality="image",
    num_vectors=145,
    dimensions=64,
    num_bytes=37_120,
)
_key = Key(
    id=_KEY,
    name="notebook",
    scopes=["infer", "read"],
    requests_per_minute=600,
    created_at=_AT,
    expires_at=None,
    revoked_at=None,
    last_used_at=None,
)
_leg = {"scale": 17.2, "end_offset_deviation": 0.41, "bridge_offset_deviation": 0.38, "verdict": "doubtful"}
_why = "the bridge carries the sum (effective sample size 118)"
_composition = ModelComposition.model_validate(
    {
        "from": "audio",
        "to": "image",
        "through": "text",
        "critic": "cosine",
        "method": "marginal",
        "reason": _why,
        "diagnostics": {
            "bridge_size": 7680,
            "method": "marginal",
            "reason": _why,
            "first": _leg | {"end": "audio"},
            "second": _leg | {"end": "image"},
            "sphere": {
                "num_items": 4096,
                "dimensions": 64,
                "resultant": 0.12,
                "largest_axis": 3.1,
                "rayleigh": 3775.0,
                "rayleigh_p": 0.0,
                "bingham": 41_000.0,
                "bingham_p": 0.0,
                "projection_distance": 0.21,
                "projection_p": 0.0,
                "log_potential": -3.61,
                "log_potential_if_even": -3.88,
                "verdict": "doubtful",
            },
            "normal": None,
            "sum": {
                "num_sources": 64,
                "num_targets": 256,
                "effective_sample_size": 118.0,
                "sample_size_verdict": "passes",
                "rank_correlation": 0.93,
                "best_agreement": 0.72,
                "agreement_verdict": "doubtful",
            },
        },
    }
)


def _files(*paths: str) -> FileList:
    return FileList(data=[File(id=path, num_bytes=1024, sha256=_SHA256) for path in paths], has_more=False)


REQUESTS: Final[dict[str, Word | dict[str, Word]]] = {
    "create_key": CreateKey(name="notebook", scopes=["read", "infer"], requests_per_minute=600),
    "update_model": UpdateModel(aliases=["digits", "production"]),
    "create_embeddings": EmbeddingsRequest(model="digits", input=["a handwritten seven", ImageItem(image=_PNG)]),
    "tokenize": TokenizeRequest(model="digits", input=["a handwritten seven"]),
    "classify": ClassifyRequest(
        model="digits", input=[ImageItem(image=_PNG)], labels=["six", "seven"], templates=["a handwritten {}"]
    ),
    "compose": {
        "a sound, and the pictures of an embedding set": ComposeRequest(
            model="digits", source=[AudioItem(audio=_WAV)], target=EmbeddingSetRef(embeddings=_SET), top_k=1
        ),
        "a weighted sum of a sound and a caption": ComposeRequest(
            model="digits",
            source=[
                SumItem(
                    sum=[
                        SumPart(item=AudioItem(audio=_WAV), weight=0.7),
                        SumPart(item="a handwritten seven", weight=0.3),
                    ],
                    modality="audio",
                )
            ],
            target=EmbeddingSetRef(embeddings=_SET),
            top_k=1,
        ),
        "two models that were trained apart, over captions of which some are rare": ComposeRequest(
            legs=[
                Leg.model_validate({"model": "sounds", "from": "audio", "to": "text"}),
                Leg.model_validate({"model": "pictures", "from": "text", "to": "image"}),
            ],
            source=[AudioItem(audio=_WAV)],
            target=[ImageItem(image=_PNG)],
            through=["a seven", "a six", "a spoken digit"],
            bridge_weights=[5, 3, 1],
            prior=[1],
        ),
        "a chain of three legs, with a bridge for each joint": ComposeRequest(
            legs=[
                Leg.model_validate({"model": "sounds", "from": "audio", "to": "text"}),
                Leg.model_validate({"model": "pictures", "from": "text", "to": "image"}),
                Leg.model_validate({"model": "depths", "from": "image", "to": "depth"}),
            ],
            source=[AudioItem(audio=_WAV)],
            target=EmbeddingSetRef(embeddings=_SET),
            through=[Joint(through=["a seven", "a six"], weights=[5, 3]), Joint(through=None)],
        ),
    },
}
"""By operation, one or several by name; those of jobs and data sets stand with their routes."""

RESPONSES: Final[dict[str, Word]] = {
    "get_health": Health(),
    "get_readiness": Readiness(status="degraded", missing=["worker for train jobs"]),
    "get_limits": limits_of(Settings.model_construct()),
    "create_key": CreatedKey(key=_key, secret="isk_" + "0123456789abcdef" * 2),
    "list_keys": KeyList(data=[_key], has_more=False),
    "revoke_key": Deleted(id=_KEY, object="key"),
    "create_job": _train,
    "list_jobs": JobList(data=[_training], has_more=False),
    "get_job": _training,
    "cancel_job": _cancelled,
    "retry_job": _train,
    "list_job_events": JobEventList(data=[JobEvent(id="17", created_at=_AT, type="queued", detail={})], has_more=False),
    "get_job_metrics": Metrics(series={"loss/image+text": Series(steps=[5, 10], values=[4.85, 4.1])}),
    "list_checkpoints": CheckpointList(
        data=[Checkpoint(id=f"{_TRAIN}@300", step=300, created_at=_AT, metrics={"loss": 0.61})], has_more=False
    ),
    "list_job_files": _files("model.safetensors", "recipe.json"),
    "list_models": ModelList(data=[_model], has_more=False),
    "get_model": _described,
    "examine_composition": ModelCompositionList(data=[_composition]),
    "update_model": _model.model_copy(update={"aliases": ["digits", "production"]}),
    "delete_model": Deleted(id=_MODEL, object="model"),
    "list_model_files": _files("bank.safetensors", "model.safetensors", "recipe.json", "tokenizers/text.json"),
    "list_embedding_sets": EmbeddingSetList(data=[_set], has_more=False),
    "get_embedding_set": _set,
    "delete_embedding_set": Deleted(id=_SET, object="embedding_set"),
    "list_embedding_set_files": _files("vectors.npy", "vectors.parquet"),
    "create_dataset": DatasetCreated(
        **_dataset.model_copy(
            update={"status": "ingesting", "digest": None}
            | dict.fromkeys(("num_samples", "num_rejected", "rejects", "modalities", "splits", "labels"))
            | dict.fromkeys(("statistics", "num_bytes"))
        ).model_dump(),
        job=_ingest,
    ),
    "list_datasets": DatasetList(data=[_dataset], has_more=False),
    "get_dataset": _dataset,
    "delete_dataset": Deleted(id=_DATASET, object="dataset"),
    "list_samples": SampleList(
        data=[
            Sample(
                index=0,
                key="scan0000",
                label="seven",
                split="train",
                items={"image": _PNG, "text": "a handwritten seven"},
            )
        ],
        has_more=True,
    ),
    "tokenize": TokenizeResponse(
        data=[Tokens(index=0, modality="text", tokens=[[1, 101, 36, 108, 2]], num_tokens=5)], model="digits"
    ),
    "create_embeddings": EmbeddingsResponse(
        data=[
            Embedding(index=0, embedding=[0.6, 0.8], modality="text"),
            Embedding(index=1, embedding=[0.8, -0.6], modality="image"),
        ],
        model="digits",
        usage=_USAGE,
    ),
    "classify": ClassifyResponse(
        data=[
            Classification(
                index=0,
                prediction="seven",
                score=0.97,
                predictions=[
                    Prediction(label="seven", score=0.97, logit=11.2),
                    Prediction(label="six", score=0.03, logit=7.7),
                ],
            )
        ],
        model="digits",
        usage=_USAGE,
    ),
    "compose": ComposeResponse(
        data=[
            Composition(
                index=0,
                matches=[Match(index=41, key=None, score=4.4, log_ratio=4.4, standard_error=0.05, posterior=0.55)],
                diagnostics=Diagnostics(
                    method="marginal",
                    reason="audio and image were never trained together; both were trained with text",
                    through="text",
                    path=["audio", "text", "image"],
                    bridge_size=2048,
                    effective_sample_size=118.0,
                    standard_error=0.05,
                    bias=-0.001,
                    bridge_resultant=0.12,
                    direct_marginal_spearman=0.93,
                    normalised=True,
                    value_trusted=True,
                    warnings=[],
                ),
            )
        ],
        models=["digits"],
        usage=_USAGE,
    ),
}
"""By operation that answers with JSON."""


def add_examples(paths: dict[str, Any]) -> None:
    """Put the examples into the operations of an OpenAPI document."""
    for operation in (operation for methods in paths.values() for operation in methods.values()):
        name = operation["operationId"]
        if (request := REQUESTS.get(name)) is not None:
            content = operation["requestBody"]["content"]["application/json"]
            if isinstance(request, dict):
                content["examples"] = {about: {"value": _written(each)} for about, each in request.items()}
            else:
                content["example"] = _written(request)
        if name in RESPONSES:
            (answer,) = (answer for status, answer in operation["responses"].items() if status in {"200", "201", "202"})
            answer["content"]["application/json"]["example"] = RESPONSES[name].model_dump(mode="json", by_alias=True)


def _written(request: Word) -> dict[str, Any]:
    return request.model_dump(mode="json", by_alias=True, exclude_unset=True)
