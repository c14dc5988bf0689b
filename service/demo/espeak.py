"""One espeak-ng synthesiser in a process of its own: `python -P -m service.demo.espeak`.

The library keeps one voice for a whole process and may crash with it, so it never lives in the process that asks.
Standard input is one JSON list of lines to say; standard output is an .npz of int16 samples, one array a line.
"""

from __future__ import annotations

import ctypes
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Values of speak_lib.h.
_SYNCHRONOUS: Final = 2
_DONT_EXIT: Final = 0x8000
_CHARS_UTF8: Final = 1
_RATE, _PITCH = 1, 3
_OK: Final = 0
_BUFFER_MS: Final = 200

_ON_SOUND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int16), ctypes.c_int, ctypes.c_void_p)


class SpeechUnavailable(RuntimeError):
    """espeak-ng cannot speak on this machine."""


@dataclass(frozen=True)
class Line:
    """What to say, and how: rate in words a minute (80 to 450), pitch from 0 to 100."""

    text: str
    voice: str
    rate: int
    pitch: int


def speak(lines: Sequence[Line]) -> tuple[list[NDArray[np.float32]], int]:
    """Say every line in a fresh process and return the sounds, shape (sample,) in [-1, 1], and their rate in Hz.

    Raises SpeechUnavailable where espeak-ng is not installed, lacks a voice or dies.
    """
    request = json.dumps([asdict(line) for line in lines]).encode()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "service.demo.espeak"],
        input=request,
        capture_output=True,
        check=False,
        start_new_session=True,  # Ctrl-C goes to the demo alone, which ends this process itself
    )
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise SpeechUnavailable(reason[-1] if reason else f"the synthesiser ended with {done.returncode}")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as archive:
        rate = int(archive["rate"])
        sounds = [archive[f"line{at}"].astype(np.float32) / 32768 for at in range(len(lines))]
    return sounds, rate


class _Synthesiser:
    """The library, loaded and set to write its samples into `_chunks`."""

    def __init__(self) -> None:
        try:
            import espeakng_loader  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]  # noqa: PLC0415
        except ImportError as error:
            msg = "there is no espeakng-loader wheel for this machine"
            raise SpeechUnavailable(msg) from error
        data = Path(espeakng_loader.get_data_path())
        self._variants = {path.name for path in (data / "voices" / "!v").iterdir()}
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        above = str(data.parent).encode()  # the library looks for espeak-ng-data in this folder
        self.rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, above, _DONT_EXIT)
        if self.rate <= 0:
            msg = f"espeak_Initialize answered {self.rate}"
            raise SpeechUnavailable(msg)
        self._chunks: list[NDArray[np.int16]] = []
        self._callback = _ON_SOUND(self._collect)  # kept: the library holds no reference to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_int16], count: int, _events: int | None) -> int:  # type: ignore[reportPrivateUsage]
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def say(self, line: Line) -> NDArray[np.int16]:
        """Say a line.

        Raises SpeechUnavailable if the voice is unknown: the library would go on in the voice of the line before.
        """
        self._chunks.clear()
        variant = line.voice.partition("+")[2]
        # "en+nobody" is answered with success and the plain voice, so the variant is looked up here.
        missing = variant and variant not in self._variants
        if missing or self._library.espeak_SetVoiceByName(line.voice.encode()) != _OK:
            msg = f"espeak-ng has no voice {line.voice!r}"
            raise SpeechUnavailable(msg)
        for parameter, value in ((_RATE, line.rate), (_PITCH, line.pitch)):
            if self._library.espeak_SetParameter(parameter, value, 0) != _OK:
                msg = f"espeak-ng refused parameter {parameter} = {value}"
                raise SpeechUnavailable(msg)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath is noise: the same in every run
        text = line.text.encode()
        answer = self._library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
        if answer != _OK or self._library.espeak_Synchronize() != _OK or not self._chunks:
            msg = f"espeak-ng did not say {line.text!r} in voice {line.voice!r}"
            raise SpeechUnavailable(msg)
        return np.concatenate(self._chunks)


def main() -> int:
    """Read the lines, say them, write the samples."""
    lines = [Line(**line) for line in json.load(sys.stdin.buffer)]
    try:
        synthesiser = _Synthesiser()
        sounds = {f"line{at}": synthesiser.say(line) for at, line in enumerate(lines)}
    except SpeechUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    archive = io.BytesIO()
    np.savez(archive, allow_pickle=False, rate=np.int64(synthesiser.rate), **sounds)
    sys.stdout.buffer.write(archive.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
