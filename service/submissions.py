"""What can be submitted as a job, and whether it fits what is there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, assert_never

import sqlalchemy as sa
from pydantic import Field, StrictInt, StringConstraints, TypeAdapter, ValidationError

from service.catalogue import Catalogue
from service.contract.errors import Invalid, NotFound
from service.contract.jobs import (
    ComposeArgs,
    EmbedArgs,
    EvaluateArgs,
    ExperimentArgs,
    ImportModelArgs,
    SamplesRef,
    TrainArgs,
)
from service.contract.modality import medium_of
from service.contract.recipe import Recipe
from service.contract.references import resolve_model
from service.contract.tables import dataset, model, owned
from service.contract.towers import AnyTower, PretrainedTower, Tower, check_start
from service.contract.word import Moment, Name, Word
from service.inherited import Starts, WantedRecipe, filled_in

MetadataKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(strict=True, max_length=512)]


class Submission(Word):
    """What every job may carry beside its arguments."""

    priority: Annotated[StrictInt, Field(ge=0, le=9, description="0 is served first, 9 last")] = 5
    run_at: Annotated[Moment | None, Field(description="not before this time")] = None
    metadata: Annotated[dict[MetadataKey, MetadataValue] | None, Field(description="your own", max_length=16)] = None


class SubmitTrain(TrainArgs, Submission):
    """Train a recipe into a model; `name` becomes the model's alias when it is ready."""

    recipe: WantedRecipe  # pyright: ignore[reportIncompatibleVariableOverride] - frozen


class SubmitEmbed(EmbedArgs, Submission):
    """Embed one modality of a data set into an embedding set."""

    name: Name | None = None


class SubmitEvaluate(EvaluateArgs, Submission):
    """Measure a model on held-out data."""

    name: Name | None = None


class SubmitExperiment(ExperimentArgs, Submission):
    """Check a claim of a paper; the report is among the job's files."""

    name: Name | None = None


class SubmitImportModel(ImportModelArgs, Submission):
    """Import a model that was trained elsewhere; `name` becomes its alias when it is ready."""


class SubmitCompose(ComposeArgs, Submission):
    """Find for every vector of one set the best of another; `matches.parquet` is among the job's files."""

    name: Name | None = None


AnySubmission = SubmitTrain | SubmitEmbed | SubmitEvaluate | SubmitExperiment | SubmitImportModel | SubmitCompose
_tower: TypeAdapter[Tower | PretrainedTower] = TypeAdapter(AnyTower)
AnyArgs = TrainArgs | EmbedArgs | EvaluateArgs | ExperimentArgs | ImportModelArgs | ComposeArgs
EXAMPLES: Final[dict[str, Any]] = {
    "train": {
        "value": {
            "kind": "train",
            "name": "digits",
            "recipe": {
                "towers": {
                    "image": {"tokens": {"kind": "image", "size": 28, "patch": 7, "channels": 1}},
                    "text": {"tokens": {"kind": "text", "max_length": 32}},
                },
                "pairs": [{"dataset": "ds_...", "modalities": ["image", "text"]}],
            },
        }
    },
    "embed": {"value": {"kind": "embed", "model": "digits", "dataset": "ds_...", "modality": "image"}},
    "evaluate": {"value": {"kind": "evaluate", "model": "digits", "datasets": ["ds_..."]}},
    "experiment": {"value": {"kind": "experiment", "experiment": "square-loss"}},
    "import_model": {"value": {"kind": "import_model", "source": "s3://models/all-MiniLM-L6-v2", "name": "minilm"}},
    "compose": {
        "value": {
            "kind": "compose",
            "model": "digits",
            "source": {"embeddings": "emb_..."},
            "target": {"dataset": "ds_...", "modality": "audio"},
            "top_k": 10,
        }
    },
}


