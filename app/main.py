"""The application: `create_app(settings)` puts it together, and nothing else happens here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from app import docs_page, errors, event_rows
from app.address import ReadableAddress
from app.body_limit import BodyLimit
from app.routes import admin, catalog, feedback, health, popular, recommendations, sessions, similar
from app.serving.service import build_service
from app.settings import Settings
from app.shortcut import Application, Shortcut
from app.telemetry import RequestCounts, RequestTelemetry

DESCRIPTION = """Post what people do, ask for what to show them, retrain when you like.

Every error is a problem document (RFC 9457) that names the field. Send an API key as `Authorization: Bearer …` or
`X-API-Key`; while no key exists, programs on the same machine may call without one."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application with state of its own; the settings come from the environment unless given."""
    settings = settings or Settings()
    service = build_service(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(1)  # several requests rank side by side; each on one core
        await run_in_threadpool(service.start)
        warming = asyncio.create_task(service.warming.run())
        yield
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await service.histories.finish()
        await run_in_threadpool(service.stop)

    app = Application(
        title="Shortlist",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.keys = service.keys
    errors.install(app)
    app.add_middleware(
        BodyLimit,
        limit=settings.max_body_bytes,
        larger=dict.fromkeys(catalog.IMPORT_PATHS, settings.max_import_bytes),
    )
    app.add_middleware(ReadableAddress)
    counts = RequestCounts(service.metrics, settings.access_log)
    app.add_middleware(RequestTelemetry, counts=counts)
    app.shortcut = Shortcut(service, counts)
    for routes in (recommendations, sessions, feedback, popular, similar, catalog, admin, health):
        app.include_router(routes.router)
    docs_page.install(app, schemas={"Event": event_rows.Event})
    return app
