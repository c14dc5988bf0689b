"""Members: files whose names share a key, one file per modality, as in WebDataset (`0001.png`, `0001.txt`, `0001.cls`).

The key is the path up to the first dot of its last part, the extension is the rest. Unless the caller maps modalities
to extensions, they are recognised: images, sounds and text by the list below, `<name>.npy`, `<name>.ids.npy` and
`<name>.json` as tokens of the modality <name>; `cls` or `label` is the label, `json` holds metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from service.contract.errors import Invalid, Permanent
from service.contract.word import MODALITY
from worker.sources.location import safe_name
from worker.sources.sample import Kind, Raw, Value, Wanted, plain, signature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from worker.sources.location import Tree

EXTENSIONS: Final[dict[str, Kind]] = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), "image"),
    **dict.fromkeys(("wav", "flac", "ogg", "opus", "mp3"), "audio"),
    **dict.fromkeys(("txt", "caption"), "text"),
}
LABELS: Final = ("cls", "label")
METADATA: Final = "json"
MAX_METADATA_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Role:
    """What a member is to its sample; `kind` None: its first bytes tell."""

    modality: str
    kind: Kind | None


def split_name(name: str) -> tuple[str, str]:
    """Split a path into key and extension (lower case) at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def role_of(extension: str, mapping: Mapping[str, str] | None) -> Role | None:
    """Tell which modality a member belongs to; None for label, metadata and whatever is of no interest."""
    if mapping is not None:
        for modality, wanted in mapping.items():
            if extension == wanted.lower().removeprefix("."):
                return Role(modality, _kind_of(extension))
        return None
    if extension in EXTENSIONS:
        return Role(EXTENSIONS[extension], EXTENSIONS[extension])
    for suffix in (".ids.npy", ".npy", ".json"):
        name = extension.removesuffix(suffix)
        if name != extension and MODALITY.match(name):
            return Role(name, _kind_of(extension))
    return None


def of_interest(extension: str, wanted: Wanted) -> bool:
    """Tell whether a member has to be read at all."""
    return extension in LABELS or extension == METADATA or role_of(extension, wanted.mapping) is not None


def assemble(key: str, extensions: list[str], read: Callable[[str], bytes], wanted: Wanted) -> Raw:
    """Make a sample of its members; what is wrong with one becomes the sample's problem."""
    try:
        if safe_name(key) != key:
            raise Invalid("the key is not a plain relative path")  # noqa: TRY301
        values: dict[str, Value] = {}
        for extension in extensions:
            if (role := role_of(extension, wanted.mapping)) is None:
                continue
            if role.modality in values:
                raise Invalid(f"two members are {role.modality}: name one extension in `modalities`")  # noqa: TRY301
            data = read(extension)
            values[role.modality] = Value(role.kind or signature(data), data)
        fields, label = _metadata(extensions, read, wanted)
    except Invalid as error:
        return Raw(key, problem=error.message)
    return Raw(key, values, label, fields)


def read_members(tree: Tree, wanted: Wanted) -> Iterator[Raw]:
    """Read samples from a tree of members, in order of their keys."""
    groups: dict[str, dict[str, str]] = {}
    for name in tree.names:
        key, extension = split_name(name)
        if of_interest(extension, wanted):
            groups.setdefault(key, {})[extension] = name
    for key in sorted(groups):
        members = groups[key]
        if any(role_of(extension, wanted.mapping) for extension in members):
            yield assemble(key, list(members), lambda extension, members=members: tree.read(members[extension]), wanted)


def check_mapping(mapping: Mapping[str, str] | None) -> None:
    """Raise Permanent if two modalities name the same extension or column."""
    names = list(mapping.values()) if mapping else []
    if twice := {name for name in names if names.count(name) > 1}:
        raise Permanent(f"two modalities name the same extension or column: {', '.join(sorted(twice))}")


def _kind_of(extension: str) -> Kind | None:
    if extension in EXTENSIONS:
        return EXTENSIONS[extension]
    last = extension.rpartition(".")[2]
    if last in {"npy", "json"}:
        return cast("Kind", last)
    return EXTENSIONS.get(last)


def _metadata(extensions: list[str], read: Callable[[str], bytes], wanted: Wanted) -> tuple[dict[str, str], str]:
    """Read the label and the metadata fields that were asked for."""
    document: dict[str, object] = {}
    if METADATA in extensions and role_of(METADATA, wanted.mapping) is None:
        text = read(METADATA)
        try:
            parsed: object = json.loads(text) if len(text) <= MAX_METADATA_BYTES else None
        except (ValueError, RecursionError) as error:
            raise Invalid("the json member is not JSON") from error
        if not isinstance(parsed, dict):
            raise Invalid("the json member is no object, or larger than a megabyte")
        document = cast("dict[str, object]", parsed)
    labels = [extension for extension in LABELS if extension in extensions]
    label = plain(read(labels[0])) if labels else plain(document.get("label"))
    return {name: plain(document[name]) for name in wanted.fields if document.get(name) is not None}, label
