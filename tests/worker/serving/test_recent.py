from __future__ import annotations

from worker.serving.recent import Recent


def test_what_was_asked_for_least_recently_leaves_first() -> None:
    recent: Recent[str] = Recent(10)
    for key in "abc":
        recent.put(key, key.upper(), 3)
    assert recent.get("a") == "A"
    recent.put("d", "D", 4)
    assert [recent.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert recent.num_bytes == 10


def test_a_value_takes_the_place_of_the_former_one_and_too_large_a_one_keeps_nothing() -> None:
    recent: Recent[int] = Recent(10)
    recent.put("a", 1, 8)
    recent.put("a", 2, 9)
    assert (recent.get("a"), recent.num_bytes) == (2, 9)
    recent.put("b", 3, 11)
    assert (recent.get("a"), recent.get("b"), recent.num_bytes) == (2, None, 9)
    recent.put("a", 4, 11)
    assert (recent.get("a"), recent.num_bytes) == (None, 0)
