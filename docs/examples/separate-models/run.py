"""Compose two models that were trained apart: one knows images, the other recordings, and both know captions.

    isthmus serve                                              # in one terminal
    python docs/examples/separate-models/run.py DATA           # in another

DATA holds image-text-train.tar, image-text-test.tar, audio-text-train.tar and audio-text-test.tar; README.md of
docs/examples/spoken-digits says what is in them. Nothing is used but the documented HTTP API, the files that it hands
out, and the recipes beside this file, `pictures.json` and `sounds.json`.

1. upload the four tars; the test tars are data sets of their own, which no model learns from
2. train `pictures` on images with captions and `sounds` on recordings with captions: two jobs, two spaces
3. embed the test images with the one and the test recordings with the other
4. compare vectors directly: the service refuses, and the cosines, taken here, say why
5. compose, through three bridges, and measure ranking and posterior by the digits, which no model was told
6. ask about one recording
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import httpx
import numpy as np
import pyarrow.parquet as pq

HERE = Path(__file__).parent
TARS = ("image-text-train", "image-text-test", "audio-text-train", "audio-text-test")
MODELS = {"image": "pictures", "audio": "sounds"}  # modality -> the model that knows it, and the name of its recipe
WAYS = {"recording -> images": ("audio", "image"), "image -> recordings": ("image", "audio")}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [start + number for start in ("", "the digit ", "the number ") for number in NUMBERS]
BAR = 0.90  # for every composed precision
K = 10
NUM_BINS = 10
PATIENCE_S = 600.0  # the first question through two banks embeds them


def fail(message: str) -> NoReturn:
    sys.exit(f"run.py: {message}")


@final
@dataclass(frozen=True)
class Vectors:
    """An embedding set: its id, and what its files hold."""

    id: str
    z: np.ndarray  # (item, dim), of unit length
    labels: np.ndarray  # (item,), the digits


@final
class Service:
    """What the example asks of Isthmus."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """Return the document that answers a request."""
        return self._answer(method, path, **request).json()

    def fetch(self, path: str) -> io.BytesIO:
        """Return a file."""
        return io.BytesIO(self._answer("GET", path).content)

    def _answer(self, method: str, path: str, **request: Any) -> httpx.Response:
        response = self.http.request(method, f"/v1{path}", **request)
        if not response.is_success:
            fail(f"{method} {path} answered {response.status_code}: {response.text}")
        return response

    def refusal(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the error that refuses a composition."""
        response = self.http.post("/v1/compose", json=question)
        if response.status_code != 422:
            fail(f"POST /compose was to be refused and answered {response.status_code}: {response.text[:1000]}")
        return response.json()["error"]

    def wait(self, job_id: str, what: str) -> dict[str, Any]:
        """Wait for a job, with a line for every fifth of it, and return it."""
        said = 0
        while (job := self.ask("GET", f"/jobs/{job_id}"))["status"] != "succeeded":
            if job["status"] in {"failed", "cancelled"}:
                fail(f"{what}: the {job['kind']} job has {job['status']}: {(job['error'] or {}).get('message', '')}")
            progress = job["progress"]
            if progress and progress["total"] and (fifth := 5 * progress["done"] // progress["total"]) > said:
                said = fifth
                print(f"  {what}: {progress['done']:,} of {progress['total']:,} {progress['unit']}", flush=True)
            time.sleep(0.5)
        return job

    def run(self, what: str, **job: Any) -> dict[str, Any]:
        """Submit a job and wait for it."""
        return self.wait(self.ask("POST", "/jobs", json=job)["id"], what)

    def upload(self, tar: Path) -> str:
        """Upload a data set, wait until it is read, and return its id."""
        with tar.open("rb") as file:
            files = {"file": (tar.name, file, "application/x-tar")}
            created = self.ask("POST", "/datasets", data={"name": tar.stem}, files=files)
        self.wait(created["job"]["id"], tar.stem)
        return created["id"]

    def train(self, name: str, recipe: dict[str, Any], datasets: dict[str, str]) -> None:
        """Train a recipe on data sets, given by the names that it has for them."""
        pairs = [pair | {"dataset": datasets[pair["dataset"]]} for pair in recipe["pairs"]]
        self.run(name, kind="train", name=name, recipe=recipe | {"pairs": pairs})

    def embed(self, model: str, dataset: str, modality: str) -> Vectors:
        """Embed one modality of a data set."""
        job = self.run(f"{modality} by {model}", kind="embed", model=model, dataset=dataset, modality=modality)
        sets = self.ask("GET", "/embedding-sets")["data"]
        set_id = next(each["id"] for each in sets if each["job_id"] == job["id"])
        files = f"/embedding-sets/{set_id}/files"
        labels = pq.read_table(self.fetch(f"{files}/embeddings.parquet"), columns=["label"])["label"]
        return Vectors(set_id, np.load(self.fetch(f"{files}/vectors.npy")), np.array(labels.to_pylist()))

    def compose(self, what: str, source: Vectors, target: Vectors, **question: Any) -> dict[str, Any]:
        """Rank all targets for every source in a job, and measure what it found."""
        ends = {"source": {"embeddings": source.id}, "target": {"embeddings": target.id}}
        job = self.run(what, kind="compose", method="marginal", top_k=len(target.z), **ends, **question)
        files = f"/jobs/{job['id']}/files"
        summary = self.ask("GET", f"{files}/summary.json")
        columns = ["target_index", "posterior"]
        table = pq.read_table(self.fetch(f"{files}/matches.parquet"), columns=columns)  # source by source, best first
        shape = len(source.z), len(target.z)
        index, posterior = (table[name].to_numpy().reshape(shape) for name in columns)
        return {
            **precision(index, source, target),
            **calibration(index, posterior, source, target),
            "effective_sample_size": summary["effective_sample_size"]["median"],
            "value_trusted": summary["value_trusted"],
            "warnings": summary["warnings"],
        }

    def compose_online(self, source: Vectors, target: Vectors, **question: Any) -> dict[str, Any]:
        """Rank the best targets for every source in one request, and measure the ranking."""
        ends = {"source": {"embeddings": source.id}, "target": {"embeddings": target.id}}
        answers = self.ask("POST", "/compose", json={"method": "marginal", "top_k": K} | ends | question)["data"]
        index = np.array([[match["index"] for match in answer["matches"]] for answer in answers])
        about = [answer["diagnostics"] for answer in answers]
        return {
            **precision(index, source, target),
            "effective_sample_size": float(np.median([each["effective_sample_size"] for each in about])),
            "value_trusted": all(each["value_trusted"] for each in about),
            "warnings": list(dict.fromkeys(text for each in about for text in each["warnings"])),
        }


def precision(index: np.ndarray, source: Vectors, target: Vectors) -> dict[str, float]:
    """Return precision@10 of targets (source, rank), and its standard error over digits: items of one fare alike."""
    hits = (target.labels[index[:, :K]] == source.labels[:, None]).mean(1)
    digits = [hits[source.labels == digit].mean() for digit in np.unique(source.labels)]
    return {"precision": float(hits.mean()), "standard_error": float(np.std(digits, ddof=1) / len(digits) ** 0.5)}


def calibration(index: np.ndarray, posterior: np.ndarray, source: Vectors, target: Vectors) -> dict[str, float]:
    """Hold the posterior of each digit, summed over the targets (source, rank) that show it, against the truth."""
    digits = np.unique(target.labels)
    labels = target.labels[index]
    said = np.stack([(posterior * (labels == digit)).sum(1) for digit in digits], axis=1)
    confidence, right = said.max(1), digits[said.argmax(1)] == source.labels
    bins = np.minimum((NUM_BINS * confidence).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence)  # summed over the sources of a bin
    return {
        "right": float(right.mean()),
        "confidence": float(confidence.mean()),
        "calibration_error": float(np.abs(gaps).sum() / len(right)),
    }


def legs(source: str, target: str) -> list[dict[str, str]]:
    """Name the two legs from one modality to the other: each a trained pair of another model."""
    return [
        {"model": MODELS[source], "from": source, "to": "text"},
        {"model": MODELS[target], "from": "text", "to": target},
    ]


def refuse(service: Service, source: Vectors, target: Vectors) -> str:
    """Ask for what two spaces cannot answer, show what is said, and return its code."""
    ends = {"source": {"embeddings": source.id}, "target": {"embeddings": target.id}}
    error = service.refusal(ends | {"legs": legs("audio", "image"), "method": "direct"})
    print(f"  422 {error['code']}: {error['message']}", flush=True)
    return error["code"]


def measure(service: Service, ends: dict[str, Vectors], captions: dict[str, Vectors]) -> dict[str, Any]:
    """Rank both ways, by cosine and composed through three bridges."""
    found: dict[str, Any] = {}
    for way, (begin, end) in WAYS.items():
        source, target, path = ends[begin], ends[end], legs(begin, end)
        sets = [{"embeddings": captions[modality].id} for modality in (begin, end)]
        found[way] = {
            "chance": {"precision": float((source.labels[:, None] == target.labels).mean())},
            "cosine": precision(np.argsort(-source.z @ target.z.T, axis=1), source, target),
            "banks": service.compose(f"{way}, banks", source, target, legs=path),
            "sets": service.compose(f"{way}, sets", source, target, legs=path, through=sets),
            "list": service.compose_online(source, target, legs=path, through=CAPTIONS),
        }
    return found


def show(found: dict[str, Any], num_captions: int) -> None:
    """Print what was measured, a line for each way of ranking."""
    names = {
        "chance": "chance",
        "cosine": "cosine of the vectors",
        "banks": "composed: both models' banks",
        "sets": f"composed: {num_captions:,} captions, two sets",
        "list": f"composed: {len(CAPTIONS)} captions, listed",
    }
    for way, rows in found.items():
        print(f"\n{way:36}{f'p@{K}':>6}{'s.e.':>7}{'samples':>9}{'values':>9}{'right':>8}{'said':>7}{'off by':>8}")
        for name, row in rows.items():
            line = f"  {names[name]:34}{row['precision']:6.3f}"
            if "standard_error" in row:
                line += f"{row['standard_error']:7.3f}"
            if "value_trusted" in row:
                line += f"{row['effective_sample_size']:9,.0f}{'trusted' if row['value_trusted'] else 'doubted':>9}"
            if "right" in row:
                line += f"{row['right']:8.3f}{row['confidence']:7.3f}{row['calibration_error']:8.3f}"
            print(line + (f"  below {BAR:.2f}" if "value_trusted" in row and row["precision"] < BAR else ""))
    print(flush=True)


def ask_once(service: Service, recordings: str, images: Vectors) -> dict[str, Any]:
    """Ask which images belong to one recording, as a user would, and show the answer."""
    sample = service.ask("GET", f"/datasets/{recordings}/samples", params={"limit": 1})["data"][0]
    print(f"which images belong to the recording {sample['key']}? through {len(CAPTIONS)} captions")
    question = {
        "legs": legs("audio", "image"),
        "source": {"audio": sample["items"]["audio"]},
        "target": {"embeddings": images.id},
        "through": CAPTIONS,
        "top_k": 3,
    }
    answer = service.ask("POST", "/compose", json=question)["data"][0]
    for match in answer["matches"]:
        label, ratio, error = images.labels[match["index"]], match["log_ratio"], match["standard_error"]
        print(
            f"  {match['key']}, of a {label}: log-ratio {ratio:+.2f} ± {error:.2f}, posterior {match['posterior']:.4f}"
        )
    about = answer["diagnostics"]
    print(f"  {about['method']}: {about['reason']}")
    for warning in about["warnings"]:
        print(f"  note: {warning}")
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Compose two models that were trained apart, and measure it.")
    parser.add_argument("data", type=Path, help="the folder with the four tars")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the service (ISTHMUS_API_KEY if it needs one)"
    )
    parser.add_argument("--recipes", type=Path, default=HERE, help="the folder with pictures.json and sounds.json")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    tars = [options.data / f"{name}.tar" for name in TARS]
    for tar in tars:
        if not tar.is_file():
            fail(f"{options.data} has no {tar.name}")
    recipes = {name: json.loads((options.recipes / f"{name}.json").read_text()) for name in MODELS.values()}
    key = os.environ.get("ISTHMUS_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=options.url, headers=headers, timeout=PATIENCE_S, trust_env=False) as http:
        service = Service(http)
        print("data: images with captions, recordings with captions", flush=True)
        datasets = {tar.stem: service.upload(tar) for tar in tars}
        print("training two models, each on its own data", flush=True)
        for name, recipe in recipes.items():
            service.train(name, recipe, datasets)
        print("embedding what no model saw, and captions with both models", flush=True)
        ends = {
            modality: service.embed(model, datasets[f"{modality}-text-test"], modality)
            for modality, model in MODELS.items()
        }
        captions = {
            modality: service.embed(model, datasets["audio-text-train"], "text") for modality, model in MODELS.items()
        }
        print("comparing vectors of the two models", flush=True)
        refused = refuse(service, ends["audio"], ends["image"])
        print("composing", flush=True)
        found = measure(service, ends, captions)
        show(found, len(captions["audio"].z))
        answer = ask_once(service, datasets["audio-text-test"], ends["image"])
    if options.out:
        options.out.write_text(json.dumps({"refused": refused, "ways": found, "answer": answer}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except httpx.TransportError as error:
        fail(f"the service cannot be reached: {error}")
