from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from service.contract.samples import Samples, SampleWriter
from service.contract.store import Store
from service.previews import preview


def sound(kind: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(2000), 8000, format=kind)
    return out.getvalue()


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4)).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("medium", "payload", "media_type"),
    [
        ("audio", sound("WAV"), "audio/wav"),
        ("audio", sound("RF64"), "audio/wav"),
        ("audio", sound("FLAC"), "audio/flac"),
        ("audio", sound("OGG"), "audio/ogg"),
        ("audio", sound("MP3"), "audio/mpeg"),
        ("audio", b"ID3" + sound("MP3"), "audio/mpeg"),
        ("image", picture("PNG"), "image/png"),
        ("image", picture("JPEG"), "image/jpeg"),
        ("image", picture("WEBP"), "image/webp"),
    ],
)
def test_media_are_shown_as_what_their_bytes_are(
    store: Store, tmp_path: Path, medium: str, payload: bytes, media_type: str
) -> None:
    folder = tmp_path / "made"
    with SampleWriter(folder) as writer:
        writer.add("a", {"m": payload}, "", False)
        writer.close()
    store.publish(folder, "datasets/ds_a/1", kind="dataset", id="ds_a", body={"modalities": {"m": medium}})
    shown = preview(Samples(store.local("datasets/ds_a/1")), 0).items["m"]
    assert shown == f"data:{media_type};base64,{base64.b64encode(payload).decode()}"
