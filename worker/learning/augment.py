"""Augmentations: how a training item is altered, anew in every epoch.

What is drawn for an item follows from (seed, epoch, sample, modality) alone, whoever reads it and when: a resumed run,
a loader process and a second encoding see the same. Evaluation, banks and serving read items as they are.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never, final

import numpy as np
from PIL import Image, ImageEnhance

from service.contract.modality import AudioTokens, TextTokens
from service.contract.tokens import audio, image
from service.contract.tokens.text import END, START
from service.contract.tokens.tokenise import UNCHANGED, Change
from service.contract.towers import AudioAugment, ImageAugment, TokenAugment

if TYPE_CHECKING:
    from jaxtyping import Float32

    from service.contract.modality import ImageTokens, TokeniserConfig
    from service.contract.towers import Augment

STREAM: Final = 0xA06  # keeps these draws apart from the order of the batches and from the banks
LEAST_ASPECT: Final = 3 / 4


@final
@dataclass(frozen=True)
class Augmenter:
    """Alters the items of one modality."""

    config: Augment
    tokens: TokeniserConfig
    seed: int
    modality: str

    @property
    def changes_media(self) -> bool:
        """Whether something happens before there are tokens, so that tokens made before are of no use."""
        match self.config:
            case ImageAugment():
                return True
            case AudioAugment(shift_s=shift_s, noise_db=noise_db):
                return shift_s > 0 or noise_db is not None
            case TokenAugment():
                return False
            case _:
                assert_never(self.config)

    def generator(self, epoch: int, sample: int) -> np.random.Generator:
        """Return what an item's changes are drawn from: first those of `change`, then those of `altered`."""
        return np.random.default_rng([self.seed, STREAM, epoch, sample, zlib.crc32(self.modality.encode())])

    def change(self, rng: np.random.Generator) -> Change:
        """Draw what happens to a picture or a sound before it becomes tokens."""
        match self.config:
            case ImageAugment() as config:
                return Change(fit=lambda picture, tokens: _view(picture, tokens, config, rng), zoom=config.crop**-0.5)
            case AudioAugment() as config if self.changes_media:
                return Change(cut=lambda wave, tokens: _windows(wave, tokens, config, rng))
            case AudioAugment() | TokenAugment():
                return UNCHANGED
            case _:
                assert_never(self.config)

    def altered(self, sequences: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Return tokens with masks, or with some left out; what is given stays as it is."""
        match self.config:
            case ImageAugment():
                return sequences
            case AudioAugment() as config:
                assert isinstance(self.tokens, AudioTokens)
                return [_masked(sequence, self.tokens, config, rng) for sequence in sequences]
            case TokenAugment(drop=drop):
                is_text = isinstance(self.tokens, TextTokens)
                return [_thinned(sequence, drop, rng, is_text=is_text) for sequence in sequences]
            case _:
                assert_never(self.config)


def _view(picture: Image.Image, tokens: ImageTokens, config: ImageAugment, rng: np.random.Generator) -> Image.Image:
    fitted = image.fitted_to(picture, tokens, crop_box(*picture.size, tokens, config.crop, rng))
    if rng.random() < config.flip:
        fitted = fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color) if config.colour else ():
        fitted = enhance(fitted).enhance(rng.uniform(1 - config.colour, 1 + config.colour))
    return fitted


def crop_box(width: int, height: int, tokens: ImageTokens, least: float, rng: np.random.Generator) -> image.Box:
    """Draw a box anywhere in a picture, of at least the share `least` of the area that is looked at by default.

    Its aspect lies between 3/4 and 4/3 of the default one's, as far as the picture reaches (Szegedy et al. 2015).
    """
    left, top, right, bottom = image.whole_box(width, height, tokens)
    base_width, base_height = right - left, bottom - top
    share = rng.uniform(least, 1.0)
    widest = min(1 / LEAST_ASPECT, (width / base_width) ** 2 / share)
    narrowest = max(LEAST_ASPECT, share * (base_height / height) ** 2)
    aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
    box_width = min(float(width), base_width * math.sqrt(share * aspect))
    box_height = min(float(height), base_height * math.sqrt(share / aspect))
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return (left, top, min(float(width), left + box_width), min(float(height), top + box_height))


def _windows(
    wave: Float32[np.ndarray, " sample"], tokens: AudioTokens, config: AudioAugment, rng: np.random.Generator
) -> list[Float32[np.ndarray, " sample"]]:
    """Cut the windows elsewhere, and add noise.

    A window moves within the sound. A sound that is no longer than its window moves itself, by half of its length at
    most: what leaves the window is lost, and silence comes in.
    """
    most = config.shift_s * tokens.sample_rate
    length = round(tokens.window_s * tokens.sample_rate)
    spare = len(wave) - length
    if spare > 0:
        shift = round(rng.uniform(-most, most))
        starts = [min(max(0, start + shift), spare) for start in audio.window_starts(len(wave), tokens)]
        cut = [wave[start : start + length] for start in starts]
    else:
        most = min(most, len(wave) / 2)
        cut = [_moved(wave, round(rng.uniform(-most, most)))]
    if config.noise_db is None:
        return cut
    below = 10 ** (-config.noise_db / 20)
    return [
        window + rng.standard_normal(len(window), np.float32) * np.float32(below * _level(window)) for window in cut
    ]


def _moved(wave: Float32[np.ndarray, " sample"], shift: int) -> Float32[np.ndarray, " sample"]:
    moved = np.zeros_like(wave)
    if shift >= 0:
        moved[shift:] = wave[: len(wave) - shift]
    else:
        moved[:shift] = wave[-shift:]
    return moved


def _level(window: Float32[np.ndarray, " sample"]) -> float:
    """Return the root of the mean square, the mean left out."""
    return float(window.std(dtype=np.float64)) if len(window) else 0.0


def _masked(
    sequence: Float32[np.ndarray, "token value"], tokens: AudioTokens, config: AudioAugment, rng: np.random.Generator
) -> Float32[np.ndarray, "token value"]:
    """Mask spans of time and bands of the log-mel picture with its mean (SpecAugment, Park et al. 2019)."""
    if not config.time_masks and not config.mel_masks:
        return sequence
    levels = sequence.reshape(-1, tokens.mels).copy()  # (frame, mel)
    mean = levels.mean(dtype=np.float64)
    for _ in range(config.time_masks):
        levels[_span(len(levels), config.time_share, rng)] = mean
    for _ in range(config.mel_masks):
        levels[:, _span(tokens.mels, config.mel_share, rng)] = mean
    return levels.reshape(sequence.shape)


def _span(length: int, share: float, rng: np.random.Generator) -> slice:
    width = int(rng.integers(0, int(share * length) + 1))
    start = int(rng.integers(0, length - width + 1))
    return slice(start, start + width)


def _thinned(sequence: np.ndarray, drop: float, rng: np.random.Generator, *, is_text: bool) -> np.ndarray:
    """Leave out tokens; of a text, start and end stay, and of anything, one token at least."""
    may_go = np.ones(len(sequence), bool) if not is_text else (sequence != START) & (sequence != END)
    goes = (rng.random(len(sequence)) < drop) & may_go
    if may_go.any() and (goes == may_go).all():
        goes[rng.choice(np.flatnonzero(may_go))] = False
    return sequence[~goes]
