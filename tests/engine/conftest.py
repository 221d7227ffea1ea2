"""One real server with the embedded model for all tests that talk to it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from taper.config import ServerConfig
from taper.core.types import Slo
from taper.engines.vllm.launch import Server
from taper.model import embedded_model

# A run that is terminated ends like one that is interrupted: servers are stopped and do not outlive it.
signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    log = folder / "vllm.log"
    # A tight SLO: on any machine some branches are deferred and some held.
    config = ServerConfig(slo=Slo(tpot_s=0.03), trace=str(folder / "trace.jsonl"))
    with Server(str(embedded_model()), config=config, embedded=True, log=log) as running:
        yield running
