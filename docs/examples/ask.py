"""Ask a running Isthmus about what training never saw: `python docs/examples/ask.py digits`.

The folder holds the tars that `isthmus demo --only-data` wrote; the service has a model by the name "digits".
"""

import base64
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx

URL = os.environ.get("ISTHMUS_URL", "http://127.0.0.1:8000") + "/v1"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def held_out(tar: Path, extension: str) -> list[tuple[str, str]]:
    """Return (class, base64 of the file) of every specimen that is held out."""
    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as members:
        for member in members:
            content = members.extractfile(member)
            if content is not None:
                key, _, kind = member.name.partition(".")
                files.setdefault(key, {})[kind] = content.read()
    return [
        (parts["cls"].decode(), base64.b64encode(parts[extension]).decode())
        for parts in files.values()
        if json.loads(parts["json"])["split"] == "holdout"
    ]


def ask(path: str, question: dict[str, Any]) -> list[dict[str, Any]]:
    """Post a question and return the answers, one for each item."""
    response = httpx.post(URL + path, json={"model": "digits"} | question, timeout=60)
    response.raise_for_status()
    return response.json()["data"]


def main(folder: Path) -> None:
    """Classify an image and a sound, then find the images that belong to the sound."""
    images = held_out(folder / "image-text.tar", "png")
    label, image = images[0]
    sound = next(sound for label, sound in held_out(folder / "audio-text.tar", "wav") if label == "seven")

    print("zero-shot, by what a caption would say")
    for what, item, template in (
        (f"an image of {label}", {"image": image}, "a handwritten {}"),
        ("the sound of seven", {"audio": sound}, "someone says {}"),
    ):
        (answer,) = ask("/classify", {"input": item, "labels": DIGITS, "templates": [template]})
        print(f"  {what}: {answer['prediction']}, with probability {answer['score']:.2f}")

    print("composed: the sound of seven among 100 images, none of which was ever paired with a sound")
    targets = [{"image": image} for _, image in images[:100]]
    (answer,) = ask("/compose", {"source": {"audio": sound}, "target": targets, "top_k": 5})
    for match in answer["matches"]:
        ratio, error = match["log_ratio"], match["standard_error"]
        label = images[match["index"]][0]
        print(f"  an image of {label}: posterior {match['posterior']:.3f}, log-ratio {ratio:+.2f} ± {error:.2f}")
    about = answer["diagnostics"]
    effective = about["effective_sample_size"]
    print(
        f"  {about['method']}, through {about['bridge_size']} samples of {about['through']}; {effective:.0f} effective"
    )
    for warning in about["warnings"]:
        print(f"  note: {warning}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits"))
