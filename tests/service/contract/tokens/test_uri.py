from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.errors import Invalid
from service.contract.tokens.uri import DataUri, data_uri, strict_base64


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.binary(min_size=1, max_size=200))
def test_what_was_encoded_comes_back(data: bytes) -> None:
    encoded = base64.b64encode(data).decode()
    assert strict_base64(encoded) == data
    assert data_uri(f"data:image/png;base64,{encoded}") == DataUri("image/png", data)


@pytest.mark.parametrize(
    "string",
    ["", "aGk", "aGk==", "aGk=\n", " aGk=", "aG k=", "aGk=aGk=", "aG-_", "a", "=", "====", "aGé=", "aGk=\0", "!!!!"],
)
def test_base64_that_is_not_exactly_right_is_refused(string: str) -> None:
    with pytest.raises(Invalid):
        strict_base64(string)
    with pytest.raises(Invalid):
        assert data_uri(f"data:image/png;base64,{string}") is None


@pytest.mark.parametrize(
    "string",
    [
        "",
        "data:",
        "data: the new oil, they say",
        "data:,",
        "data:;base64,aGk=",
        "data:image,x",
        "data:image/png",
        "data:image/png;base64",
        " data:image/png;base64,aGk=",
        "see data:image/png;base64,aGk=",
        "data:image/png base64,aGk=",
        "data:a/b" + ";x=y" * 200 + ",hello",
    ],
)
def test_what_is_not_as_a_whole_a_data_uri_is_none(string: str) -> None:
    assert data_uri(string) is None


@pytest.mark.parametrize(
    ("string", "media_type", "data"),
    [
        ("data:text/plain,hello%20world", "text/plain", b"hello world"),
        ("data:text/plain;charset=utf-8,%C3%A9", "text/plain", "é".encode()),
        ("data:text/plain;charset=utf-8;base64,w6k=", "text/plain", "é".encode()),
        ("DATA:Image/PNG;BASE64,aGk=", "image/png", b"hi"),
        ("data:image/svg+xml;base64,aGk=", "image/svg+xml", b"hi"),
        ("data:text/plain,", "text/plain", b""),
    ],
)
def test_media_type_and_content_are_read(string: str, media_type: str, data: bytes) -> None:
    assert data_uri(string) == DataUri(media_type, data)


@pytest.mark.parametrize("content", ["hello world", "é", "a\nb"])
def test_percent_encoding_is_ascii_without_whitespace(content: str) -> None:
    with pytest.raises(Invalid, match="percent"):
        data_uri(f"data:text/plain,{content}")
