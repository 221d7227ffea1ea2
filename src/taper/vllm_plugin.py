"""What vLLM loads: EngineCore methods (`vllm.general_plugins`) and routes (`vllm.endpoint_plugins`).

The first group is loaded by every vLLM process on the machine, with or without TAPER's scheduler, so it must
never break one. The second is loaded only where `VLLM_PLUGINS` names `taper`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from taper.engines.vllm.routes import TaperEndpoints
    from taper.forkjoin.routes import ProgramRoutes

logger = logging.getLogger(__name__)


def install() -> None:
    """Add taper_snapshot, taper_live, taper_configure and taper_drain_steps to EngineCore. Idempotent.

    They answer {"error": ...} (or no steps) on an engine with another scheduler.
    """
    try:
        from taper.engines.vllm import compat, control

        control.install(compat.engine_core_class())
    except Exception as error:
        # Not ours to refuse: TaperScheduler checks its seams itself, and this engine may not use it.
        logger.warning("TAPER's engine methods are not available: %s", error)


def endpoints() -> Any:
    """The endpoint plugin: the /taper and /v1/taper routes, and fork and join on top of this server's engine."""
    from taper.config import ServerConfig
    from taper.engines.vllm.routes import TaperEndpoints
    from taper.forkjoin.routes import ProgramRoutes

    control = TaperEndpoints()
    return Endpoints(control, ProgramRoutes(ServerConfig.from_env(), control.terms.slo))


class Endpoints:
    """Both sets of routes as one plugin. A server without an engine answers their requests with 503."""

    name = "taper"
    required_tasks = None

    def __init__(self, control: TaperEndpoints, programs: ProgramRoutes) -> None:
        self._control = control
        self._programs = programs

    def attach_router(self, app: FastAPI) -> None:
        from taper.engines.vllm.programs import ChatSwitch
        from taper.forkjoin.routes import CHAT_PATH

        self._control.attach_router(app)
        self._programs.attach_router(app)
        app.add_middleware(ChatSwitch, path=CHAT_PATH)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        from prometheus_client import REGISTRY

        from taper.engines.vllm import compat
        from taper.engines.vllm.programs import ProgramMetrics, VllmEngine
        from taper.forkjoin.service import COUNTS

        await self._control.init_state(engine_client, state, args)
        if engine_client is not None:
            metrics = ProgramMetrics(COUNTS, REGISTRY, model=compat.served_model(engine_client))
            self._programs.serve(VllmEngine(engine_client, args), metrics.add)
