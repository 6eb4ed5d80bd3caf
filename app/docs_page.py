"""`/docs` without the internet: Swagger UI from files that a Python package carries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

ASSETS = Path(fastapi_offline.__file__).parent / "static"


def install(app: FastAPI, schemas: Mapping[str, type[BaseModel]]) -> None:
    """Serve the page at /docs and what it loads below it; build the application with `docs_url=None`.

    `schemas` are models that routes name in what they add to their description by hand.
    """
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            known = describe().setdefault("components", {}).setdefault("schemas", {})
            for name, model in schemas.items():
                known.setdefault(name, model.model_json_schema(ref_template="#/components/schemas/{model}"))
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]
    app.mount("/docs/assets", StaticFiles(directory=ASSETS), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        # Relative addresses, so that the page works behind a proxy that adds a prefix.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title}: HTTP interface",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
            swagger_ui_parameters={"tryItOutEnabled": True, "displayRequestDuration": True, "docExpansion": "list"},
        )
