from __future__ import annotations

import numpy as np
import pytest

from service.contract.errors import Invalid
from service.contract.modality import ContinuousTokens, DiscreteTokens
from service.contract.tokens.tokenise import ReadyRaw, TextRaw, build

IDS = build(DiscreteTokens(vocab=10, max_length=4), {})
VECTORS = build(ContinuousTokens(dim=3, max_length=2), {})


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_ids_of_any_width_become_int32(dtype: type[np.generic]) -> None:
    (sequence,) = IDS(ReadyRaw(np.array([0, 9, 3], dtype)))
    assert sequence.dtype == np.int32
    assert sequence.tolist() == [0, 9, 3]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32, np.float64])
def test_vectors_of_any_type_become_float32(dtype: type[np.generic]) -> None:
    (sequence,) = VECTORS(ReadyRaw(np.array([[1, 2, 3], [4, 5, 6]], dtype)))
    assert sequence.dtype == np.float32
    assert sequence.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_single_vector_is_one_token() -> None:
    assert VECTORS(ReadyRaw(np.array([1.0, 2.0, 3.0])))[0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 10]), r"0 to 9.*to 10"),
        (np.array([-1, 0]), r"0 to 9.*-1"),
        (np.array([0.0, 1.0]), "whole numbers"),
        (np.zeros((2, 2), int), "flat list"),
        (np.zeros(0, int), "no tokens"),
        (np.zeros(5, int), r"5 tokens.*limit is 4"),
    ],
)
def test_ids_out_of_range_or_shape_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        IDS(ReadyRaw(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 4)), r"\(n, 3\), not \(2, 4\)"),
        (np.zeros(4), r"\(n, 3\), not \(4,\)"),
        (np.zeros((1, 1, 3)), r"\(n, 3\)"),
        (np.zeros((0, 3)), "no tokens"),
        (np.zeros((3, 3)), r"3 tokens.*limit is 2"),
        (np.full((1, 3), np.nan), "NaN"),
        (np.full((1, 3), np.inf), "NaN"),
        (np.full((1, 3), 1e39), "float32"),
    ],
)
def test_vectors_out_of_range_or_shape_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        VECTORS(ReadyRaw(values))


def test_sequences_that_are_too_long_are_cut_if_asked() -> None:
    assert IDS(ReadyRaw(np.arange(9)), truncate=True)[0].tolist() == [0, 1, 2, 3]
    assert VECTORS(ReadyRaw(np.zeros((7, 3))), truncate=True)[0].shape == (2, 3)


def test_text_is_no_sequence() -> None:
    with pytest.raises(Invalid, match="takes tokens"):
        IDS(TextRaw("1 2 3"))
