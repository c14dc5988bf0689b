from __future__ import annotations

import re
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_the_page_and_all_it_loads_come_from_here_and_need_no_key(start: Any, database_url: str) -> None:
    async with start(database_url, host="0.0.0.0", api_key="isk_" + "0123456789abcdef" * 2) as api:
        page = (await api.get("/docs")).raise_for_status()
        wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(wanted) >= 3
        for path in wanted:
            assert path.startswith("/docs/assets/")
            assert (await api.get(path)).raise_for_status().content
        assert (await api.get("/openapi.json")).raise_for_status().json()["info"]["title"] == "Isthmus"
        assert (await api.get("/docs/assets/../../app.py")).status_code in {401, 404}


async def test_a_service_without_docs_has_none_of_it(start: Any, database_url: str) -> None:
    async with start(database_url, docs=False) as api:
        for path in ("/docs", "/docs/assets/swagger-ui.css", "/openapi.json"):
            assert (await api.get(path)).status_code == 404
