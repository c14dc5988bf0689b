from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from pydantic import TypeAdapter

from service.contract.modality import AudioTokens, DiscreteTokens, ImageTokens, TextTokens
from service.contract.tokens import audio, image, text, tokenise
from service.contract.tokens.tokenise import EncodedRaw, Tokeniser
from service.contract.towers import Augment
from worker.learning.augment import Augmenter, crop_box

RATE = 8000
PIXELS = ImageTokens(size=32, patch=8, channels=3)
SOUND = AudioTokens(sample_rate=RATE, window_s=1.0, mels=32, frames=2)


def augmenter(tokens: Any, **config: Any) -> Augmenter:
    return Augmenter(TypeAdapter[Any](Augment).validate_python(config), tokens, 5, "m")


def altered(one: Augmenter, tokeniser: Tokeniser, data: bytes, epoch: int, sample: int = 0) -> np.ndarray:
    """What a source does with an item."""
    rng = one.generator(epoch, sample)
    (found,) = one.altered(tokeniser(EncodedRaw(data), change=one.change(rng)), rng)
    return found


def png(pixels: np.ndarray, kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def gradient_picture(width: int = 48, height: int = 32) -> np.ndarray:
    """Red grows from left to right, green from top to bottom, blue is even."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def pixels_of(tokens: np.ndarray) -> np.ndarray:
    side, patch = PIXELS.size // PIXELS.patch, PIXELS.patch
    grid = tokens.reshape(side, side, patch, patch, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(PIXELS.size, PIXELS.size, 3).astype(np.float64)


def tone(seconds: float, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def wav(wave: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, RATE, format="WAV", subtype="FLOAT")
    return out.getvalue()


def test_what_is_drawn_follows_from_seed_epoch_sample_and_modality_alone() -> None:
    one, tokeniser, data = (
        augmenter(PIXELS, kind="image", crop=0.5),
        tokenise.build(PIXELS, {}),
        png(gradient_picture()),
    )
    first = altered(one, tokeniser, data, epoch=3, sample=7)
    altered(one, tokeniser, data, epoch=4, sample=7)
    assert np.array_equal(altered(one, tokeniser, data, epoch=3, sample=7), first)
    others = [
        altered(one, tokeniser, data, epoch=4, sample=7),
        altered(one, tokeniser, data, epoch=3, sample=8),
        altered(Augmenter(one.config, PIXELS, 6, "m"), tokeniser, data, epoch=3, sample=7),
        altered(Augmenter(one.config, PIXELS, 5, "n"), tokeniser, data, epoch=3, sample=7),
    ]
    assert not any(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(300, 100), (64, 64), (40, 200)])
def test_a_crop_keeps_its_share_lies_in_the_picture_and_is_not_too_thin(resize: Any, size: tuple[int, int]) -> None:
    tokens = PIXELS.model_copy(update={"resize": resize})
    left, top, right, bottom = image.whole_box(*size, tokens)
    area, aspect = (right - left) * (bottom - top), (right - left) / (bottom - top)
    rng = np.random.default_rng(0)
    shares: list[float] = []
    for _ in range(500):
        x, y, x_end, y_end = crop_box(*size, tokens, 0.4, rng)
        assert 0 <= x < x_end <= size[0]
        assert 0 <= y < y_end <= size[1]
        shares.append((x_end - x) * (y_end - y) / area)
        assert 3 / 4 - 1e-9 <= (x_end - x) / (y_end - y) / aspect <= 4 / 3 + 1e-9
    assert 0.4 - 1e-9 <= min(shares) < 0.45
    assert 0.95 < max(shares) <= 1 + 1e-9
    assert 0.65 < float(np.mean(shares)) < 0.75


def test_a_crop_shows_a_part_of_the_picture_at_full_size() -> None:
    one, tokeniser = augmenter(PIXELS, kind="image", crop=0.2), tokenise.build(PIXELS, {})
    data = png(gradient_picture(64, 64))
    for epoch in range(30):
        seen = pixels_of(altered(one, tokeniser, data, epoch))
        red, green = seen[..., 0], seen[..., 1]
        widths = np.ptp(red.mean(0)) / 255, np.ptp(green.mean(1)) / 255
        assert 0.12 < widths[0] * widths[1] <= 1.0  # a share of 0.2, less half a pixel on each side
        assert (np.diff(red.mean(0)) > -2).all()  # still from left to right


def test_half_of_the_pictures_are_mirrored() -> None:
    one, tokeniser = augmenter(PIXELS, kind="image", crop=1.0, flip=0.5), tokenise.build(PIXELS, {})
    data = png(gradient_picture())
    mirrored = 0
    for epoch in range(400):
        red = pixels_of(altered(one, tokeniser, data, epoch))[..., 0].mean(0)
        mirrored += int(red[0] > red[-1])
    assert 160 < mirrored < 240  # 4 deviations
    never = augmenter(PIXELS, kind="image", crop=0.9)
    for epoch in range(50):
        red = pixels_of(altered(never, tokeniser, data, epoch))[..., 0].mean(0)
        assert red[0] < red[-1]


def test_colours_change_by_up_to_what_is_asked_and_both_ways() -> None:
    one, tokeniser = augmenter(PIXELS, kind="image", crop=1.0, colour=0.3), tokenise.build(PIXELS, {})
    grey = np.full((32, 32, 3), 100, np.uint8)  # contrast and saturation leave an even grey as it is
    levels = [pixels_of(altered(one, tokeniser, png(grey), epoch)).mean() for epoch in range(200)]
    assert 69 <= min(levels) < 75
    assert 125 < max(levels) <= 131
    plain = pixels_of(tokeniser(EncodedRaw(png(gradient_picture())))[0])
    changed = [pixels_of(altered(one, tokeniser, png(gradient_picture()), epoch)) for epoch in range(50)]
    spreads = [float(np.std(one - one.mean(-1, keepdims=True))) for one in changed]
    assert min(spreads) < float(np.std(plain - plain.mean(-1, keepdims=True))) < max(spreads)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_transparent_pictures_are_altered_too(mode: str) -> None:
    tokens = PIXELS.model_copy(update={"resize": "pad"})
    one = augmenter(tokens, kind="image", crop=0.5, flip=0.5, colour=0.5)
    picture = Image.fromarray(gradient_picture()).convert(mode)
    seen = [altered(one, tokenise.build(tokens, {}), png(np.asarray(picture)), epoch) for epoch in range(5)]
    assert all(tokens_of.shape == (16, 192) for tokens_of in seen)
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize(("crop", "decoded"), [(1.0, 128), (0.25, 128), (0.01, 1024)])
def test_a_large_jpeg_is_decoded_finely_enough_for_a_small_crop(crop: float, decoded: int) -> None:
    data = png(gradient_picture(1024, 1024), "jpeg")
    one = augmenter(PIXELS, kind="image", crop=crop)
    change = one.change(one.generator(0, 0))
    sizes: list[tuple[int, int]] = []

    def fit(picture: Image.Image, tokens: ImageTokens) -> Image.Image:
        sizes.append(picture.size)
        assert change.fit is not None
        return change.fit(picture, tokens)

    tokenise.build(PIXELS, {})(EncodedRaw(data), change=replace(change, fit=fit))
    assert sizes == [(decoded, decoded)]


def test_a_window_shifts_within_a_long_sound_and_a_short_sound_within_its_window() -> None:
    one, tokeniser = augmenter(SOUND, kind="audio", shift_s=0.3), tokenise.build(SOUND, {})
    wave = np.zeros(3 * RATE, np.float32)
    wave[round(1.49 * RATE) : round(1.51 * RATE)] = tone(0.02)  # a click in the very centre
    places = [int(altered(one, tokeniser, wav(wave), epoch).mean(1).argmax()) for epoch in range(200)]
    centre = int(tokeniser(EncodedRaw(wav(wave)))[0].mean(1).argmax())
    moved = (np.array(places) - centre) * SOUND.frames * SOUND.hop_ms / 1000
    assert moved.min() < -0.25
    assert moved.max() > 0.25
    assert abs(moved).max() <= 0.32
    assert abs(float(moved.mean())) < 0.06
    short = wave[RATE : 2 * RATE]
    places = [int(altered(one, tokeniser, wav(short), epoch).mean(1).argmax()) for epoch in range(100)]
    assert min(places) < 13
    assert max(places) > 37
    assert all(len(altered(one, tokeniser, wav(short), epoch)) == 50 for epoch in range(5))


def test_a_shift_longer_than_the_sound_never_loses_all_of_it() -> None:
    one, tokeniser = augmenter(SOUND, kind="audio", shift_s=600.0), tokenise.build(SOUND, {})
    for seconds in (0.01, 0.4, 1.0, 5.0):
        for epoch in range(20):
            assert altered(one, tokeniser, wav(tone(seconds)), epoch).max() > audio.SILENCE


@pytest.mark.parametrize("noise_db", [0.0, 20.0])
def test_noise_is_as_far_below_the_sound_as_asked(noise_db: float) -> None:
    one = augmenter(SOUND, kind="audio", noise_db=noise_db)
    wave = tone(1.0)
    cut = one.change(one.generator(0, 0)).cut
    assert cut is not None
    (noisy,) = cut(wave, SOUND)
    assert noisy.dtype == np.float32
    measured = 20 * np.log10(wave.std() / (noisy - wave).std())
    assert abs(measured - noise_db) < 0.5
    (silent,) = cut(np.zeros(RATE, np.float32), SOUND)
    assert not silent.any()


def test_masks_cover_at_most_their_share_with_the_mean_of_the_picture() -> None:
    tokeniser = tokenise.build(SOUND, {})
    (plain,) = tokeniser(EncodedRaw(wav(tone(1.0) + 0.1 * tone(1.0, 1900))))
    levels = plain.reshape(-1, SOUND.mels)
    for what, axis, length in (("time", 1, len(levels)), ("mel", 0, SOUND.mels)):
        config = {f"{what}_masks": 2, f"{what}_share": 0.15}
        one = augmenter(SOUND, kind="audio", **config)
        assert not one.changes_media
        widths: list[int] = []
        for epoch in range(200):
            (found,) = one.altered([plain], one.generator(epoch, 0))
            masked = (np.abs(found.reshape(levels.shape) - levels.mean()) < 1e-6).all(axis)
            untouched = ~masked
            assert np.array_equal(
                np.compress(untouched, found.reshape(levels.shape), axis=1 - axis),
                np.compress(untouched, levels, axis=1 - axis),
            )
            widths.append(int(masked.sum()))
        most = int(0.15 * length)
        assert max(widths) <= 2 * most
        assert max(widths) > most
        assert 0.6 * most < float(np.mean(widths)) < 1.1 * most


def test_tokens_are_dropped_at_their_rate_in_order_and_specials_stay() -> None:
    config = TextTokens(max_length=64)
    vocabulary = text.load(text.train([], config))
    ids = text.encode("a photo of the number seven, taken by night", vocabulary, config, truncate=False)
    one = augmenter(config, kind="tokens", drop=0.3)
    kept: list[float] = []
    for epoch in range(300):
        (found,) = one.altered([ids], one.generator(epoch, 0))
        assert found[0] == text.START
        assert found[-1] == text.END
        rest = iter(ids.tolist())
        assert all(token in rest for token in found.tolist())  # a subsequence
        kept.append((len(found) - 2) / (len(ids) - 2))
    assert abs(float(np.mean(kept)) - 0.7) < 0.02


@pytest.mark.parametrize("drop", [0.5, 0.999])
def test_nothing_is_ever_dropped_whole(drop: float) -> None:
    one = augmenter(DiscreteTokens(vocab=9, max_length=4), kind="tokens", drop=drop)
    for epoch in range(200):
        found = one.altered([np.array([4, 5, 6]), np.array([7]), np.ones((2, 3))], one.generator(epoch, 0))
        assert [len(sequence) >= 1 for sequence in found] == [True] * 3
        assert set(found[0].tolist()) <= {4, 5, 6}
    of_text = augmenter(TextTokens(max_length=8), kind="tokens", drop=drop)
    for epoch in range(50):
        found = of_text.altered(
            [np.array([text.START, 80, text.END]), np.array([text.START, text.END])], of_text.generator(epoch, 0)
        )
        assert [sequence.tolist() for sequence in found] == [[text.START, 80, text.END], [text.START, text.END]]


def test_what_is_kept_in_memory_stays_as_it_is() -> None:
    tokens = np.random.default_rng(0).normal(size=(50, SOUND.dim)).astype(np.float32)
    before = tokens.copy()
    one = augmenter(SOUND, kind="audio", time_masks=3, mel_masks=3)
    one.altered([tokens], one.generator(0, 0))
    assert np.array_equal(tokens, before)
