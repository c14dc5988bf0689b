"""Ingest: read a source, validate every sample, and publish the good ones as a data set.

1. The first samples decide what the data set is: its modalities are those that at least half of them have, and the
   medium of each is what most of them hold.
2. Every sample is decoded in full. A bad one is left out and counted, with its key and the reason.
3. A hash of the seed and the sample's group, or key, puts it into training or held-out data: the same one every time.
   Groups may also be named, and a sample's own `split` decides if nothing else is asked for.
4. More bad samples than allowed, or no good one, fail the job. Otherwise the data set is published under this attempt's
   epoch, so a retry starts from nothing and never meets what an earlier attempt left.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, final

from service.contract.errors import Permanent, RequestError
from service.contract.jobs import Holdout, IngestArgs, IngestResult, Reject
from service.contract.samples import SHARD_BYTES, SampleWriter
from service.contract.tokens.decode import DEFAULT_LIMITS
from worker.cpus import num_cpus
from worker.sources.columns import SPLIT
from worker.sources.reading import read_source
from worker.sources.sample import Raw, Value, Wanted
from worker.sources.statistics import Statistics
from worker.sources.validate import Checked, check

if TYPE_CHECKING:
    from service.contract.modality import Medium
    from worker.runner import Context

PROBE: Final = 256
PROBE_BYTES: Final = 64 << 20
WINDOW: Final = 64
WINDOW_BYTES: Final = 64 << 20
MAX_THREADS: Final = 4
MAX_REJECTS: Final = 100
NAMED_REJECTS: Final = 3
MAX_LABELS: Final = 1000
MAX_LABEL_BYTES: Final = 1000
MAX_KEY_BYTES: Final = 1000
MAX_SHOWN: Final = 300
MAX_SHOWN_GROUP: Final = 60
MAX_NAMED_GROUPS: Final = 20
HELD_OUT: Final = frozenset({"holdout", "test", "validation", "val", "valid", "dev"})
TRAINING: Final = frozenset({"train", "training", ""})


class Refused(Exception):
    """A sample is left out, for this reason."""


def run(args: IngestArgs, ctx: Context) -> IngestResult:
    """Make a data set of a source.

    Raises Permanent if the source cannot be one or too much of it is bad, Transient if it cannot be reached; Cancelled
    and Interrupted at any time.
    """
    grouping = args.holdout.group_by if args.holdout else None
    fields = frozenset({SPLIT} | ({grouping} if grouping else set()))
    source = read_source(args.source, ctx.store, Wanted(args.modalities, fields))
    probe = _take(source, PROBE, PROBE_BYTES)
    media = _decide(probe, args)
    samples = chain(probe, source)
    del probe  # the chain lets go of it when it is through

    folder = ctx.scratch / f"dataset-{ctx.epoch}"
    shutil.rmtree(folder, ignore_errors=True)
    with SampleWriter(folder) as writer, ThreadPoolExecutor(min(MAX_THREADS, num_cpus()), "decode") as pool:
        intake = Intake(writer, media, args.holdout)
        for raw, verdict in _validated(samples, media, pool):
            intake.take(raw, verdict)
            if intake.num_seen % WINDOW == 0:
                ctx.check()
                ctx.progress(intake.num_seen, None)
        found = intake.close()
    _judge(intake.num_samples, intake.num_rejected, intake.rejects, args.max_bad_fraction)
    intake.check_groups()
    ctx.check()
    ctx.progress(intake.num_seen, intake.num_seen)

    key = f"datasets/{args.dataset}/{ctx.epoch}"
    manifest = ctx.store.publish(folder, key, kind="dataset", id=args.dataset, body=found)
    return IngestResult.model_validate(
        {**found, "artifact": key, "digest": manifest.digest, "num_bytes": manifest.num_bytes}
    )


@final
class Intake:
    """The data set as it grows: good samples are written, the first bad ones are kept with their reasons."""

    def __init__(self, writer: SampleWriter, media: dict[str, Medium], holdout: Holdout | None) -> None:
        self.num_samples = 0
        self.num_rejected = 0
        self.rejects: list[Reject] = []
        self._media = media
        self._holdout = holdout
        self._writer = writer
        self._seen: set[bytes] = set()
        self._labels: set[str] = set()
        self._unmet = set(holdout.groups or ()) if holdout else set[str]()
        self._met: set[str] = set()
        self._statistics = Statistics(media)

    @property
    def num_seen(self) -> int:
        """Samples so far, good and bad."""
        return self.num_samples + self.num_rejected

    def take(self, raw: Raw, verdict: dict[str, Checked] | str) -> None:
        """Write a sample, or note why not."""
        try:
            self._write(raw, verdict)
        except Refused as refusal:
            self.num_rejected += 1
            if len(self.rejects) < MAX_REJECTS:
                self.rejects.append(Reject(key=_shown(raw.key, MAX_SHOWN), reason=_shown(str(refusal), MAX_SHOWN)))
        else:
            self.num_samples += 1

    def check_groups(self) -> None:
        """Check that every group that is to be held out has a good sample; raises Permanent."""
        if self._unmet:
            assert self._holdout is not None
            met = ", ".join(repr(_shown(group, MAX_SHOWN_GROUP)) for group in sorted(self._met))
            missing = _shown(min(self._unmet), MAX_SHOWN_GROUP)
            raise Permanent(
                f"no good sample has {missing!r} as its {self._holdout.group_by!r}; some have {met}",
                code="no_such_group",
            )

    def close(self) -> dict[str, Any]:
        """Finish the files and return what was found: the body of the manifest."""
        totals = self._writer.close()
        return {
            "num_samples": totals.num_samples,
            "num_rejected": self.num_rejected,
            "rejects": [reject.model_dump() for reject in self.rejects],
            "modalities": dict(sorted(self._media.items())),
            "splits": {"train": totals.num_samples - totals.num_holdout, "holdout": totals.num_holdout},
            "labels": sorted(self._labels),
            "statistics": self._statistics.summary(),
        }

    def _write(self, raw: Raw, verdict: dict[str, Checked] | str) -> None:
        if isinstance(verdict, str):
            raise Refused(verdict)
        for name, checked in verdict.items():
            dim, known = checked.figures.get("dim"), self._statistics.dimension(name)
            if dim is not None and known is not None and dim != known:
                raise Refused(f"{name}: vectors of {dim:.0f} values where the data set has {known}")
        _check_line("key", raw.key, MAX_KEY_BYTES)
        digest = hashlib.blake2b(raw.key.encode(), digest_size=16).digest()
        if not raw.key or digest in self._seen:
            raise Refused("an earlier sample has the same key" if raw.key else "there is no key")
        _check_line("label", raw.label, MAX_LABEL_BYTES)
        held_out = _is_held_out(raw, self._holdout)
        self._writer.add(raw.key, {name: checked.payload for name, checked in verdict.items()}, raw.label, held_out)
        self._statistics.add(verdict)
        self._seen.add(digest)
        if self._unmet and self._holdout is not None:
            group = _group(raw, self._holdout)
            self._unmet.discard(group)
            if len(self._met) < MAX_NAMED_GROUPS:
                self._met.add(group)
        if raw.label and len(self._labels) < MAX_LABELS:
            self._labels.add(raw.label)


def _decide(probe: list[Raw], args: IngestArgs) -> dict[str, Medium]:
    """Decide the modalities of the data set and their media.

    Raises Permanent if there are none.
    """
    usable = [raw for raw in probe if raw.problem is None]
    if not usable:
        first = [Reject(key=_shown(raw.key, MAX_SHOWN), reason=_shown(raw.problem or "", MAX_SHOWN)) for raw in probe]
        _judge(0, len(probe), first, args.max_bad_fraction)
    held = Counter(name for raw in usable for name in raw.values)
    names = list(args.modalities) if args.modalities else [name for name in held if 2 * held[name] >= len(usable)]
    media: dict[str, Medium] = {}
    for name in sorted(names):
        votes: Counter[Medium] = Counter()
        for raw in usable:
            if name in raw.values and (medium := _medium(raw.values[name])) is not None:
                votes[medium] += 1
        if not votes:
            raise Permanent(f"none of the first {len(probe)} samples has a readable {name}: {_why(usable, name)}")
        media[name] = votes.most_common(1)[0][0]
    if not media:
        raise Permanent(
            "no modality was recognised: there is no image, sound, text or list of numbers that half of the samples "
            "have; name extensions or columns in `modalities`"
        )
    return media


def _medium(value: Value) -> Medium | None:
    """Tell the medium of a value; arrays have to be read for it, encoded media are believed until they are decoded."""
    if value.kind in {"image", "audio", "text"}:
        return value.kind  # pyright: ignore[reportReturnType]
    try:
        return check(value, DEFAULT_LIMITS).medium
    except RequestError:
        return None


def _why(probe: list[Raw], name: str) -> str:
    for raw in probe:
        if name in raw.values:
            try:
                check(raw.values[name], DEFAULT_LIMITS)
            except RequestError as error:
                return f"{_shown(raw.key, MAX_SHOWN)}: {error.message}"
    return "there is no such member or column"


def _take(source: Iterator[Raw], count: int, num_bytes: int) -> list[Raw]:
    """Take samples until there are enough, by number or by size."""
    taken: list[Raw] = []
    while len(taken) < count and num_bytes > 0 and (raw := next(source, None)) is not None:
        taken.append(raw)
        num_bytes -= _size(raw)
    return taken


def _size(raw: Raw) -> int:
    return sum(len(value.data) for value in raw.values.values() if isinstance(value.data, bytes | str))


def _validated(
    source: Iterator[Raw], media: dict[str, Medium], pool: ThreadPoolExecutor
) -> Iterator[tuple[Raw, dict[str, Checked] | str]]:
    """Decode samples on several threads, in order, a window at a time."""
    while window := _take(source, WINDOW, WINDOW_BYTES):
        yield from zip(window, pool.map(partial(_verdict, media=media), window), strict=True)


def _verdict(raw: Raw, *, media: dict[str, Medium]) -> dict[str, Checked] | str:
    """Validate a sample: its payloads, or the reason why it is refused."""
    if raw.problem is not None:
        return raw.problem
    if missing := [name for name in media if name not in raw.values]:
        return f"there is no {' and no '.join(missing)}"
    found: dict[str, Checked] = {}
    for name, medium in media.items():
        try:
            checked = check(raw.values[name], DEFAULT_LIMITS)
        except RequestError as error:
            return f"{name}: {error.message}"
        if checked.medium != medium:
            return f"{name}: {checked.medium} where the data set has {medium}"
        found[name] = checked
    if (num_bytes := sum(len(checked.payload) for checked in found.values())) > SHARD_BYTES:
        return f"{num_bytes} bytes and the limit of a sample is {SHARD_BYTES}"
    return found


def _check_line(what: str, text: str, max_bytes: int) -> None:
    """Refuse what is not one line of UTF-8 of a sane length."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise Refused(f"the {what} is not UTF-8") from None
    if num_bytes > max_bytes or any(ord(character) < 32 for character in text):
        raise Refused(f"a {what} is one line of at most {max_bytes} bytes")


