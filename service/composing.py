"""Compose jobs before they are queued: every operand found and held against its model, and the way chosen."""

from __future__ import annotations

from service import embedding_sets
from service.catalogue import Model
from service.contract.errors import Invalid, RequestError
from service.contract.jobs import SamplesRef
from service.contract.operations import EmbeddingSetRef, Leg
from service.contract.priors import as_log_prior
from service.deps import Service
from service.inference.inputs import Timings
from service.inference.legs import Way, models_of, way_of
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
    begin, _ = await _end(service, tenant, models[0], args.source, "source")
    end, num_targets = await _end(service, tenant, models[-1], args.target, "target")
    way = way_of(args, models, begin, end)
    await Reader(service, tenant, Timings(), truncate=False).add_bridges(way, Tensors())
    _check_prior(args, way, num_targets)
    names = [leg.model for leg in args.legs] if args.legs is not None else [args.model or ""] * len(way.legs)
    legs = [
        Leg.model_validate({"model": name, "from": leg.from_, "to": leg.to})
        for name, leg in zip(names, way.legs, strict=True)
    ]
    method = "auto" if way.is_open else way.method
    return args.model_copy(update={"model": None, "legs": legs, "method": method})


def _check_prior(args: SubmitCompose, way: Way, num_targets: int | None) -> None:
    if args.prior is None:
        return
    if num_targets is not None and len(args.prior) != num_targets:
        raise Invalid(f"{len(args.prior)} priors for {num_targets} targets", param="prior")
    as_log_prior(args.prior)
    leg = way.legs[0]
    if way.method == "direct" and not (
        len(way.legs) == 1 and leg.model.is_trained(leg.from_, leg.to) and leg.model.gives_ratios(leg.from_, leg.to)
    ):
        message = "a prior weighs ratios, and comparing vectors gives none here: use the method marginal"
        raise Invalid(message, param="prior", code="no_ratio")


async def _end(
    service: Service, tenant: str, model: Model, given: EmbeddingSetRef | SamplesRef, name: str
) -> tuple[str, int | None]:
    """Return the modality of one end, and how many vectors it has, if that is known already."""
    if isinstance(given, SamplesRef):
        model.check_modality(given.modality, param=f"{name}.modality")
        return given.modality, None
    found = await service.sets.find(tenant, given.embeddings, param=f"{name}.embeddings")
    embedding_sets.check(found.about, model, None, param=f"{name}.embeddings")
    return found.about.modality, found.about.num_vectors
