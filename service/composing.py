"""Compose jobs before they are queued: every operand found and held against its model, and the way chosen."""

from __future__ import annotations

from service import embedding_sets
from service.catalogue import Model
from service.contract.errors import RequestError
from service.contract.jobs import SamplesRef
from service.contract.operations import EmbeddingSetRef, Leg
from service.deps import Service
from service.inference.inputs import Timings
from service.inference.legs import check_banks, models_of, way_of
from service.inference.operands import Reader, Tensors
from service.submissions import SubmitCompose


async def settle(service: Service, tenant: str, args: SubmitCompose) -> SubmitCompose | RequestError:
    """Return a job's arguments with the legs and the method that it is to go by, or what is wrong with them.

    The error is returned, since a request that is a twin of an earlier one has that one's answer all the same. Raises
    Unavailable if neither the database nor this process knows the models.
    """
    try:
        return await _settled(service, tenant, args)
    except RequestError as error:
        return error


async def _settled(service: Service, tenant: str, args: SubmitCompose) -> SubmitCompose:
    models = await models_of(service.catalogue, tenant, args)
    begin = await _modality(service, tenant, models[0], args.source, "source")
    end = await _modality(service, tenant, models[-1], args.target, "target")
    way = way_of(args, models, begin, end)
    if way.method != "direct":
        if args.through is None or isinstance(args.through, str):
            if way.method != "analytic":  # a closed form may do without a bridge; the worker says what it needs
                check_banks(way.legs)
        else:
            reader = Reader(service, tenant, Timings(), truncate=False)
            first, second = way.legs
            await reader.add_bridge((first.model, second.model), first.to, args.through, Tensors())
    names = [leg.model for leg in args.legs] if args.legs is not None else [args.model or ""] * len(way.legs)
    legs = [
        Leg.model_validate({"model": name, "from": leg.from_, "to": leg.to})
        for name, leg in zip(names, way.legs, strict=True)
    ]
    return args.model_copy(update={"model": None, "legs": legs, "method": way.method})


async def _modality(service: Service, tenant: str, model: Model, given: EmbeddingSetRef | SamplesRef, name: str) -> str:
    if isinstance(given, SamplesRef):
        model.check_modality(given.modality, param=f"{name}.modality")
        return given.modality
    found = await embedding_sets.find(service, tenant, given.embeddings, param=f"{name}.embeddings")
    embedding_sets.check(found.about, model, None, param=f"{name}.embeddings")
    return found.about.modality