def args_of(body: AnySubmission, starts: Starts) -> AnyArgs:
    """Return the arguments alone: what a worker reads and nobody's metadata, with inherited towers written out.

    Raises NotFound or Invalid for a tower that cannot be.
    """
    match body:
        case SubmitTrain():
            return TrainArgs(recipe=filled_in(body.recipe, starts), name=body.name)
        case SubmitEmbed():
            return EmbedArgs.model_validate(body.model_dump(include=set(EmbedArgs.model_fields)))
        case SubmitEvaluate():
            return EvaluateArgs.model_validate(body.model_dump(include=set(EvaluateArgs.model_fields)))
        case SubmitExperiment():
            return ExperimentArgs.model_validate(body.model_dump(include=set(ExperimentArgs.model_fields)))
        case SubmitImportModel():
            return ImportModelArgs.model_validate(body.model_dump(include=set(ImportModelArgs.model_fields)))
        case SubmitCompose():
            return ComposeArgs.model_validate(body.model_dump(include=set(ComposeArgs.model_fields), by_alias=True))
        case _:
            assert_never(body)


async def find_starts(catalogue: Catalogue, tenant: str, body: AnySubmission) -> Starts:
    """Read what the towers of a recipe start from, by the name that the recipe gives; the queue refuses what is not.

    Raises Unavailable if neither the database nor this process knows.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for tower in body.recipe.towers.values() if isinstance(body, SubmitTrain) else ():
        if tower.init_from is not None:
            with suppress(NotFound):
                found[tower.init_from.model] = (await catalogue.find(tenant, tower.init_from.model)).body
    return found


def check_fit(conn: sa.Connection, tenant: str, args: AnyArgs, starts: Starts) -> None:
    """Refuse now what could only fail later.

    That is a data set or model without the modality that is asked of it, or a tower that cannot start from the one it
    names; `starts` holds the manifests' bodies of those.
    """
    match args:
        case TrainArgs():
            _check_recipe(conn, tenant, args.recipe)
            _check_starts(args.recipe, starts)
        case EmbedArgs():
            if "@" not in args.model:
                found = resolve_model(conn, tenant, args.model)
                info = conn.execute(owned(model, tenant).where(model.c.id == found["id"])).one().info
                if args.modality not in info["modalities"]:
                    raise Invalid(f"the model has {', '.join(info['modalities'])}", param="modality")
            _check_samples(conn, tenant, args.dataset, args.modality, param="modality")
        case ComposeArgs():
            for name, side in (("source", args.source), ("target", args.target)):
                if isinstance(side, SamplesRef):
                    _check_samples(conn, tenant, side.dataset, side.modality, param=f"{name}.modality")
        case EvaluateArgs() | ExperimentArgs() | ImportModelArgs():
            pass
        case _:
            assert_never(args)


def _check_samples(conn: sa.Connection, tenant: str, dataset_id: str, modality: str, *, param: str) -> None:
    known = _media(conn, tenant, dataset_id)
    if known is not None and modality not in known:
        raise Invalid(f"the data set has {', '.join(known)}", param=param)


def _check_recipe(conn: sa.Connection, tenant: str, recipe: Recipe) -> None:
    for index, pair in enumerate(recipe.pairs):
        known = _media(conn, tenant, pair.dataset)
        if known is None:
            continue  # enqueue says what is wrong with it
        at = f"recipe.pairs[{index}].modalities"
        for modality in pair.modalities:
            if modality not in known:
                raise Invalid(f"{modality!r} is not in the data set, which has {', '.join(known)}", param=at)
            wanted = medium_of(recipe.towers[modality].tokens)
            if known[modality] != wanted:
                raise Invalid(f"{modality!r} is {known[modality]} in the data set, the tower reads {wanted}", param=at)


def _check_starts(recipe: Recipe, starts: Starts) -> None:
    for name, tower in recipe.towers.items():
        if tower.init_from is None or (body := starts.get(tower.init_from.model)) is None:
            continue
        modality = tower.init_from.modality or name
        towers = body["recipe"]["towers"]
        if modality not in towers:
            at = f"recipe.towers.{name}.init_from.modality"
            raise Invalid(f"the model has no modality {modality!r}; it has {', '.join(sorted(towers))}", param=at)
        try:
            check_start(tower, recipe.dimensions, _tower.validate_python(towers[modality]), body["dimensions"])
        except ValidationError:
            message = "the model was made by another version of this service"
            raise Invalid(message, param=f"recipe.towers.{name}.init_from.model") from None
        except Invalid as error:
            raise error.at(f"recipe.towers.{name}") from None


def _media(conn: sa.Connection, tenant: str, dataset_id: str) -> dict[str, str] | None:
    row = conn.execute(owned(dataset, tenant).where(dataset.c.id == dataset_id)).first()
    return row.info["modalities"] if row is not None and row.info is not None else None
