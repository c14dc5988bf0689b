from __future__ import annotations

import pickle
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.errors import Invalid
from service.contract.modality import TextTokens
from service.contract.tokens import text
from service.contract.tokens.tokenise import EncodedRaw, ReadyRaw, TextRaw, build

DRAW = random.Random(7)
WORDS = ["".join(DRAW.choices("abcdefghij", k=DRAW.randint(2, 7))) for _ in range(1500)]
CAPTIONS = [" ".join(DRAW.choices(WORDS, k=6)) for _ in range(1500)]
BYTES = text.train([], TextTokens(method="bytes", lowercase=False))
BPE = text.train(CAPTIONS, TextTokens(method="bpe", vocab=600, lowercase=False))
LONG = TextTokens(max_length=8192, lowercase=False)

any_text = st.text(st.characters(codec="utf-8", max_codepoint=0x2FFF), max_size=60)


def ids_of(string: str, files: dict[str, bytes], config: TextTokens = LONG, *, truncate: bool = False) -> list[int]:
    (sequence,) = build(config, files)(TextRaw(string), truncate=truncate)
    assert sequence.dtype == np.int32
    return sequence.tolist()


@pytest.mark.parametrize("files", [BYTES, BPE], ids=["bytes", "bpe"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(string=any_text)
def test_every_text_can_be_read_back(files: dict[str, bytes], string: str) -> None:
    tokeniser = build(LONG, files)
    (ids,) = tokeniser(TextRaw(string))
    assert ids[0] == text.START
    assert ids[-1] == text.END
    assert (ids[1:-1] >= 4).all()
    assert (ids < text.load(files).size).all()
    assert text.decode(ids, text.load(files)).lstrip(" ") == unicodedata.normalize("NFC", string).lstrip(" ")


def test_bytes_is_the_same_code_with_no_merges() -> None:
    assert build(LONG, BYTES).vocab_size == text.NUM_BYTE_IDS
    assert len(ids_of("seven", BYTES)) == 7
    assert len(ids_of("é", BYTES)) == 4
    assert len(set(ids_of("".join(map(chr, range(1, 128))), BYTES))) == 129


def test_merges_make_common_words_shorter() -> None:
    assert build(LONG, BPE).vocab_size == 600
    assert len(ids_of(CAPTIONS[0], BPE)) < len(ids_of(CAPTIONS[0], BYTES)) * 0.6


def test_the_same_captions_in_any_order_give_the_same_file() -> None:
    config = TextTokens(method="auto", vocab=800)
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    assert text.train(CAPTIONS, config) == text.train(iter(shuffled), config)
    assert build(config, text.train(shuffled, config)).vocab_size == 800


def test_auto_takes_bytes_until_there_are_a_thousand_distinct_words() -> None:
    def size(num_words: int) -> int | None:
        captions = [f"word{index} word{index}" for index in range(num_words)] * 3
        return build(LONG, text.train(captions, TextTokens(vocab=1000))).vocab_size

    assert size(text.AUTO_MIN_WORDS - 1) == text.NUM_BYTE_IDS
    assert (size(text.AUTO_MIN_WORDS) or 0) > text.NUM_BYTE_IDS


def test_captions_without_words_still_give_a_tokeniser() -> None:
    for method in ("auto", "bpe", "bytes"):
        files = text.train(["", " ", "\ud800"], TextTokens.model_validate({"method": method}))
        assert len(ids_of("hello", files)) >= 7


@pytest.mark.parametrize("string", ["", " ", "\t\n", "\u200b", "\u200b\ufeff", "\x00"])
def test_text_without_content_gives_a_short_sequence(string: str) -> None:
    for files in (BYTES, BPE):
        ids = ids_of(string, files)
        assert ids[0] == text.START
        assert ids[-1] == text.END
        assert len(ids) <= 10


def test_composed_and_decomposed_accents_are_one_text_and_case_is_one_if_asked() -> None:
    files = text.train(CAPTIONS, TextTokens(method="bpe", vocab=600))
    assert ids_of("Cafe\u0301", files) == ids_of("café", files)
    assert ids_of("Cafe\u0301", BPE) == ids_of("Café", BPE)
    assert ids_of("Café", BPE) != ids_of("café", BPE)


def test_a_word_is_the_same_token_at_the_start_and_within() -> None:
    word = CAPTIONS[0].split()[0]
    assert ids_of(word, BPE)[1:-1] == ids_of(f"{WORDS[1]} {word}", BPE)[-len(ids_of(word, BPE)) + 1 : -1]


@pytest.mark.parametrize("files", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_special_token_that_is_spelled_out_is_only_text(files: dict[str, bytes]) -> None:
    tokeniser = build(LONG, files)
    for ours in (tokeniser, pickle.loads(pickle.dumps(tokeniser))):
        (ids,) = ours(TextRaw("<pad><end> x <start><unknown>"))
        assert (ids[1:-1] >= 4).all()


def test_text_over_the_limit_is_refused_with_both_numbers_or_cut() -> None:
    config = TextTokens(max_length=8, lowercase=False)
    with pytest.raises(Invalid, match=r"12 tokens.*limit is 8") as caught:
        ids_of("abcdefghij", BYTES, config)
    assert caught.value.code == "too_long"
    assert ids_of("abcdefghij", BYTES, config, truncate=True) == ids_of("abcdef", BYTES, config)
    assert len(ids_of("abcdef", BYTES, config)) == 8


def test_a_book_costs_no_more_than_a_page() -> None:
    config = TextTokens(max_length=64, lowercase=False)
    book = "seven " * 5_000_000
    with pytest.raises(Invalid, match=r"30000000 characters.*64 tokens"):
        ids_of(book, BPE, config)
    assert ids_of(book, BPE, config, truncate=True) == ids_of(book[:400], BPE, config, truncate=True)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(Invalid, match="surrogate"):
        ids_of("a\ud800b", BPE)


def test_ids_made_before_come_through_as_they_are_or_cut_before_their_end() -> None:
    config = TextTokens(max_length=6)
    tokeniser = build(config, BYTES)
    ids = np.array([1, 70, 71, 2], np.int32)
    assert tokeniser(ReadyRaw(ids))[0].tolist() == ids.tolist()
    long = np.array([1, 70, 71, 72, 73, 74, 75, 2], np.int32)
    with pytest.raises(Invalid, match=r"8 tokens.*limit is 6"):
        tokeniser(ReadyRaw(long))
    assert tokeniser(ReadyRaw(long), truncate=True)[0].tolist() == [1, 70, 71, 72, 73, 2]
    assert long.tolist()[5] == 74


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, 260, 2]),
        np.array([1, -1, 2]),
        np.zeros((2, 2), np.int32),
        np.zeros(3, np.float32),
        np.zeros(0, int),
    ],
)
def test_ids_made_before_are_checked(values: np.ndarray) -> None:
    with pytest.raises(Invalid):
        build(LONG, BYTES)(ReadyRaw(values))


def test_what_is_no_text_and_no_tokeniser_is_refused() -> None:
    with pytest.raises(Invalid):
        build(LONG, BYTES)(EncodedRaw(b"hello"))
    with pytest.raises(Invalid, match=r"tokenizer\.json"):
        build(LONG, {})
    with pytest.raises(Invalid, match=r"tokenizer\.json"):
        build(LONG, {"tokenizer.json": b"{}"})
