"""What a request may carry."""

from __future__ import annotations

from fastapi import APIRouter

from service.contract.word import Word
from service.deps import Reader, Running

router = APIRouter(tags=["limits"], prefix="/v1")


class Limits(Word):
    """The limits of this service; a model's own are in its description."""

    max_body_bytes: int
    max_upload_bytes: int
    max_items: int
    max_tokens: int
    max_pixels: int
    max_audio_s: float
    max_waiting: int
    request_timeout_s: float


@router.get("/limits", operation_id="get_limits", summary="Report the limits")
async def get_limits(service: Running, _caller: Reader) -> Limits:
    """Report what one request may carry, how many may wait, and for how long."""
    settings = service.settings
    return Limits(
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_items=settings.max_items,
        max_tokens=settings.max_tokens,
        max_pixels=settings.max_pixels,
        max_audio_s=settings.max_audio_s,
        max_waiting=settings.max_waiting,
        request_timeout_s=settings.request_timeout_s,
    )