def _is_held_out(raw: Raw, holdout: Holdout | None) -> bool:
    """Put a sample on its side: by its group if some are named, by hash if a fraction is asked for, else by `split`."""
    if holdout is not None and holdout.groups is not None:
        return _group(raw, holdout) in holdout.groups
    if holdout is None or holdout.fraction == 0:
        split = raw.fields.get(SPLIT, "").lower()
        if split not in HELD_OUT | TRAINING:
            raise Refused(f"split is {split!r}: train, holdout, test and validation are known")
        return split in HELD_OUT
    digest = hashlib.blake2b(
        f"{holdout.seed}\0{_group(raw, holdout)}".encode("utf-8", "surrogateescape"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") < holdout.fraction * 2**64


def _group(raw: Raw, holdout: Holdout) -> str:
    """Return what a sample is held out with; itself alone unless there are groups."""
    if holdout.group_by is None:
        return raw.key
    if holdout.group_by not in raw.fields:
        raise Refused(f"there is no {holdout.group_by!r} to group by")
    return raw.fields[holdout.group_by]


def _judge(num_samples: int, num_rejected: int, rejects: list[Reject], max_bad_fraction: float) -> None:
    """Raise Permanent if nothing is left, or more was bad than allowed."""
    total = num_samples + num_rejected
    if total == 0:
        raise Permanent("the source holds no samples")
    if num_samples and num_rejected <= max_bad_fraction * total:
        return
    first = "; ".join(f"{reject.key}: {reject.reason}" for reject in rejects[:NAMED_REJECTS])
    allowed = f", more than the {max_bad_fraction:.1%} allowed" if num_samples else ""
    raise Permanent(f"{num_rejected} of {total} samples are bad{allowed}. The first: {first}", code="bad_samples")


def _shown(text: str, limit: int) -> str:
    """Make text fit to be shown and stored: UTF-8, no control characters, not long."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    plain = "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in plain)
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."
