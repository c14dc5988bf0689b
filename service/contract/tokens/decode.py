"""Bounded decoding of encoded media, chosen by signature: the file's own bytes decide, never a name or a media type.

Images are PNG, JPEG and WebP; sounds are WAV, FLAC, OGG (Vorbis, Opus) and MP3; arrays are npy. Nothing else is handed
to a decoder. Whatever a decoder raises becomes `Invalid` in `decoding`, so a strange file is never a fault of ours.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import soundfile
from jaxtyping import Float32
from numpy.lib import format as npy
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.contract.errors import Invalid, IsthmusError, UnsupportedMedia

MAX_SIDE: Final = 32_768
MAX_JPEG_SCANS: Final = 100  # a progressive JPEG of many empty scans costs a pass over all pixels for each
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 768_000
MAX_CHANNELS: Final = 16
MAX_SAMPLE: Final = 2.0**31  # float files hold [-1, 1], or integers that nobody scaled
BLOCK: Final = 65_536  # frames that are decoded at once
ORIENTATION: Final = 0x0112
TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one item may cost."""

    max_pixels: int = 40_000_000
    max_audio_s: float = 600.0


DEFAULT_LIMITS: Final = Limits()


@contextmanager
def decoding(what: str) -> Generator[None]:
    """Turn whatever a decoder raises into Invalid."""
    try:
        yield
    except IsthmusError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, MemoryError
        raise Invalid(f"the {what} cannot be decoded: it is truncated or damaged", code="damaged") from error


def picture(data: bytes, limits: Limits, *, draft: int | None = None) -> Image.Image:
    """Decode the first frame of a PNG, JPEG or WebP, upright, in mode L, RGB or RGBA.

    16 bits become 8 by rounding, a palette becomes its colours, CMYK becomes RGB without its colour profile. EXIF
    orientation is applied. With `draft`, a JPEG that is larger is decoded at 1/2, 1/4 or 1/8, but never below that
    many pixels a side. Raises UnsupportedMedia for other signatures, Invalid for damaged or too large files.
    """
    with decoding("image"):
        image = _opened(data, limits)
        if draft is not None and isinstance(image, JpegImageFile):
            image.draft(None, (draft, draft))
        image.load()
        turn = TRANSPOSE.get(_orientation(image))
        flat = _eight_bits(image)
        return flat if turn is None else flat.transpose(turn)


def _opened(data: bytes, limits: Limits) -> PngImageFile | JpegImageFile | WebPImageFile:
    # The classes themselves instead of Image.open: no other format can come into play, and its bomb check, which only
    # warns up to twice its limit, gives way to ours, which names the numbers.
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if data[12:16] == b"IHDR" and len(data) >= 24:
            check_pixels(*struct.unpack(">II", data[16:24]), limits)
        image = PngImageFile(io.BytesIO(data))
    elif data.startswith(b"\xff\xd8\xff"):
        if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
            raise Invalid(f"the JPEG has more than {MAX_JPEG_SCANS} scans")
        image = JpegImageFile(io.BytesIO(data))
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        # The decoder allocates its canvas when it is made: look at the header before.
        check_pixels(*_webp_size(data), limits)
        image = WebPImageFile(io.BytesIO(data))
    else:
        raise UnsupportedMedia("an image is PNG, JPEG or WebP; this is none of them")
    check_pixels(*image.size, limits)
    return image


