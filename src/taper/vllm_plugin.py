"""What vLLM loads: EngineCore methods (`vllm.general_plugins`) and routes (`vllm.endpoint_plugins`).

The first group is loaded by every vLLM process on the machine, with or without TAPER's scheduler, so it must
never break one. The second is loaded only where `VLLM_PLUGINS` names `taper`.
"""

from __future__ import annotations

import logging
from typing import Any

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
    """The endpoint plugin with the /taper and /v1/taper routes."""
    from taper.engines.vllm.routes import TaperEndpoints

    return TaperEndpoints()
