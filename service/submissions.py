"""What can be submitted as a job, and whether it fits what is there."""

from __future__ import annotations

from typing import Annotated, Any, Final, assert_never

import sqlalchemy as sa
from pydantic import Field, StrictInt, StringConstraints

from service.contract.errors import Invalid
from service.contract.jobs import EmbedArgs, EvaluateArgs, TrainArgs
from service.contract.modality import medium_of
from service.contract.recipe import Recipe
from service.contract.references import resolve_model
from service.contract.tables import dataset, model, owned
from service.contract.word import Moment, Name, Word

MetadataKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(strict=True, max_length=512)]


class Submission(Word):
    """What every job may carry beside its arguments."""

    priority: Annotated[StrictInt, Field(ge=0, le=9, description="0 is served first, 9 last")] = 5
    run_at: Annotated[Moment | None, Field(description="not before this time")] = None
    metadata: Annotated[dict[MetadataKey, MetadataValue] | None, Field(description="your own", max_length=16)] = None


class SubmitTrain(TrainArgs, Submission):
    """Train a recipe into a model; `name` becomes the model's alias when it is ready."""


class SubmitEmbed(EmbedArgs, Submission):
    """Embed one modality of a data set into an embedding set."""

    name: Name | None = None


class SubmitEvaluate(EvaluateArgs, Submission):
    """Measure a model on held-out data."""

    name: Name | None = None


AnySubmission = SubmitTrain | SubmitEmbed | SubmitEvaluate
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
}


def args_of(body: AnySubmission) -> TrainArgs | EmbedArgs | EvaluateArgs:
    """Return the arguments alone: what a worker reads and nobody's metadata."""
    match body:
        case SubmitTrain():
            return TrainArgs(recipe=body.recipe, name=body.name)
        case SubmitEmbed():
            return EmbedArgs.model_validate(body.model_dump(include=set(EmbedArgs.model_fields)))
        case SubmitEvaluate():
            return EvaluateArgs.model_validate(body.model_dump(include=set(EvaluateArgs.model_fields)))
        case _:
            assert_never(body)


def check_fit(conn: sa.Connection, tenant: str, args: TrainArgs | EmbedArgs | EvaluateArgs) -> None:
    """Refuse now what could only fail later: a data set or model without the modality that is asked of it."""
    match args:
        case TrainArgs():
            _check_recipe(conn, tenant, args.recipe)
        case EmbedArgs():
            if "@" not in args.model:
                found = resolve_model(conn, tenant, args.model)
                info = conn.execute(owned(model, tenant).where(model.c.id == found["id"])).one().info
                if args.modality not in info["modalities"]:
                    raise Invalid(f"the model has {', '.join(info['modalities'])}", param="modality")
            known = _media(conn, tenant, args.dataset)
            if known is not None and args.modality not in known:
                raise Invalid(f"the data set has {', '.join(known)}", param="modality")
        case EvaluateArgs():
            pass
        case _:
            assert_never(args)


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


def _media(conn: sa.Connection, tenant: str, dataset_id: str) -> dict[str, str] | None:
    row = conn.execute(owned(dataset, tenant).where(dataset.c.id == dataset_id)).first()
    return row.info["modalities"] if row is not None and row.info is not None else None
