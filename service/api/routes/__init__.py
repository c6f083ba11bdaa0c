"""ROUTERS, in the order of the docs page."""

from __future__ import annotations

from service.api.routes import artifacts, generate, health, jobs, reconstruct, results

ROUTERS = (generate.router, reconstruct.router, jobs.router, results.router, artifacts.router, health.router)
