"""Learn digits that are seen and digits that are heard from real data, and measure what nobody taught.

    python docs/examples/spoken-digits/run.py DATA

DATA holds image-text-train.tar, image-text-test.tar, audio-text-train.tar and audio-text-test.tar; README.md beside
this file says what is in them. Nothing is used but the documented HTTP API and the recipe beside it, `recipe.json`.

1. upload the images and the recordings, each with its captions; the test tars are held out
2. train the recipe, and evaluate on what is held out
3. upload the recordings again with all of one speaker held out, train anew, and evaluate on that speaker
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import httpx

RECIPE = Path(__file__).with_name("recipe.json")
SPEAKER = re.compile(r"\d_([a-z]+)_\d+")  # how the recordings are named: <digit>_<speaker>_<number>
PATIENCE_S = 120.0
BARS = {"images named": 0.97, "recordings named": 0.97, "recording -> images": 0.96}


def fail(message: str) -> NoReturn:
    sys.exit(f"run.py: {message}")


class Service:
    """What the example asks of Isthmus."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False)

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """Return the document that answers a request."""
        response = self.http.request(method, f"/v1{path}", **request)
        if not response.is_success:
            fail(f"{method} {path} answered {response.status_code}: {response.text}")
        return response.json()

    def wait(self, job_id: str, what: str) -> dict[str, Any]:
        """Wait for a job, with a line for every tenth of it, and return it."""
        said = 0
        while True:
            job = self.ask("GET", f"/jobs/{job_id}")
            if job["status"] == "succeeded":
                return job
            if job["status"] in {"failed", "cancelled"}:
                fail(f"{what}: the {job['kind']} job has {job['status']}: {(job['error'] or {}).get('message', '')}")
            progress = job["progress"]
            if progress and progress["total"] and (tenth := 10 * progress["done"] // progress["total"]) > said:
                said = tenth
                left = f", {progress['eta_s']:.0f} s left" if progress["eta_s"] else ""
                print(f"  {what}: {progress['done']:,} of {progress['total']:,} {progress['unit']}{left}", flush=True)
            time.sleep(0.5)

    def upload(self, tar: Path, holdout: dict[str, Any] | None = None) -> str:
        """Upload a data set, wait until it is read, and return its id."""
        fields = {"name": tar.stem} | ({"holdout": json.dumps(holdout)} if holdout else {})
        with tar.open("rb") as file:
            created = self.ask("POST", "/datasets", data=fields, files={"file": (tar.name, file, "application/x-tar")})
        self.wait(created["job"]["id"], tar.stem)
        dataset = self.ask("GET", f"/datasets/{created['id']}")
        splits = ", ".join(f"{count:,} {split}" for split, count in dataset["splits"].items())
        print(f"  {tar.stem}: {splits}, {dataset['num_rejected']} rejected", flush=True)
        return created["id"]

    def train(self, recipe: dict[str, Any], datasets: dict[str, str], name: str) -> float:
        """Train the recipe on data sets, given by the names that it has for them; return the seconds it took."""
        pairs = [pair | {"dataset": datasets[pair["dataset"]]} for pair in recipe["pairs"]]
        began = time.monotonic()
        job = self.ask("POST", "/jobs", json={"kind": "train", "name": name, "recipe": recipe | {"pairs": pairs}})
        self.wait(job["id"], name)
        return time.monotonic() - began

    def evaluate(self, model: str, datasets: dict[str, str]) -> dict[str, Any]:
        """Measure a model on the held-out samples of data sets and return the report."""
        wanted = {"model": model, "datasets": list(datasets.values()), "parts": ["retrieval", "zero_shot"], "ks": [10]}
        job = self.ask("POST", "/jobs", json={"kind": "evaluate"} | wanted)
        self.wait(job["id"], f"{model}, evaluation")
        return self.ask("GET", f"/jobs/{job['id']}/files/report.json")


def write_tar(data: Path, pair: str, out: Path) -> Path:
    """Join the two tars of a pair: each sample gets a .json that names its split, and its speaker if its key does."""
    path = out / f"{pair}.tar"
    with tarfile.open(path, "w") as joined:
        for part, split in (("train", "train"), ("test", "holdout")):
            source = data / f"{pair}-{part}.tar"
            if not source.is_file():
                fail(f"{data} has no {source.name}")
            keys: dict[str, None] = {}
            with tarfile.open(source) as samples:
                for member in samples:
                    if (content := samples.extractfile(member)) is None:
                        continue
                    key, _, extension = member.name.partition(".")
                    if key not in keys:
                        keys[key] = None
                        speaker = SPEAKER.fullmatch(key)
                        about = {"split": split} | ({"speaker": speaker[1]} if speaker else {})
                        add(joined, f"{split}-{key}.json", json.dumps(about).encode())
                    add(joined, f"{split}-{key}.{extension}", content.read())
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def figures(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Pick what the table shows out of a report: figure -> how it was measured -> value."""
    named = {
        entry["modality"]: {"zero-shot": entry["accuracy"]}
        for entry in report["zero_shot"]
        if entry["prompts_modality"] == "text"
    }
    found = {"images named": named["image"], "recordings named": named["audio"]}
    for name, source, target in (("recording -> images", "audio", "image"), ("image -> recordings", "image", "audio")):
        found[name] = {
            entry["method"]: entry["precision"]["10"]
            for entry in report["retrieval"]
            if (entry["source"], entry["target"]) == (source, target)
        }
    return found


def show(title: str, found: dict[str, dict[str, float]], seconds: float) -> None:
    methods = ("zero-shot", "direct", "marginal")
    print(f"\n{title}, on what was held out (trained in {seconds:.0f} s)")
    print(f"  {'':24}" + "".join(f"{method:>11}" for method in methods) + f"{'bar':>8}")
    for name, values in found.items():
        cells = "".join(f"{values[method]:11.3f}" if method in values else f"{'':11}" for method in methods)
        bar = BARS.get(name)
        verdict = "" if bar is None else f"{bar:8.2f}" + ("" if min(values.values()) >= bar else "  below")
        print(f"  {name:24}{cells}{verdict}")
    print(flush=True)


@contextlib.contextmanager
def own_service(folder: Path) -> Generator[str]:
    """Run a service that keeps everything in a folder, on any free port, and yield its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    # Settings of another service (its database, its keys) must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--data", str(folder)]
    log = folder / "service.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                about = json.loads((folder / "serve.json").read_text())
                if about["pid"] == process.pid:
                    print(f"  {about['url']}, log in {log}", flush=True)
                    yield about["url"]
                    return
            time.sleep(0.1)
        fail("the service did not start:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:]))
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the digits of README.md.")
    parser.add_argument("data", type=Path, help="the folder with the four tars")
    parser.add_argument("--url", help="a running service (ISTHMUS_API_KEY if it needs a key); without, its own")
    parser.add_argument("--keep", type=Path, help="keep the own service's folder here: `isthmus serve --data FOLDER`")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--speaker", default="theo", help="who is held out in the second run; '' for no second run")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    recipe = json.loads(options.recipe.read_text())
    for number in (signal.SIGINT, signal.SIGTERM):  # either stops the service on the way out
        signal.signal(number, signal.default_int_handler)
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-digits-")))
        tars = [write_tar(options.data, pair, scratch) for pair in ("image-text", "audio-text")]

        print("service", flush=True)
        url = options.url or stack.enter_context(own_service(options.keep or scratch / "service"))
        service = Service(url, os.environ.get("ISTHMUS_API_KEY") if options.url else None)

        print("data; no image is paired with a recording, both are paired with text only", flush=True)
        images, recordings = (service.upload(tar) for tar in tars)
        runs = {"spoken-digits": recordings}
        if options.speaker:
            holdout = {"group_by": "speaker", "groups": [options.speaker]}
            runs[f"spoken-digits-without-{options.speaker}"] = service.upload(tars[1], holdout)

        for name, dataset in runs.items():
            print(f"training {name}", flush=True)
            datasets = {"image-text": images, "audio-text": dataset}
            seconds = service.train(recipe, datasets, name)
            reached = figures(service.evaluate(name, datasets))
            show(name, reached, seconds)
            found[name] = {"seconds": seconds, "figures": reached}
            if options.out:
                options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except httpx.TransportError as error:
        fail(f"the service cannot be reached: {error}")
