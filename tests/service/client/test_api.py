from __future__ import annotations

from service.client.api import _lines, _server_sent


def test_events_are_read_however_their_bytes_arrive_and_whatever_characters_they_hold() -> None:
    stream = (
        ': keep-alive\n\nevent: event\nid: 7\ndata: {"a": "tick\u2028tock\x85"}\n\n'
        "id: 8\r\ndata: one\r\ndata:two\r\n\r\nevent: done\ndata: cut off"
    ).encode()
    wanted = [("event", "7", '{"a": "tick\u2028tock\x85"}'), ("message", "8", "one\ntwo")]
    for size in (1, 2, 7, len(stream)):
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert list(_server_sent(_lines(chunks))) == wanted
