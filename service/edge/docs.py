"""The documentation page, whole from this process: a closed network shows it like any other."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse

PAGE: Final = "/docs"
ASSETS: Final = "/docs/assets"


def add_docs(app: FastAPI) -> None:
    """Serve Swagger UI at /docs with scripts from an installed package, not from a content network."""
    package = find_spec("fastapi_offline")
    assert package is not None
    assert package.origin is not None
    app.mount(ASSETS, StaticFiles(directory=Path(package.origin).parent / "static"))

    @app.get(PAGE, include_in_schema=False)
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )
