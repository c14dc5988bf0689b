"""The demo, from nothing to answers that nobody taught, over HTTP like any other client.

1. make the data: images with captions, sounds with transcripts, and not one image with a sound
2. start a service of our own
3. upload both data sets and wait until they are ingested
4. submit a training job and follow it
5. ask: embed, classify, compose, on what the model never saw
6. say how it went, in a table and on a page
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Never

import httpx

from service.client.api import Api, ApiError
from service.client.progress import Advance, progress
from service.demo import digits, speech
from service.demo.client import Client, DemoError, item, vectors
from service.demo.figures import Figure, figures
from service.demo.folder import read_folder
from service.demo.page import Answers, one_each, write_page
from service.demo.recipes import STEPS, STEPS_OF_OTHERS, recipe
from service.demo.service import LOG, own_service
from service.demo.specimens import Collection, Specimen, write_tar

MODEL: Final = "demo"
KEPT: Final = Path("isthmus-demo")
PROMPTS: Final = 24  # captions of a label that classify with it
NEIGHBOURS: Final = 10
PATIENCE_S: Final = 30.0  # with a service that went away


@dataclass(frozen=True)
class Outcome:
    """What a run of the demo found."""

    figures: list[Figure]
    page: Path
    seconds: dict[str, float]


def run(*, tars: Path | None, out: Path, keep: bool, seed: int, url: str | None = None) -> int:
    """Run the demo and return the exit code: 130 after Ctrl-C. With a URL it asks the service that runs there."""
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.interrupt)  # even where the shell started us with SIGINT ignored
    try:
        with _folder(keep=keep) as folder:
            outcome = _tour(folder, stop, tars=tars, out=out, seed=seed, url=url)
            _show(outcome)
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running")
        return 130
    except (DemoError, ApiError) as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return 1
    except (httpx.TransportError, httpx.InvalidURL) as error:
        print(f"isthmus: {url or 'the service'} cannot be reached: {error}", file=sys.stderr)
        return 1
    if keep:
        print(f"the model and its data are kept: isthmus serve --data {KEPT}")
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)
    print(f"largest process: {largest:,.0f} MiB")
    return 0


def make_data(folder: Path, *, seed: int) -> int:
    """Write the demo's data as it uploads them, image-text.tar and audio-text.tar, and return the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for collection in (digits.collect(seed), speech.collect(seed)):
        path = folder / f"{collection.medium}-text.tar"
        write_tar(path, collection)
        print(f"{path}: {len(collection.train):,} to learn from, {len(collection.holdout):,} held out")
        print(f"  {collection.source}")
    return 0


def _tour(folder: Path, stop: _Stop, *, tars: Path | None, out: Path, seed: int, url: str | None = None) -> Outcome:
    """Walk through all of it.

    Raises DemoError if the data are not usable or the service fails.
    """
    clock = _Clock()
    stop.step(1, "data")
    images, sounds = read_folder(tars) if tars else (digits.collect(seed), speech.collect(seed))
    for collection in (images, sounds):
        print(f"  {collection.source}: {len(collection.train):,} to learn from, {len(collection.holdout):,} held out")
    print("  no image is paired with a sound; both are paired with text only")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {collection.medium: folder / f"{collection.medium}-text.tar" for collection in (images, sounds)}
    for collection in (images, sounds):
        write_tar(paths[collection.medium], collection)
    clock.lap("data")

    stop.step(2, "service")
    service = own_service(folder) if url is None else contextlib.nullcontext(url)
    with service as place, Api(place, key=None if url is None else os.environ.get("ISTHMUS_API_KEY")) as api:
        print(f"  {place}" + (f" (log: {folder / LOG})" if url is None else ""))
        clock.lap("start")

        stop.step(3, "upload and ingest")
        datasets = {medium: _ingest(api, path) for medium, path in paths.items()}
        clock.lap("ingest")

        stop.step(4, "training")
        steps = STEPS_OF_OTHERS if tars else STEPS
        wanted = recipe(images, sounds, datasets=datasets, steps=steps, seed=seed)
        job = api.post("/v1/jobs", {"kind": "train", "name": MODEL, "recipe": wanted})
        with progress("learning") as advance:
            _follow(api, job["id"], advance)
        model = api.get(f"/v1/models/{MODEL}")
        scales = ", ".join(
            f"{' with '.join(pair.split('+'))} ({scale:.1f})" for pair, scale in model["logit_scales"].items()
        )
        print(f"  learned pairs and their logit scales: {scales}")
        clock.lap("training")

        stop.step(5, "questions about what it never saw")
        answers = _ask(Client(api), images, sounds)
        clock.lap("questions")
    out.mkdir(parents=True, exist_ok=True)
    page = write_page(out / "isthmus-demo.html", answers, model=model, recipe=wanted)
    return Outcome(answers.figures, page, clock.seconds)


