"""The online operations: what a request to embed, tokenise, classify or compose says, and what the answer looks like.

Where an existing client could work unchanged its shape is followed exactly: OpenAI for embeddings, Jina for classify.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, cast

from pydantic import ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag

from service.contract.items import Item, Items
from service.contract.word import Id, ModalityName, Real, Word

Modalities = Annotated[list[ModalityName], Field(fail_fast=True)]
MAX_WEIGHTS: Final = 10_000
"""Of a job's prior or bridge: it stays in the row of the job."""

TopK = Annotated[StrictInt, Field(ge=1, le=10_000)]


class EmbeddingsRequest(Word):
    """Items to embed (OpenAI's shape, every kind of item)."""

    model: Id
    input: Items
    modality: Annotated[
        ModalityName | Modalities | None,
        Field(description="what the strings of `input` are (URIs or base64 for media); one for all, or one for each"),
    ] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[
        StrictInt | None, Field(ge=1, description="cut to the first n; unit vectors are normalised again")
    ] = None
    truncate: Annotated[StrictBool, Field(description="cut text that is too long instead of refusing it")] = False
    user: Annotated[StrictStr | None, Field(description="accepted and ignored")] = None


class Embedding(Word):
    """One vector, of unit length if the model's critic is the cosine; or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    modality: str


class Usage(Word):
    """Tokens that the model read: text ids, image patches, sound patches."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Word):
    """The vectors, in the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class TokenizeRequest(Word):
    """Items to tokenise with a model's own tokenisers."""

    model: Id
    input: Items
    modality: ModalityName | Modalities | None = None
    truncate: StrictBool = False


class Tokens(Word):
    """The sequences that the model sees for one item: usually one, several for windowed sound."""

    index: int
    modality: str
    tokens: Annotated[
        list[list[int]] | list[list[list[float]]],
        Field(description="[window][token] ids, or [window][token][value] vectors"),
    ]
    num_tokens: int


class TokenizeResponse(Word):
    """Tokens, in the order of the input; each can be sent back as {"modality", "tokens"}."""

    object: Literal["list"] = "list"
    data: list[Tokens]
    model: str


class ClassifyRequest(Word):
    """Items to classify with labels that the model was never trained on (zero-shot)."""

    model: Id
    input: Items
    modality: ModalityName | Modalities | None = None
    labels: Annotated[
        Annotated[list[StrictStr], Field(fail_fast=True)]
        | dict[StrictStr, Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=1000)]],
        Field(description="labels for the templates, or label -> prompts (any items of the model's)", min_length=1),
    ]
    templates: Annotated[
        list[StrictStr] | None,
        Field(description="each holds {}, which takes the label; null: the bare label", min_length=1),
    ] = None
    ensemble: Annotated[
        Literal["score", "embedding"],
        Field(
            description="score: log mean exp over a label's prompts, the estimator of the theory (Oko et al. 2025); "
            "embedding: mean of the prompts' vectors (CLIP), normalised again if they are unit vectors"
        ),
    ] = "score"
    prior: Annotated[
        dict[StrictStr, Annotated[Real, Field(ge=0)]] | None,
        Field(description="label -> prior probability; missing labels are 0; scaled to sum 1; null: uniform"),
    ] = None
    multi_label: Annotated[
        StrictBool, Field(description="score each label on its own, against the rest of the prompts")
    ] = False
    top_k: TopK | None = None
    truncate: StrictBool = False


class Prediction(Word):
    """A label with its probability and the log-ratio behind it."""

    label: str
    score: float
    logit: float


class Classification(Word):
    """The labels of one item, best first."""

    object: Literal["classification"] = "classification"
    index: int
    prediction: str
    score: float
    predictions: list[Prediction]


class ClassifyResponse(Word):
    """Classifications, in the order of the input."""

    object: Literal["list"] = "list"
    data: list[Classification]
    model: str
    usage: Usage


class Leg(Word):
    """One step of a composition: a model and the trained pair of it that is walked."""

    model_config = ConfigDict(serialize_by_alias=True)  # a job's legs are written to its row, and read from there

    model: Id
    from_: Annotated[ModalityName, Field(alias="from")]
    to: ModalityName


class EmbeddingSetRef(Word):
    """An embedding set made by an embed job."""

    embeddings: Id


BridgeWeights = Annotated[list[Annotated[Real, Field(ge=0)]], Field(fail_fast=True, min_length=1)]


def _bridge_tag(value: Any) -> str | None:
    if isinstance(value, list):
        first = cast("list[Any]", value)[0] if value else None
        if isinstance(first, Joint | SetJoint) or (isinstance(first, dict) and "through" in first):
            return "joints"
        if isinstance(first, EmbeddingSetRef) or (isinstance(first, dict) and "embeddings" in first):
            return "sets"
        return "items"
    if isinstance(value, EmbeddingSetRef) or (isinstance(value, dict) and "embeddings" in value):
        return "set"
    return "modality" if isinstance(value, str) else None


def _one_of(*kinds: str) -> Discriminator:
    """Tell bridges apart by what they look like, so that a bad one gives one error, at its own place."""
    *others, last = kinds
    message = f"a bridge is {', '.join(others)} or {last}"
    return Discriminator(_bridge_tag, custom_error_type="bridge", custom_error_message=message)


