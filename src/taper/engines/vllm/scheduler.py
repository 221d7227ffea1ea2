"""vLLM's own scheduler with TAPER deciding every step.

Usable as `--scheduler-cls taper.engines.vllm.scheduler.TaperScheduler`. One name for both modes: constructing
`TaperScheduler` under async scheduling gives the subclass of vLLM's AsyncScheduler (a plain Scheduler under
async scheduling would waste every other step). Five methods are overridden, each calls vLLM's own, and no
argument is interpreted that TAPER does not need.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from taper.config import ServerConfig
from taper.engines.vllm import compat
from taper.engines.vllm.regulator import Regulator
from taper.engines.vllm.seam import SchedulerSeam


class TaperScheduler(Scheduler):  # type: ignore[misc]
    """Stock scheduling with regulated branches; `taper` holds TAPER's state.

    Settings come from `ServerConfig.from_env`. Raises `SeamError` or `ConfigError` at start rather than run
    half regulated.
    """

    taper: Regulator

    def __new__(cls, *args: Any, **kwargs: Any) -> TaperScheduler:
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if cls is TaperScheduler and config.scheduler_config.async_scheduling:
            return object.__new__(AsyncTaperScheduler)
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_seams()  # before vLLM builds anything on them
        super().__init__(*args, **kwargs)
        compat.refuse_unsupported(self.vllm_config)
        try:
            seam = SchedulerSeam(self)
        except AttributeError as error:
            raise compat.missing_seam(error) from error
        self.taper = Regulator(seam, ServerConfig.from_env(), time.monotonic)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        enforced = self.taper.before_schedule()
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.taper.restore(enforced)
        self.taper.after_schedule(enforced, output)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        now_s = self.taper.clock()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        self.taper.after_update(scheduler_output, outputs, now_s)
        return outputs

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        # A known id is the next chunk of a streaming-input session.
        is_new = not self.taper.seam.is_known(request.request_id)
        result = super().add_request(request, *args, **kwargs)
        if is_new:
            self.taper.added(request)
        else:
            self.taper.continued(request)
        return result

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if request_ids is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        result = super().finish_requests(request_ids, *args, **kwargs)
        self.taper.aborted(request_ids)
        return result


class AsyncTaperScheduler(TaperScheduler, AsyncScheduler):  # type: ignore[misc]
    """`TaperScheduler` over vLLM's AsyncScheduler."""
