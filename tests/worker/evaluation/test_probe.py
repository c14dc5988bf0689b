from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from service.contract.errors import Cancelled
from worker.evaluation import probe
from worker.evaluation.probe import Probe


def clusters(num: int, distance: float, seed: int, num_labels: int = 4) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_labels
    z = torch.randn(num, 6, generator=generator)
    z[:, :num_labels] += distance * torch.nn.functional.one_hot(labels, num_labels)
    return z, [f"label {label}" for label in labels.tolist()]


def measure(train: tuple[Tensor, list[str]], unseen: tuple[Tensor, list[str]]) -> Probe:
    found = probe.measure(train, unseen, 0, lambda: None)
    assert isinstance(found, Probe), found
    return found


def test_separable_classes_are_read_without_a_mistake() -> None:
    found = measure(clusters(200, 20.0, 0), clusters(100, 20.0, 1))
    assert found.accuracy.value == 1
    assert found.cross_entropy.value < 0.05
    assert found.chance == 0.25
    assert found.converged
    assert (found.num_train, found.num_labels, found.num_samples, found.num_left_out) == (200, 4, 100, 0)


def test_vectors_that_know_nothing_are_read_by_chance() -> None:
    found = measure(clusters(400, 0.0, 0), clusters(400, 0.0, 1))
    assert found.accuracy.standard_error is not None
    assert abs(found.accuracy.value - 0.25) < 4 * found.accuracy.standard_error
    assert found.cross_entropy.value == pytest.approx(math.log(4), abs=0.1)


def test_two_labels_and_other_units_are_no_special_case() -> None:
    train, unseen = clusters(200, 20.0, 0, num_labels=2), clusters(100, 20.0, 1, num_labels=2)
    found = measure((1e-6 * train[0] + 3, train[1]), (1e-6 * unseen[0] + 3, unseen[1]))
    assert found.accuracy.value == 1


def test_samples_without_a_known_label_are_left_out_and_counted() -> None:
    z, labels = clusters(40, 20.0, 1)
    labels[:3] = ["", "unheard of", ""]
    found = measure(clusters(200, 20.0, 0), (z, labels))
    assert (found.num_samples, found.num_left_out) == (37, 3)


def test_a_label_of_one_training_sample_is_a_label() -> None:
    z, labels = clusters(100, 20.0, 0)
    labels[0] = "rare"
    assert measure((z, labels), clusters(40, 20.0, 1)).num_labels == 5


def test_what_cannot_be_probed_has_its_reason() -> None:
    z, labels = clusters(40, 20.0, 0)
    assert probe.measure((z, ["one"] * 40), (z, labels), 0, lambda: None) == (
        "the training split has 1 label, a probe needs two"
    )
    assert probe.measure((z, labels), (z, [""] * 40), 0, lambda: None) == "no sample has a label of the training split"


def test_it_can_be_stopped_between_fits() -> None:
    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        probe.measure(clusters(40, 1.0, 0), clusters(40, 1.0, 1), 0, stop)
