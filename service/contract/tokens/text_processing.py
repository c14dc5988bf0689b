"""Text as an imported tower expects it: the checkpoint's own `tokenizer.json`, special ids, cut and padding.

Unlike in the checkpoint's own tokeniser a text that spells a special token out ("</s>") is only text.
"""

from __future__ import annotations

import string
from typing import Final, assert_never

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from service.contract.errors import Invalid
from service.contract.modality import TextTokens
from service.contract.processing import TextProcessing
from service.contract.tokens.decode import decoding

_WITHOUT_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def encode(
    text: str, tokenizer: Tokenizer, config: TextTokens, processing: TextProcessing, *, truncate: bool
) -> Int32[np.ndarray, " token"]:
    """Turn text into ids, the special ones around it and, if asked for, padding included.

    Raises Invalid naming both numbers, unless `truncate`, for text that is too long, and for text that the checkpoint's
    tokeniser cannot read.
    """
    if processing.lowercase:
        text = text.lower()
    if processing.canonical:
        text = " ".join(text.translate(_WITHOUT_PUNCTUATION).split())
    try:
        with decoding("text"):  # a stranger's tokeniser may have no id for what it does not know
            encoding = tokenizer.encode(text)
    except Invalid as error:
        raise Invalid("the model's own tokeniser cannot read the text", code="not_readable") from error
    ids, limit = np.asarray(encoding.ids, np.int32), config.max_length
    if len(ids) > limit:
        if not truncate:
            raise Invalid(f"the text has {len(ids)} tokens and the limit is {limit}", code="too_long")
        plain = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0)
        head, tail = ids[: plain[0]], ids[plain[-1] + 1 :]
        kept = max(0, limit - len(head) - len(tail))
        ids = np.concatenate([head, ids[plain[0] : plain[0] + kept], tail])
    if not len(ids) and processing.pad is None:
        raise Invalid("the text has no tokens", code="empty")
    return padded(ids, config, processing)


def plain_file(file: bytes) -> bytes:
    """Return a `tokenizer.json` without the truncation and the padding that its last user left in it.

    Raises what the library does if it is none.
    """
    tokenizer = Tokenizer.from_str(file.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.to_str().encode()


def fit(
    ids: Int32[np.ndarray, " token"], config: TextTokens, processing: TextProcessing, *, truncate: bool
) -> Int32[np.ndarray, " token"]:
    """Return ids that were made before, the special ones included: cut before the last of them, or padded.

    Raises Invalid naming both numbers, unless `truncate`, if there are too many.
    """
    limit = config.max_length
    if len(ids) > limit:
        if not truncate:
            raise Invalid(f"the text has {len(ids)} tokens and the limit is {limit}", code="too_long")
        ids = np.concatenate([ids[: limit - 1], ids[-1:]])
    return padded(ids, config, processing)


def padded(
    ids: Int32[np.ndarray, " token"], config: TextTokens, processing: TextProcessing
) -> Int32[np.ndarray, " token"]:
    """Fill up with the padding id, if the checkpoint was trained so."""
    missing = config.max_length - len(ids)
    match processing.pad:
        case None:
            return ids
        case "left":
            return np.pad(ids, (missing, 0), constant_values=processing.pad_id)
        case "right":
            return np.pad(ids, (0, missing), constant_values=processing.pad_id)
        case _:
            assert_never(processing.pad)
