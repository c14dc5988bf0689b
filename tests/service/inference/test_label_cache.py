from __future__ import annotations

import numpy as np

from service.contract.items import TextItem
from service.inference.label_cache import ENTRY_BYTES, LabelCache

VECTOR = np.ones(8, np.float32)


def test_the_least_recently_used_prompt_makes_room() -> None:
    cache = LabelCache(max_bytes=2 * (VECTOR.nbytes + ENTRY_BYTES))
    cache.put(b"a", "text", VECTOR)
    cache.put(b"b", "text", VECTOR)
    assert cache.get(b"a") is not None
    cache.put(b"c", "text", VECTOR)
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    assert (cache.hits, cache.misses) == (3, 1)


def test_a_kept_vector_is_a_copy_of_its_row() -> None:
    cache = LabelCache()
    batch = np.zeros((3, 8), np.float32)
    cache.put(b"a", "text", batch[1])
    batch += 1
    found = cache.get(b"a")
    assert found is not None
    assert not found[1].any()


def test_a_prompt_is_known_by_its_content_its_model_and_how_it_is_cut() -> None:
    keys = {
        LabelCache.key(model, TextItem(text=text), truncate=truncate)
        for model in ("m", "n")
        for text in ("one", "two")
        for truncate in (True, False)
    }
    assert len(keys) == 8
    assert LabelCache.key("m", TextItem(text="one"), truncate=True) in keys
