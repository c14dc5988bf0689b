"""Find the way through a maze by asking a service: which heading goes with a label that no heading was paired with?

    .venv/bin/isthmus serve                          # in one terminal
    .venv/bin/python docs/examples/mazes/run.py      # in another

States, actions and labels are plain tokens to Isthmus: a state is one vector of 2 values, a state with a heading one of
4, a label one id. One data set joins headings with the states that they led to, the other states with labels; the
recipe beside this file, `recipe.json`, trains both pairs, and every step of a walk is chosen by POST /v1/compose. The
mazes and walks are those of the experiment `mazes`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np

# The one example that imports from Isthmus: the mazes are not written twice. What is learned and asked goes over HTTP.
from worker.theory import mazes_policies as policies  # noqa: TID251
from worker.theory.mazes_ground import MAZES, Maze, draw_walks, state_actions  # noqa: TID251

RECIPE = Path(__file__).with_name("recipe.json")
METHODS = ("direct", "marginal")
NUM_WALKS = 3000
MAX_STEPS = 100
NOISE = math.radians(20)
SEED = 0


def fail(message: str) -> NoReturn:
    sys.exit(f"run.py: {message}")


class Service:
    """What the example asks of Isthmus."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """Return the document that answers a request."""
        response = self.http.request(method, f"/v1{path}", **request)
        if not response.is_success:
            fail(f"{method} {path} answered {response.status_code}: {response.text}")
        return response.json()

    def wait(self, job_id: str) -> None:
        """Wait for a job."""
        while (job := self.ask("GET", f"/jobs/{job_id}"))["status"] != "succeeded":
            if job["status"] in {"failed", "cancelled"}:
                fail(f"the {job['kind']} job has {job['status']}: {(job['error'] or {}).get('message', '')}")
            time.sleep(0.3)

    def upload(self, name: str, tar: bytes) -> str:
        """Upload a data set, wait until it is read, and return its id."""
        files = {"file": (f"{name}.tar", tar, "application/x-tar")}
        created = self.ask("POST", "/datasets", data={"name": name}, files=files)
        self.wait(created["job"]["id"])
        return created["id"]

    def train(self, recipe: dict[str, Any], datasets: dict[str, str], name: str) -> None:
        """Train the recipe on data sets, given by the names that it has for them."""
        pairs = [pair | {"dataset": datasets[pair["dataset"]]} for pair in recipe["pairs"]]
        job = self.ask("POST", "/jobs", json={"kind": "train", "name": name, "recipe": recipe | {"pairs": pairs}})
        self.wait(job["id"])

    def policy(self, model: str, maze: Maze, method: str) -> policies.Policy:
        """Return the policy that takes the heading which composition likes best."""
        targets = [tokens("label", [label]) for label in range(maze.num_labels)]

        def choose(positions: np.ndarray, labels: np.ndarray) -> np.ndarray:
            num = len(positions)
            acting = state_actions(np.repeat(positions, 8, 0), np.tile(policies.HEADINGS, num))
            question = {
                "model": model,
                "source": [tokens("state_action", [row]) for row in acting.tolist()],
                "target": targets,
                "method": method,
                "top_k": len(targets),
            }
            if method == "marginal":
                question["through"] = "state"
            answer = self.ask("POST", "/compose", json=question)
            scores = np.empty((num * 8, maze.num_labels))
            for each in answer["data"]:
                for match in each["matches"]:
                    scores[each["index"], match["index"]] = match["score"]
            return scores.reshape(num, 8, -1)[np.arange(num), :, labels].argmax(1)

        return choose


def tokens(modality: str, values: list[Any]) -> dict[str, Any]:
    """Write an item of ready tokens."""
    return {"modality": modality, "tokens": values}


def write_tar(columns: dict[str, np.ndarray]) -> bytes:
    """Write a WebDataset tar: one .npy for each modality of a sample."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for at, row in enumerate(zip(*columns.values(), strict=True)):
            for name, value in zip(columns, row, strict=True):
                content = io.BytesIO()
                np.save(content, value)
                member = tarfile.TarInfo(f"{at:06d}.{name}.npy")
                member.size = content.tell()
                tar.addfile(member, io.BytesIO(content.getvalue()))
    return out.getvalue()


def data_sets(maze: Maze, num_pairs: int, seed: int) -> dict[str, bytes]:
    """Draw the pairs of both data sets; one token is one item."""
    rng = np.random.default_rng(seed)
    walks = draw_walks(maze, NUM_WALKS, rng, lambda: None)
    acting, future = walks.draw(num_pairs, policies.REACH, rng)
    places = maze.draw_free(num_pairs, rng)
    labels = maze.labels_of(places)[np.arange(num_pairs), rng.integers(2, size=num_pairs)]
    one_token = np.float32
    return {
        "walks": write_tar(
            {"state_action": acting[:, None].astype(one_token), "state": future[:, None].astype(one_token)}
        ),
        "labels": write_tar({"state": places[:, None].astype(one_token), "label": labels[:, None].astype(np.int32)}),
    }


def measure(
    service: Service, maze: Maze, recipe: dict[str, Any], num_pairs: int, num_episodes: int
) -> dict[str, dict[str, float]]:
    """Upload, train, walk, and return what each policy reached."""
    print(f"data of {maze.name}: {num_pairs:,} pairs in each set; no heading is paired with a label", flush=True)
    datasets = {name: service.upload(name, tar) for name, tar in data_sets(maze, num_pairs, SEED).items()}
    print(f"training, {recipe['budget']['steps']:,} steps", flush=True)
    model = f"mazes-{maze.name}"
    service.train(recipe, datasets, model)
    rng = np.random.default_rng(SEED + 1)
    tasks = policies.draw_tasks(maze, num_episodes, MAX_STEPS, rng, noise=NOISE)
    chosen = {"random": policies.walk_at_random(rng)} | {each: service.policy(model, maze, each) for each in METHODS}
    found: dict[str, dict[str, float]] = {}
    for name, policy in chosen.items():
        episodes = policies.run(maze, tasks, policy, lambda: None)
        found[name] = {"success": episodes.success, "spl": episodes.spl(tasks)}
        print(f"  {name:9} success {episodes.success:.2f}, SPL {episodes.spl(tasks):.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Walk through a maze by composition over the API.")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the service (ISTHMUS_API_KEY if it needs one)"
    )
    parser.add_argument("--maze", choices=[maze.name for maze in MAZES], default="blank")
    parser.add_argument("--pairs", type=int, default=20_000, help="samples in each data set (%(default)s)")
    parser.add_argument("--steps", type=int, help="of training, instead of the recipe's")
    parser.add_argument("--episodes", type=int, default=50, help="walks to measure each method by (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    maze = next(each for each in MAZES if each.name == options.maze)
    recipe = json.loads(RECIPE.read_text())
    if options.steps:
        recipe["budget"]["steps"] = options.steps
    key = os.environ.get("ISTHMUS_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=options.url, headers=headers, timeout=120, trust_env=False) as http:
        found = measure(Service(http), maze, recipe, options.pairs, options.episodes)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except httpx.TransportError as error:
        fail(f"the service cannot be reached: {error}")
