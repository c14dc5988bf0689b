from __future__ import annotations

import io
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from service.contract.errors import Invalid, UnsupportedMedia
from service.contract.modality import (
    AudioTokens,
    ContinuousTokens,
    DiscreteTokens,
    ImageTokens,
    Medium,
    TextTokens,
    TokeniserConfig,
)
from service.contract.tokens import text
from service.contract.tokens.tokenise import (
    EncodedRaw,
    PixelsRaw,
    Raw,
    ReadyRaw,
    TextRaw,
    WaveRaw,
    build,
    num_tokens,
    payload_to_raw,
)

FILES = text.train([], TextTokens())
EXAMPLES: list[tuple[TokeniserConfig, Raw]] = [
    (ImageTokens(size=8, patch=4), PixelsRaw(np.arange(64, dtype=np.uint8).reshape(8, 8))),
    (TextTokens(), TextRaw("a seven")),
    (AudioTokens(windows=2), WaveRaw(np.sin(np.arange(30_000)).astype(np.float32), 16_000)),
    (DiscreteTokens(vocab=9, max_length=4), ReadyRaw(np.array([1, 2, 8]))),
    (ContinuousTokens(dim=2, max_length=4), ReadyRaw(np.array([[1.0, 2.0]]))),
]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(("config", "raw"), EXAMPLES, ids=lambda value: getattr(value, "kind", ""))
def test_a_tokeniser_gives_the_same_in_every_thread_and_process(config: TokeniserConfig, raw: Raw) -> None:
    tokeniser = build(config, FILES)
    expected = tokeniser(raw)
    elsewhere: list[list[np.ndarray]] = [pickle.loads(pickle.dumps(tokeniser))(raw)]
    threads = [threading.Thread(target=lambda: elsewhere.append(tokeniser(raw))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(elsewhere) == 5
    for sequences in elsewhere:
        assert all(np.array_equal(a, b) for a, b in zip(sequences, expected, strict=True))


def test_the_vocabulary_is_known_where_tokens_are_ids() -> None:
    assert [build(config, FILES).vocab_size for config, _ in EXAMPLES] == [None, 260, None, 9, None]


def test_tokens_are_counted_over_all_sequences() -> None:
    assert [num_tokens(build(config, FILES)(raw)) for config, raw in EXAMPLES] == [4, 9, 50, 3, 1]
    assert num_tokens([]) == 0


def test_samples_of_a_data_set_become_raw() -> None:
    assert payload_to_raw("image", b"x") == EncodedRaw(b"x")
    assert payload_to_raw("audio", b"x") == EncodedRaw(b"x")
    assert payload_to_raw("text", "é".encode()) == TextRaw("é")
    examples: list[tuple[Medium, np.ndarray]] = [
        ("discrete", np.arange(3)),
        ("continuous", np.ones((2, 3), np.float32)),
    ]
    for medium, array in examples:
        raw = payload_to_raw(medium, npy(array))
        assert isinstance(raw, ReadyRaw)
        assert np.array_equal(raw.array, array)


def test_samples_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(Invalid, match="UTF-8"):
        payload_to_raw("text", b"\xff")
    with pytest.raises(UnsupportedMedia, match="npy"):
        payload_to_raw("continuous", b"1,2,3")


def test_an_encoded_array_is_read_like_a_ready_one() -> None:
    tokeniser = build(ContinuousTokens(dim=3, max_length=4), {})
    assert tokeniser(EncodedRaw(npy(np.ones((2, 3)))))[0].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_tokens_need_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys, service.contract.tokens.read\n"
        "loaded = {'torch', 'fastapi', 'starlette', 'pyarrow', 'scipy', 'worker'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
