"""Where a checkpoint lies: a folder, an object store or a hub, seen as files by their names in it.

Only files that are asked for by name are read, and none of them is ever run: JSON and safetensors, never pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast, final

from service.contract.errors import Invalid, Permanent, Transient
from service.contract.imports import HUB_ID, OUTSIDE, is_allowed, local_path
from worker.sources.location import LocalTree, Tree, locate, safe_name

if TYPE_CHECKING:
    from worker.runner import Context

MAX_JSON_BYTES: Final = 64 << 20
BLOCK: Final = 1 << 22
FETCHED: Final = (
    "*.json",
    "model.safetensors",
    "model-*.safetensors",
    "*/model.safetensors",
    "*/model-*.safetensors",
)
"""Of a hub's model, which may hold the same weights in many formats."""


@final
class Source:
    """The files of a checkpoint."""

    def __init__(self, tree: Tree, prefix: str, ctx: Context) -> None:
        self._tree = tree
        self._prefix = prefix
        self._ctx = ctx
        self._copied = 0

    def has(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return self._tree.has(self._prefix + name)

    def read(self, name: str) -> bytes:
        """Read a small file whole.

        Raises Permanent if it is not there, may not be read or is too large; Transient for the network.
        """
        if not self.has(name):
            raise Permanent(f"{name} is missing from the checkpoint", code="missing_file")
        with self._open(name) as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise Permanent(f"{name} has more than {MAX_JSON_BYTES >> 20} MiB", code="too_large")
        return data

    def document(self, name: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises Permanent if the file does not hold one.
        """
        found = self.json(name)
        if not isinstance(found, dict):
            raise Permanent(f"{name} holds no JSON object", code="bad_file")
        return cast("dict[str, Any]", found)

    def json(self, name: str) -> Any:
        """Read a JSON document.

        Raises Permanent if the file does not hold one.
        """
        try:
            return json.loads(self.read(name), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Permanent(f"{name} is not JSON", code="bad_file") from error

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring a large file into a folder; one of this machine is only linked to."""
        target = folder / name.rpartition("/")[2]
        with self._open(name) as stream:  # which also checks that it lies where it may
            if isinstance(self._tree, LocalTree):
                target.symlink_to((self._tree.root / (self._prefix + name)).resolve())
                return target
            with target.open("wb") as file:
                while block := stream.read(BLOCK):
                    self._ctx.check()
                    file.write(block)
                    self._copied += len(block)
                    self._ctx.progress(self._copied, None)
        return target

    def _open(self, name: str) -> Any:
        try:
            return self._tree.open(self._prefix + name)
        except Invalid as error:
            raise Permanent(error.message, code="forbidden_path") from error


def open_source(source: str, ctx: Context) -> Source:
    """Open what an import names: an absolute path, a URI, or `org/name` of a hub.

    Raises Permanent if there is no such thing or it may not be read, Transient if it cannot be reached now.
    """
    if HUB_ID.fullmatch(source):
        return Source(LocalTree(_download(source, ctx)), "", ctx)
    path = local_path(source)
    if path is not None and not is_allowed(path, ctx.import_folders):
        raise Permanent(OUTSIDE, code="forbidden_path")
    tree = locate(source, ctx.store)
    if isinstance(tree, LocalTree) and tree.only is None and tree.root.parent.name == "snapshots":
        # A hub's cache: a snapshot links to files beside it, in the same repository's folder.
        repository = tree.root.parents[1]
        if is_allowed(repository, ctx.import_folders):
            return Source(LocalTree(repository), f"{tree.root.relative_to(repository).as_posix()}/", ctx)
    return Source(tree, "", ctx)


def checked_name(name: object, of: str) -> str:
    """Return a relative file name that a file of the checkpoint gives.

    Raises Permanent if it could lead out of the checkpoint.
    """
    found = safe_name(name) if isinstance(name, str) else None
    if found is None:
        raise Permanent(f"{of} names a file outside of the checkpoint", code="forbidden_path")
    return found


def _download(name: str, ctx: Context) -> Path:
    if os.environ.get("HF_HUB_OFFLINE", "1").strip().lower() not in {"0", "false", "no", "off", ""}:
        message = "no hub is configured here: give the folder of the checkpoint, or set HF_HUB_OFFLINE=0 on the worker"
        raise Permanent(message, code="no_hub")
    # Only where a hub is configured.
    from httpx2 import HTTPError  # noqa: PLC0415
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    try:
        folder = snapshot_download(
            name,
            allow_patterns=list(FETCHED),
            local_dir=ctx.scratch / "hub",
            endpoint=os.environ.get("HF_ENDPOINT"),
            max_workers=1,  # several share a connection that the first of them closes when it breaks
        )
    except HFValidationError as error:
        raise Permanent(f"{name} is no name of a hub's model", code="model_not_found") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        # The latter is what the library makes of a hub that does not answer, or not well.
        found = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if not isinstance(found, HfHubHTTPError):
            raise Transient(f"the hub could not be reached for {name}", code="hub_failed") from error
        status = found.response.status_code
        if status in {401, 403, 404}:
            raise Permanent(f"the hub has no model {name}, or keeps it to others", code="model_not_found") from error
        raise Transient(f"the hub answered {status} for {name}", code="hub_failed") from error
    except (HTTPError, RuntimeError) as error:
        raise Transient(f"the hub broke off for {name}: {type(error).__name__}", code="hub_failed") from error
    except OSError as error:
        if error.errno is not None:  # a full disk, say
            raise
        raise Transient(f"the hub sent other files of {name} than it promised", code="hub_failed") from error
    return Path(folder)


def _refuse_constant(name: str) -> NoReturn:
    msg = f"{name} is no JSON"
    raise ValueError(msg)
