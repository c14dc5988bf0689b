"""Text to ids: byte-level BPE learned from the captions, or bytes, both as one `tokenizer.json`.

Ids 0 to 3 are pad, start, end and unknown, 4 to 259 the 256 bytes, the rest merges. Every text has an encoding, and a
text that spells a special token out ("<end>") is only text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Sequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from service.contract.errors import Invalid
from service.contract.modality import TextTokens
from service.contract.tokens import text_processing
from service.contract.tokens.decode import decoding

FILE: Final = "tokenizer.json"
PAD, START, END, UNKNOWN = range(4)
SPECIAL: Final = ["<pad>", "<start>", "<end>", "<unknown>"]
NUM_BYTE_IDS: Final = 260
AUTO_MIN_WORDS: Final = 1000
NFC_GROWTH: Final = 4  # the most characters that canonical composition makes into one


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A loaded `tokenizer.json`."""

    tokenizer: Tokenizer
    file: bytes
    size: int
    longest: int  # bytes in the longest entry

    def __reduce__(self) -> tuple[object, ...]:
        # The library forgets on the way through pickle that special tokens in text are text.
        return load, ({FILE: self.file},)


def train(captions: Iterable[str], config: TextTokens) -> dict[str, bytes]:
    """Learn the vocabulary of a set of captions, in any order; returns the tokeniser's files.

    `auto` learns merges when the captions hold at least 1,000 distinct words: with fewer, merges would swallow whole
    words, and the bytes that a new word is spelled with would never be trained. A merge is seen at least twice.
    Captions that are not Unicode text (lone surrogates) are passed over.
    """
    merges = config.method == "bpe"
    texts = (text for text in captions if _is_unicode(text))
    if config.method == "auto":
        words: set[str] = set()
        read: list[str] = []
        for text in texts:
            read.append(text)
            words.update(text.lower().split())
            if len(words) >= AUTO_MIN_WORDS:
                merges = True
                break
        texts = itertools.chain(read, texts)
    tokenizer = Tokenizer(BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = Sequence([NFC(), Lowercase()] if config.lowercase else [NFC()])
    # The prefix space makes a word the same token at the start of a text and within it.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=merges)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=config.vocab if merges else NUM_BYTE_IDS,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if merges else (), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[START]} $A {SPECIAL[END]}",
        special_tokens=[(SPECIAL[START], START), (SPECIAL[END], END)],
    )
    return {FILE: tokenizer.to_str().encode()}


def load(files: Mapping[str, bytes]) -> Vocabulary:
    """Read the files that `train` returned.

    Raises Invalid if they are not a tokeniser's.
    """
    if FILE not in files:
        raise Invalid(f"a text tokeniser needs its {FILE}")
    with decoding(FILE):
        tokenizer = Tokenizer.from_str(files[FILE].decode())
        tokenizer.encode_special_tokens = True
        entries = tokenizer.get_vocab(with_added_tokens=True)
        return Vocabulary(tokenizer, files[FILE], max(entries.values()) + 1, max(map(len, entries)))


def encode(text: str, vocabulary: Vocabulary, config: TextTokens, *, truncate: bool) -> Int32[np.ndarray, " token"]:
    """Turn text into ids, start and end included.

    Raises Invalid for lone surrogates, and, unless `truncate`, for text that is too long.
    """
    if not _is_unicode(text):
        raise Invalid("the text holds a lone surrogate, which is not Unicode text")
    # No token stands for more bytes than the longest entry has, so what lies beyond cannot matter: a book costs no more
    # than a page.
    most = config.max_length * vocabulary.longest * NFC_GROWTH
    if len(text) > most:
        if not truncate:
            raise Invalid(
                f"the text has {len(text)} characters and the limit is {config.max_length} tokens, "
                f"never more than {most} characters",
                code="too_long",
            )
        text = text[:most]
    if config.processing is not None:
        return text_processing.encode(text, vocabulary.tokenizer, config, config.processing, truncate=truncate)
    ids = np.asarray(vocabulary.tokenizer.encode(text).ids, np.int32)
    return fit(ids, config, truncate=truncate)


def fit(ids: Int32[np.ndarray, " token"], config: TextTokens, *, truncate: bool) -> Int32[np.ndarray, " token"]:
    """Return ids that are not too long, cut before their end token if `truncate` allows it.

    Raises Invalid naming both numbers.
    """
    if len(ids) <= config.max_length:
        return ids
    if not truncate:
        raise Invalid(f"the text has {len(ids)} tokens and the limit is {config.max_length}", code="too_long")
    cut = ids[: config.max_length].copy()
    if ids[-1] == END:
        cut[-1] = END
    return cut


def ready(
    ids: np.ndarray, vocabulary: Vocabulary, config: TextTokens, *, truncate: bool
) -> Int32[np.ndarray, " token"]:
    """Check ids that were made before, start and end included.

    Raises Invalid naming what differs.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise Invalid("text tokens are a flat list of ids")
    if ids.min() < 0 or ids.max() >= vocabulary.size:
        raise Invalid(f"text ids lie in 0 to {vocabulary.size - 1}; there is {ids.min()} to {ids.max()}")
    ids = ids.astype(np.int32, copy=False)
    if config.processing is not None:
        return text_processing.fit(ids, config, config.processing, truncate=truncate)
    return fit(ids, config, truncate=truncate)


def decode(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """Read ids back as the text that they were made from, normalised; special tokens are left out."""
    text = vocabulary.tokenizer.decode([int(one) for one in ids], skip_special_tokens=True)
    pre_tokenizer = vocabulary.tokenizer.pre_tokenizer
    return text.removeprefix(" ") if isinstance(pre_tokenizer, ByteLevel) and pre_tokenizer.add_prefix_space else text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
