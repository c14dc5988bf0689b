from __future__ import annotations

from typing import Any

import numpy as np

from worker.learning import data
from worker.learning.heldout import payload_classes


def test_a_finished_run_reports_held_out_recall_and_the_floor_of_its_loss(trained: Any) -> None:
    body = trained.store.manifest(trained.inputs["model_a"]["artifact"]).body
    metrics = body["metrics"]
    assert {
        "holdout_recall@1/imu->text",
        "holdout_recall@1/text->imu",
        "holdout_recall@1/codes->text",
        "holdout_recall@1/text->codes",
        "loss_floor/imu+text",
        "loss_floor/codes+text",
    } <= metrics.keys()
    # 16 captions, of which a model can tell the word but not the article: 1/16 by chance, about 1/2 at best.
    assert metrics["holdout_recall@1/imu->text"] > 0.3
    assert 0.5 < metrics["loss_floor/imu+text"] < metrics["loss/imu+text"]


def test_samples_with_the_same_payload_share_a_number(bench: Any) -> None:
    dataset = data.open_dataset("ds_imu", bench.context("job_payloads"))
    indices = np.arange(48)
    captions = [dataset.samples.payload("text", index) for index in range(48)]
    numbers = payload_classes(dataset, "text", indices).tolist()
    assert len(set(numbers)) == len(set(captions)) == 16
    for at in range(48):
        assert [number == numbers[at] for number in numbers] == [caption == captions[at] for caption in captions]