_NAMED: Final = ("the name of a modality", '{"embeddings": id}', "a list of these")
_JOINTS: Final = 'a list of {"through": a bridge}, one between each two legs'
_Bridges = (
    Annotated[ModalityName, Tag("modality")]
    | Annotated[EmbeddingSetRef, Tag("set")]
    | Annotated[list[EmbeddingSetRef], Field(min_length=1, max_length=8), Tag("sets")]
)
_Items = Annotated[list[Item], Field(fail_fast=True, min_length=1), Tag("items")]
Through = Annotated[_Bridges | _Items, _one_of(*_NAMED, "a list of items")] | None
SetThrough = Annotated[_Bridges, _one_of(*_NAMED)] | None
"""A bridge that a job can have, which carries ids and no documents."""


class Joint(Word):
    """The bridge between two of several legs."""

    through: Annotated[Through, Field(description="as `through` of a request with two legs; null: the models' banks")]
    weights: Annotated[BridgeWeights | None, Field(description="as `bridge_weights`")] = None


class SetJoint(Word):
    """The bridge between two of several legs of a job."""

    through: Annotated[SetThrough, Field(description="as `through` of a job with two legs; null: the models' banks")]
    weights: Annotated[BridgeWeights | None, Field(description="as `bridge_weights`", max_length=MAX_WEIGHTS)] = None


AnyThrough = (
    Annotated[
        _Bridges | _Items | Annotated[list[Joint], Field(min_length=1, max_length=7), Tag("joints")],
        _one_of(*_NAMED, "a list of items", _JOINTS),
    ]
    | None
)
AnySetThrough = (
    Annotated[
        _Bridges | Annotated[list[SetJoint], Field(min_length=1, max_length=7), Tag("joints")],
        _one_of(*_NAMED, _JOINTS),
    ]
    | None
)


class ComposeRequest(Word):
    """Questions across modalities: each source item against every target, through a bridge or several in turn."""

    source: Items | EmbeddingSetRef
    target: Items | EmbeddingSetRef
    model: Annotated[Id | None, Field(description="one model that holds both legs; or give `legs`")] = None
    legs: Annotated[list[Leg] | None, Field(min_length=1, max_length=8)] = None
    source_modality: Annotated[ModalityName | None, Field(description="what bare strings in `source` are")] = None
    target_modality: Annotated[ModalityName | None, Field(description="what bare strings in `target` are")] = None
    through: Annotated[
        AnyThrough,
        Field(
            description="the bridge: a modality (its bank is used), items, or an embedding set, for legs of two models "
            "one of each model over the same samples; null: the model's bank. For more than two legs a list of joints, "
            "one between each two legs; null: all from banks"
        ),
    ] = None
    bridge_weights: Annotated[
        BridgeWeights | None,
        Field(
            description="for bridge items that were not drawn from p(b) but from another distribution q: p / q of each "
            "item of `through`, but for a factor; null: all alike"
        ),
    ] = None
    method: Annotated[
        Literal["auto", "direct", "marginal", "analytic"],
        Field(
            description="direct: compare the vectors; "
            "marginal: log-sum-exp over bridge samples (Che & Eysenbach 2025, Lemma 1); "
            "analytic: the sum in closed form, for two legs of one space (Lemma 2: the cosine over an even sphere, "
            "Lemma 3: the squared distance over a normal bridge); "
            "auto: direct for a trained pair, otherwise marginal, or direct where few bridge items would carry the sum "
            "and comparing is known to rank as well; `diagnostics.reason` says why"
        ),
    ] = "auto"
    prior: Annotated[
        Annotated[list[Annotated[Real, Field(ge=0)]], Field(fail_fast=True)] | None,
        Field(description="prior weight of each target, scaled to sum 1; null: uniform over the targets"),
    ] = None
    top_k: TopK = 10
    truncate: StrictBool = False


class Match(Word):
    """A target: log p(target | source) - log p(target), where the method states one."""

    index: int
    key: Annotated[str | None, Field(description="the sample's, of a target that is an embedding set; null for items")]
    score: Annotated[float, Field(description="what the ranking went by")]
    log_ratio: float | None
    standard_error: Annotated[float | None, Field(description="of log_ratio, over the draw of the bridge")]
    posterior: Annotated[float | None, Field(description="p(this target | source, one of the targets)")]


class Diagnostics(Word):
    """How far the answer for one source item can be trusted."""

    method: Literal["direct", "marginal", "analytic"]
    reason: str
    through: Annotated[str | None, Field(description="the modality in the middle of two legs")]
    path: Annotated[list[str], Field(description="the modalities in the order in which the legs walk them")]
    bridge_size: Annotated[int | None, Field(description="of several bridges the smallest")]
    effective_sample_size: Annotated[
        float | None, Field(description="median over the targets (Kish); of several bridges that of the worst")
    ]
    standard_error: Annotated[float | None, Field(description="median over the matches, nats")]
    bias: Annotated[
        float | None, Field(description="median over the matches, nats: what a log-ratio is expected to be off by")
    ]
    bridge_resultant: Annotated[
        float | None,
        Field(
            description="length of the mean unit bridge vector, of several bridges the largest: "
            "direct ranking suffers above about .3"
        ),
    ]
    direct_marginal_spearman: Annotated[
        float | None,
        Field(description="rank agreement of the two methods over the targets; null where only one is defined"),
    ]
    normalised: Annotated[bool, Field(description="the offsets log mean_b e^f of each leg are removed")]
    value_trusted: Annotated[bool, Field(description="false: trust the order, not the numbers")]
    warnings: list[str]


class Composition(Word):
    """The matches of one source item, best first."""

    object: Literal["composition"] = "composition"
    index: int
    matches: list[Match]
    diagnostics: Diagnostics


class ComposeResponse(Word):
    """Compositions, in the order of the sources."""

    object: Literal["list"] = "list"
    data: list[Composition]
    models: list[str]
    usage: Usage
