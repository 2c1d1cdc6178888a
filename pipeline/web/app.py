"""The HTTP application over any backend: a `Service` in this process, or replicas elsewhere. No Ray in here."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from pipeline.serving.config import ServingConfig
from pipeline.serving.refusals import Refused
from pipeline.web import routes
from pipeline.web.errors import on_http, on_refused
from pipeline.web.gateway import Backend, Gateway
from pipeline.web.guard import Guard, Metrics


def make_app(backend: Backend, config: ServingConfig, metrics: Metrics | None = None) -> FastAPI:
    """The application. Its errors, whatever their cause, have the one schema of `Refused`."""
    app = FastAPI(title="raydiffusion", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, config=config, metrics=metrics)
    door = Gateway(backend, config, metrics)
    app.add_exception_handler(Refused, on_refused)
    app.add_exception_handler(HTTPException, on_http)
    routes.add_page(app)
    routes.add_health(app, backend)
    routes.add_models(app, backend)
    routes.add_generation(app, door)
    routes.add_likelihood(app, door)
    routes.add_encoding(app, door)
    return app