def _webp_size(data: bytes) -> tuple[int, int]:
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            (bits,) = struct.unpack("<I", data[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case _:
            raise Invalid("the WebP image has no known first chunk")


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Raise Invalid unless an image of this size may be decoded."""
    if width < 1 or height < 1:
        raise Invalid(f"the image is {width} x {height} pixels: there is nothing to see")
    if width * height > limits.max_pixels:
        raise Invalid(
            f"the image has {width} x {height} = {width * height} pixels and the limit is {limits.max_pixels}",
            code="too_many_pixels",
        )
    if max(width, height) > MAX_SIDE:
        raise Invalid(f"the image is {width} x {height} and the limit is {MAX_SIDE} a side", code="too_many_pixels")


def _orientation(image: Image.Image) -> int:
    # A camera's broken EXIF block is no reason to refuse its picture.
    try:
        value: object = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    match image.mode:
        case "I;16" | "I;16B" | "I;16L" | "I" | "F":  # 16-bit grey; rounded, so that white stays white
            levels = np.clip(np.rint(np.asarray(image, np.float64) / 257), 0, 255)
            return Image.fromarray(levels.astype(np.uint8))
        case "L" | "RGB" | "RGBA" if "transparency" not in image.info:
            return image  # as it is: a large picture should not lie in memory twice
        case _ if image.has_transparency_data:
            return image.convert("RGBA")
        case "L" | "1":
            return image.convert("L")
        case _:
            return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound that is decoded as it is read: mono blocks at the file's own rate."""

    sample_rate: int
    blocks: Iterator[Float32[np.ndarray, " sample"]]


def sound(data: bytes, limits: Limits) -> Sound:
    """Open a WAV, FLAC, OGG or MP3; its channels are averaged.

    The length is what the decoder finds, whatever the header claims. Raises UnsupportedMedia for other signatures and
    codecs, Invalid here or while the blocks are read for damaged, empty, too long or not finite sound.
    """
    formats = _sound_formats(data)
    with decoding("sound"):
        file = soundfile.SoundFile(io.BytesIO(data))
    rate, channels = file.samplerate, file.channels
    if file.format not in formats or file.subtype.split("_")[0] not in SUBTYPES:
        raise UnsupportedMedia(f"a sound in {file.format} with {file.subtype} is not read")
    check_rate(rate)
    if not 1 <= channels <= MAX_CHANNELS:
        raise Invalid(f"the sound has {channels} channels and the limit is {MAX_CHANNELS}")
    return Sound(rate, _blocks(file, limits))


SUBTYPES: Final = frozenset({"PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW", "VORBIS", "OPUS", "MPEG"})


def _sound_formats(data: bytes) -> frozenset[str]:
    head = data[:12]
    if head[:4] in {b"RIFF", b"RF64"} and head[8:] == b"WAVE":
        return frozenset({"WAV", "WAVEX", "RF64"})
    if head.startswith(b"fLaC"):
        return frozenset({"FLAC"})
    if head.startswith(b"OggS"):
        return frozenset({"OGG"})
    # MPEG audio starts with a tag, or with a frame: 11 bits of sync, layer III, and a bit rate and a rate that exist.
    if head.startswith(b"ID3") or (
        len(head) > 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3
    ):
        return frozenset({"MP3", "MPEG"})
    raise UnsupportedMedia("a sound is WAV, FLAC, OGG (Vorbis, Opus) or MP3; this is none of them")


def _blocks(file: soundfile.SoundFile, limits: Limits) -> Iterator[Float32[np.ndarray, " sample"]]:
    num_samples = 0
    with decoding("sound"), file:
        while (block := file.read(BLOCK, dtype="float32", always_2d=True)).shape[0]:
            num_samples += block.shape[0]
            check_seconds(num_samples, file.samplerate, limits, open_ended=True)
            check_samples(block)
            yield block.mean(axis=1, dtype=np.float64).astype(np.float32) if block.shape[1] > 1 else block[:, 0]
    if num_samples == 0:
        raise Invalid("the sound has no samples", code="empty")


def check_rate(rate: int) -> None:
    """Raise Invalid unless a sound can have this rate."""
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise Invalid(f"the sound's rate is {rate} Hz and must lie in {MIN_RATE_HZ} to {MAX_RATE_HZ}")


def check_seconds(num_samples: int, rate: int, limits: Limits, *, open_ended: bool = False) -> None:
    """Raise Invalid if a sound is too long; `open_ended` if there may be more of it."""
    if num_samples > limits.max_audio_s * rate:
        least = "at least " if open_ended else ""
        raise Invalid(
            f"the sound lasts {least}{num_samples / rate:.1f} s and the limit is {limits.max_audio_s:g} s",
            code="too_long",
        )


def check_samples(samples: np.ndarray) -> None:
    """Raise Invalid if samples are NaN, infinite, or too large to be sound."""
    # One comparison finds all three: NaN compares false.
    if not (np.abs(samples) <= MAX_SAMPLE).all():
        raise Invalid("the sound holds samples that are NaN, infinite or absurdly large", code="not_finite")


def array(data: bytes) -> np.ndarray:
    """Read an npy array of numbers; nothing in it is ever executed, and its size is checked before it is made.

    Raises UnsupportedMedia for another signature, Invalid for damaged files and for arrays of anything but numbers.
    """
    if not data.startswith(npy.MAGIC_PREFIX):
        raise UnsupportedMedia("an array is npy; this is not")
    with decoding("array"):
        stream = io.BytesIO(data)
        read_header = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise Invalid(f"an array holds integers or floats, not {dtype}")
        num_bytes, expected = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
        if num_bytes != expected:
            raise Invalid(f"the array has {num_bytes} bytes of data and its shape needs {expected}", code="damaged")
        values = np.frombuffer(data, dtype, offset=stream.tell())
        return values.reshape(shape, order="F" if fortran else "C")
