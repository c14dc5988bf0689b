from __future__ import annotations

import numpy as np
import torch

from worker.learning.ragged import Ragged

ITEMS = [
    [np.array([1, 2, 3], np.int32)],
    [np.array([4], np.int32), np.array([5, 6], np.int32)],
    [np.array([7, 8], np.int32)],
]


def test_sequences_lie_end_to_end_and_remember_their_items() -> None:
    ragged = Ragged.from_sequences(ITEMS)
    assert ragged.values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert ragged.values.dtype == torch.int64
    assert ragged.lengths.tolist() == [3, 1, 2, 2]
    assert ragged.owners is not None
    assert ragged.owners.tolist() == [0, 1, 1, 2]
    assert ragged.num_items == 3


def test_items_of_one_sequence_need_no_owners() -> None:
    ragged = Ragged.from_sequences([ITEMS[0], ITEMS[2]])
    assert ragged.owners is None
    assert ragged.num_items == 2


def test_padding_is_zero_and_masked() -> None:
    padded, mask = Ragged.from_sequences(ITEMS).pad()
    assert padded.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0], [7, 8, 0]]
    assert mask.sum(1).tolist() == [3, 1, 2, 2]


def test_vectors_keep_their_type_and_equal_lengths_are_not_copied() -> None:
    pixels = [[np.full((2, 4), at, np.uint8)] for at in range(3)]
    ragged = Ragged.from_sequences(pixels)
    padded, mask = ragged.pad()
    assert padded.dtype == torch.uint8
    assert padded.shape == (3, 2, 4)
    assert padded.data_ptr() == ragged.values.data_ptr()
    assert mask.all()


def test_vectors_of_unequal_lengths_are_padded() -> None:
    padded, mask = Ragged.from_sequences([[np.ones((1, 2), np.float32)], [np.ones((3, 2), np.float32)]]).pad()
    assert padded[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_taken_items_are_those_that_were_put_in() -> None:
    order = [1, 2, 1, 0]
    taken = Ragged.from_sequences(ITEMS).take(order)
    expected = Ragged.from_sequences([ITEMS[at] for at in order])
    assert taken.values.tolist() == expected.values.tolist()
    assert taken.lengths.tolist() == expected.lengths.tolist()
    assert taken.owners is not None
    assert expected.owners is not None
    assert taken.owners.tolist() == expected.owners.tolist()


def test_taken_items_of_one_sequence_have_no_owners() -> None:
    taken = Ragged.from_sequences([ITEMS[0], ITEMS[2]]).take([1, 1])
    assert taken.values.tolist() == [7, 8, 7, 8]
    assert taken.owners is None
