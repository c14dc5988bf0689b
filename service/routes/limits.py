"""What a request may carry."""

from __future__ import annotations

from fastapi import APIRouter

from service.contract.settings import Settings
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


def limits_of(settings: Settings) -> Limits:
    """Show the limits among the settings."""
    return Limits.model_validate({name: getattr(settings, name) for name in Limits.model_fields})


@router.get("/limits", operation_id="get_limits", summary="Report the limits")
async def get_limits(service: Running, _caller: Reader) -> Limits:
    """Report what one request may carry, how many may wait, and for how long."""
    return limits_of(service.settings)
