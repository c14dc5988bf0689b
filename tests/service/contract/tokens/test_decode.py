from __future__ import annotations

import io
import itertools
import resource
import struct
import sys
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.contract.errors import Invalid, RequestError, UnsupportedMedia
from service.contract.modality import AudioTokens, ImageTokens
from service.contract.tokens import decode
from service.contract.tokens.decode import DEFAULT_LIMITS, Limits
from service.contract.tokens.tokenise import EncodedRaw, WaveRaw, build

IMAGE = build(ImageTokens(size=16, patch=4), {})
SOUND = build(AudioTokens(), {})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A black one-bit PNG, written row by row so that a bomb costs its writer nothing."""
    deflate = zlib.compressobj(9)
    row = bytes((width + 7) // 8 + 1)
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def picture(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def sound(kind: str, subtype: str | None = None, *, num_samples: int = 8000, rate: int = 16_000) -> bytes:
    stream = io.BytesIO()
    samples = np.random.default_rng(0).standard_normal(num_samples) * 0.1
    soundfile.write(stream, samples.astype(np.float32), rate, format=kind, subtype=subtype)
    return stream.getvalue()


def wav(
    data: bytes = bytes(3200), *, channels: int = 1, rate: int = 16_000, bits: int = 16, claim: int | None = None
) -> bytes:
    """A WAV whose header says what we want it to say."""
    claimed = len(data) if claim is None else claim
    block = channels * bits // 8
    fmt = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    riff = min(claimed + 36, 0xFFFFFFFF)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + fmt + b"data" + struct.pack("<I", claimed) + data


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PICTURES = {"png": picture("PNG"), "jpeg": picture("JPEG"), "webp": picture("WEBP")}
SOUNDS = {
    "wav": sound("WAV", "PCM_16"),
    "flac": sound("FLAC"),
    "vorbis": sound("OGG", "VORBIS"),
    "opus": sound("OGG", "OPUS"),
    "mp3": sound("MP3"),
}


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (14_000, 14_000)])
def test_an_image_of_too_many_pixels_is_refused_by_its_header_alone(width: int, height: int) -> None:
    data = png(width, height)
    assert len(data) < 30_000
    before = peak_bytes()
    with pytest.raises(Invalid, match=rf"{width * height} pixels and the limit is 40000000") as caught:
        IMAGE(EncodedRaw(data))
    assert caught.value.code == "too_many_pixels"
    assert peak_bytes() - before < 10 << 20


def test_a_webp_canvas_is_refused_before_it_is_allocated() -> None:
    stream = io.BytesIO()
    frame = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    frame.save(stream, "WEBP", save_all=True, append_images=[Image.new("RGBA", (4, 4))])
    data = bytearray(stream.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_382).to_bytes(3, "little") * 2
    with pytest.raises(Invalid, match=r"16383 x 16383"):
        IMAGE(EncodedRaw(bytes(data)))


@pytest.mark.parametrize("lossless", [False, True])
def test_webp_sizes_are_read_from_every_kind_of_first_chunk(lossless: bool) -> None:
    data = picture("WEBP", lossless=lossless)
    with pytest.raises(Invalid, match=r"50 x 40 = 2000 pixels and the limit is 1999"):
        decode.picture(data, Limits(max_pixels=1999))
    assert decode.picture(data, Limits(max_pixels=2000)).size == (50, 40)


def test_a_strip_of_two_million_pixels_is_refused() -> None:
    with pytest.raises(Invalid, match=r"1 x 2000000.*32768 a side"):
        IMAGE(EncodedRaw(png(1, 2_000_000)))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_of_no_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(Invalid, match="nothing to see"):
        IMAGE(EncodedRaw(png(width, height)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_only_the_first_frame_of_an_animation_is_seen(kind: str) -> None:
    frames = [Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in range(200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    still, moving = io.BytesIO(), io.BytesIO()
    frames[7].save(still, kind, **options)
    frames[7].save(moving, kind, save_all=True, append_images=frames, **options)
    assert np.array_equal(IMAGE(EncodedRaw(moving.getvalue()))[0], IMAGE(EncodedRaw(still.getvalue()))[0])


@pytest.mark.parametrize("kind", PICTURES)
def test_a_truncated_image_is_invalid_wherever_it_ends(kind: str) -> None:
    data = PICTURES[kind]
    for end in [*range(12, 64), len(data) // 3, len(data) // 2, len(data) * 9 // 10]:
        with pytest.raises(Invalid):
            IMAGE(EncodedRaw(data[:end]))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "PDF", "ICO"])
def test_other_formats_of_image_are_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedMedia, match="PNG, JPEG or WebP"):
        IMAGE(EncodedRaw(picture(kind)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?><svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7\n",
        b"SIMPLE  =                    T",
        b"8BPS\0\1",
        b"RIFF\0\0\0\0AVI LIST",
        b"\0\0\0 ftypavif",
        b"GIF89a<script>",
    ],
)
def test_what_is_no_image_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia):
        IMAGE(EncodedRaw(data))


@pytest.mark.parametrize(
    ("kind", "name"), [(b"zTXt", b"Comment\0\0"), (b"iCCP", b"profile\0\0"), (b"iTXt", b"C\0\1\0\0\0")]
)
def test_a_compressed_bomb_beside_the_pixels_is_not_inflated(kind: bytes, name: bytes) -> None:
    bomb = chunk(kind, name + zlib.compress(bytes(100_000_000), 9))
    before = peak_bytes()
    with pytest.raises(Invalid):
        IMAGE(EncodedRaw(png(16, 16, bomb)))
    assert peak_bytes() - before < 20 << 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:Tag data larger:UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        b"\xff" * 1000,
        b"MM\0*\0\0\0\x08\xff\xff" + bytes(30),
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x0f\0\0\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\xff\xff\0\0\0\0\0\0",
        b"",
    ],
)
def test_a_broken_exif_block_does_not_spoil_the_picture(exif: bytes) -> None:
    plain = IMAGE(EncodedRaw(PICTURES["jpeg"]))[0]
    assert np.array_equal(IMAGE(EncodedRaw(picture("JPEG", exif=b"Exif\0\0" + exif)))[0], plain)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = picture("JPEG", progressive=True)
    end = data.rindex(b"\xff\xda")
    with pytest.raises(Invalid, match="100 scans"):
        IMAGE(EncodedRaw(data[:end] + data[end:-2] * 200 + data[-2:]))


@pytest.mark.parametrize("claim", [0xFFFFFFF0, 0x7FFFFFFF, 10_000])
def test_a_wav_gives_what_is_there_whatever_it_claims(claim: int) -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, 1600).astype("<i2").tobytes()
    honest = SOUND(EncodedRaw(wav(samples)))
    assert np.array_equal(SOUND(EncodedRaw(wav(samples, claim=claim)))[0], honest[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav(channels=0), "cannot be decoded"),
        (wav(channels=255), r"255 channels and the limit is 16"),
        (wav(rate=1_000_000_000), r"1000000000 Hz"),
        (wav(rate=10), r"10 Hz"),
        (wav(b""), "no samples"),
    ],
    ids=["0 channels", "255 channels", "1 GHz", "10 Hz", "0 samples"],
)
def test_an_absurd_wav_is_invalid(data: bytes, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        SOUND(EncodedRaw(data))


def test_one_sample_and_silence_are_sound() -> None:
    for data in (wav(b"\1\0"), wav(bytes(32_000)), sound("FLAC", num_samples=1)):
        assert np.isfinite(SOUND(EncodedRaw(data))[0]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_samples_that_are_not_finite_are_invalid(value: float) -> None:
    samples = np.zeros(100_000, np.float32)
    samples[90_000] = value
    stream = io.BytesIO()
    soundfile.write(stream, samples, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(Invalid, match="NaN"):
        SOUND(EncodedRaw(stream.getvalue()))


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_a_sound_over_the_limit_is_refused_with_both_numbers(kind: str, subtype: str | None) -> None:
    data = sound(kind, subtype, num_samples=24_000 * 20, rate=24_000)
    with pytest.raises(Invalid, match=r"at least \d+\.\d s and the limit is 10 s") as caught:
        build(AudioTokens(), {}, Limits(max_audio_s=10))(EncodedRaw(data))
    assert caught.value.code == "too_long"


def test_decoding_stops_at_the_limit() -> None:
    long = decode.sound(sound("FLAC", num_samples=1_000_000), Limits(max_audio_s=10))
    blocks: list[np.ndarray] = []
    with pytest.raises(Invalid):
        blocks.extend(long.blocks)
    seen = list(itertools.islice(decode.sound(sound("FLAC", num_samples=160_000), Limits(max_audio_s=10)).blocks, 9))
    assert sum(map(len, seen)) == 160_000
    assert max(map(len, seen)) <= decode.BLOCK


def test_samples_given_directly_are_limited_alike() -> None:
    limited = build(AudioTokens(), {}, Limits(max_audio_s=1))
    with pytest.raises(Invalid, match=r"lasts 2\.0 s and the limit is 1 s"):
        limited(WaveRaw(np.zeros(32_000, np.float32), 16_000))


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_truncated_sound_is_invalid_or_shorter(kind: str) -> None:
    data = SOUNDS[kind]
    for end in [*range(12, 48), len(data) // 3, len(data) // 2, len(data) - 20]:
        try:
            sequences = SOUND(EncodedRaw(data[:end]))
        except Invalid:
            continue
        assert all(np.isfinite(sequence).all() for sequence in sequences)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FORM\0\0\0\0AIFFCOMM",
        b"\0\0\0\x18ftypmp42",
        b"#EXTM3U\nhttp://127.0.0.1/\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"\xff\xf1\x50\x80" * 50,
        b"\x1aE\xdf\xa3webm",
        b"RIFF\0\0\0\0AVI LIST",
        b"MThd\0\0\0\6",
        b"caff\0\1\0\0",
    ],
    ids=["nothing", "aiff", "mp4", "playlist", "concat", "aac", "webm", "avi", "midi", "caf"],
)
def test_what_is_no_sound_that_we_read_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="WAV, FLAC, OGG"):
        SOUND(EncodedRaw(data))


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "G721_32"])
def test_rare_codecs_in_a_wav_are_unsupported(subtype: str) -> None:
    with pytest.raises(UnsupportedMedia, match=subtype):
        SOUND(EncodedRaw(sound("WAV", subtype)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_anywhere_is_an_error_of_the_request_or_finite_tokens(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*PICTURES, *SOUNDS]))
    damaged = bytearray((PICTURES | SOUNDS)[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        sequences = (IMAGE if kind in PICTURES else SOUND)(EncodedRaw(bytes(damaged)))
    except RequestError:
        return
    assert all(np.isfinite(sequence).all() for sequence in sequences)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    head=st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"ID3", b""]
    ),
    body=st.binary(max_size=200),
)
def test_noise_behind_a_signature_is_an_error_of_the_request(head: bytes, body: bytes) -> None:
    for tokeniser in (IMAGE, SOUND):
        with pytest.raises(RequestError):
            tokeniser(EncodedRaw(head + body))


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(7, dtype=np.int32),
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        np.arange(5, dtype=">i2"),
        np.zeros((0, 3), np.float16),
    ],
)
def test_an_npy_array_comes_back_as_it_was(array: np.ndarray, version: tuple[int, int]) -> None:
    read = decode.array(npy(array, version))
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)


def test_an_npy_array_is_never_unpickled_nor_made_larger_than_its_bytes() -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(Invalid, match="object"):
        decode.array(pickled.getvalue())
    honest = npy(np.zeros(1000, np.float32))
    with pytest.raises(Invalid, match=r"4000 bytes of data and its shape needs 39996"):
        decode.array(honest.replace(b"(1000,)", b"(9999,)"))
    with pytest.raises(Invalid):
        decode.array(honest[:100])
    with pytest.raises(Invalid, match="3996 bytes"):
        decode.array(honest[:-4])
    with pytest.raises(Invalid, match="complex"):
        decode.array(npy(np.zeros(4, np.complex64)))
    with pytest.raises(UnsupportedMedia):
        decode.array(b"PK\3\4")


def test_what_a_decoder_raises_becomes_invalid_and_what_we_raise_stays() -> None:
    for raised in (OSError("x"), SyntaxError("x"), MemoryError(), ZeroDivisionError()):
        with pytest.raises(Invalid, match="the thing cannot be decoded") as caught, decode.decoding("thing"):
            raise raised
        assert caught.value.__cause__ is raised
    with pytest.raises(UnsupportedMedia, match="ours"), decode.decoding("thing"):
        raise UnsupportedMedia("ours")
    with pytest.raises(KeyboardInterrupt), decode.decoding("thing"):
        raise KeyboardInterrupt


def test_the_limits_are_those_of_the_settings() -> None:
    assert Limits() == DEFAULT_LIMITS == Limits(max_pixels=40_000_000, max_audio_s=600.0)