def _ingest(api: Api, path: Path) -> str:
    created = api.upload(path, path.stem)
    with progress(f"reading {path.stem}") as advance:
        _follow(api, created["job"]["id"], advance)
    dataset = api.get(f"/v1/datasets/{created['id']}")
    splits = ", ".join(f"{count:,} {name}" for name, count in dataset["splits"].items())
    print(f"  {dataset['name']}: {splits}, {dataset['num_rejected']} rejected")
    return str(dataset["id"])


def _follow(api: Api, job: str, advance: Advance) -> None:
    """Follow a job's stream of events to its end.

    Raises DemoError with the job's own message unless it succeeds.
    """
    note = ""
    for event in api.events(job, patience_s=PATIENCE_S):
        match event.kind:
            case "metric":
                note = _note(event.data["values"]) or note
            case "progress":
                eta = f", {event.data['eta_s']:.0f} s left" if event.data["eta_s"] else ""
                advance(event.data["done"], event.data["total"] or 0, note + eta)
            case "done" if event.data["status"] != "succeeded":
                ended = event.data
                reason = f": {ended['error']['message']}" if ended["error"] else ""
                msg = f"the {ended['kind']} job has {ended['status']}{reason}"
                raise DemoError(msg)
            case _:
                pass


def _note(values: dict[str, float]) -> str:
    losses = [value for name, value in sorted(values.items()) if name.startswith("loss/")]
    if not losses or "steps_per_s" not in values:
        return ""
    return f"loss {' and '.join(f'{loss:.2f}' for loss in losses)}, {values['steps_per_s']:.1f} steps/s"


def _ask(client: Client, images: Collection, sounds: Collection) -> Answers:
    """Ask everything that the table and the page show."""
    seen, heard = images.holdout, sounds.holdout
    z_image, z_audio = client.embed(MODEL, "image", seen), client.embed(MODEL, "audio", heard)
    print(f"  embedded {len(seen):,} images and {len(heard):,} sounds as {z_image.shape[1]} numbers each")
    said_image = client.classify(MODEL, "image", seen, _prompts(images))
    said_audio = client.classify(MODEL, "audio", heard, _prompts(sounds))
    print("  classified them by captions (zero-shot)")
    to_images = client.compose(MODEL, [item("audio", each) for each in heard], vectors("image", z_image), NEIGHBOURS)
    to_sounds = client.compose(MODEL, [item("image", each) for each in seen], vectors("audio", z_audio), NEIGHBOURS)
    print("  composed: images for every sound, sounds for every image")
    found = figures(
        image_labels=_labels(seen),
        image_predictions=said_image,
        audio_labels=_labels(heard),
        audio_predictions=said_audio,
        to_images=to_images,
        to_sounds=to_sounds,
    )
    questions, riddles = one_each(heard), one_each(seen)
    in_full = client.compose(
        MODEL, [item("audio", heard[at]) for at in questions], vectors("image", z_image), len(seen)
    )
    back_in_full = client.compose(
        MODEL, [item("image", seen[at]) for at in riddles], vectors("audio", z_audio), len(heard)
    )
    return Answers(
        images=images,
        sounds=sounds,
        heard=dict(zip(questions, in_full, strict=True)),
        seen=dict(zip(riddles, back_in_full, strict=True)),
        diagnostics={
            "sound to images": [answer["diagnostics"] for answer in to_images],
            "image to sounds": [answer["diagnostics"] for answer in to_sounds],
        },
        figures=found,
    )


def _labels(specimens: Sequence[Specimen]) -> list[str]:
    return [specimen.label for specimen in specimens]


def _prompts(collection: Collection) -> dict[str, list[str]]:
    """Return the captions that each label has among the training samples."""
    found: dict[str, dict[str, None]] = {}
    for specimen in collection.train:
        found.setdefault(specimen.label, {})[specimen.caption] = None
    return {label: sorted(captions)[:PROMPTS] for label, captions in sorted(found.items())}


def _show(outcome: Outcome) -> None:
    print("\n6. on what it never saw")
    print(f"  {'':28}{'reached':>9}{'bar':>7}{'chance':>9}")
    for figure in outcome.figures:
        short = "" if figure.value >= figure.bar else " (below its bar)"
        print(f"  {figure.name:28}{figure.value:9.3f}{figure.bar:7.2f}{figure.chance:9.2f}   {figure.meaning}{short}")
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in outcome.seconds.items())
    print(f"\n  seconds: {parts}; in all {sum(outcome.seconds.values()):.0f}")
    print(f"  look and listen: {outcome.page.resolve().as_uri()}\n", flush=True)


@contextlib.contextmanager
def _folder(*, keep: bool) -> Generator[Path]:
    if keep:
        yield KEPT
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as folder:
        yield Path(folder)


class _Stop:
    """Raises KeyboardInterrupt at once, and again at the next step: the first is lost where it meets a fork's hooks."""

    def __init__(self) -> None:
        self._asked = False

    def interrupt(self, _number: int, _frame: object) -> Never:
        self._asked = True
        raise KeyboardInterrupt

    def step(self, number: int, title: str) -> None:
        if self._asked:
            raise KeyboardInterrupt
        print(f"\n{number}. {title}", flush=True)


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now
