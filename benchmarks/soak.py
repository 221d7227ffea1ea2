"""Half an hour of overload on one server: does its memory stay flat, does anything fail, are the SLO classes kept?

    python benchmarks/soak.py [--minutes N] [--load X] [--stock] [--out PREFIX]

Serves the embedded model under policy `taper` and offers 1.5 times what fits the SLO, open loop: half of the requests
branch (half of those with n > 1, half in several tagged stages that fork and join), in three SLO classes that each
request claims; 5 % of the clients go away in mid-stream. Load, SLO and the bound on requests in service are found
as `taper bench` finds them. What waits longer than `--patience-s` at the client is rejected there (`taper.bench.soak`).

Every 5 s: memory, open files and threads of every process of the server, and what /metrics and /taper/state say. Writes
PREFIX.jsonl (a line per sample, then a line per minute, class and kind of request), PREFIX.json and PREFIX.png.

With `--stock` the load is found in the same way and then offered to a plain vLLM: what grows there is not ours.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np

from taper.bench import machine
from taper.bench.campaign import Campaign
from taper.bench.control import ControlClient, ControlError
from taper.bench.driver import Progress, WindowPlan, WindowResult, run_window
from taper.bench.measure import Target, switch
from taper.bench.pilot import measured_scale
from taper.bench.soak import SoakClient, by_class, by_minute, outcome, slope_of
from taper.engines.vllm.launch import exit_on_sigterm
from taper.fleet import STOCK, LocalFleet
from taper.goodput import summarize
from taper.workload import Branching, Lengths, Mix, Regime, Stage, Synthetic, contended
from taper.workload.mix import n_siblings
from taper.workload.regime import operating_point

CLASSES = {"interactive": 1.0, "standard": 1.5, "batch": 3.0}  # factors on the server's SLO: claims only loosen
CLASS_SHARES = ((0.3, CLASSES["standard"]), (0.2, CLASSES["batch"]))  # the others are interactive
SAMPLE_S = 5.0
RAMP_S = 10.0
DRAIN_S = 60.0
METRICS = (
    "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_preemptions_total",
    "vllm:generation_tokens_total", "taper:fallbacks_total", "taper:rejected_claims_total",
)  # fmt: skip
MEMORY = ("rss_mib", "pss_mib")


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfStaged(Branching):
    """Half of the branching requests as this says, half as `staged` does."""

    staged: Branching

    def __str__(self) -> str:
        return f"half {Branching.__str__(self)}, half {self.staged}"

    def stages(self, rng: np.random.Generator, own_tokens: int) -> tuple[Stage, ...]:
        if rng.random() < 0.5:
            return Branching.stages(self, rng, own_tokens)
        return self.staged.stages(rng, own_tokens)

    def scaled(self, factor: float) -> HalfStaged:
        return replace(self, branch=self.branch and self.branch.scaled(factor), staged=self.staged.scaled(factor))


STAGED = Branching(
    name="staged",
    stage=Lengths(low=20, high=40),
    fanout=Lengths(low=3, high=6),
    branch=Lengths(low=30, high=70),
)
SIBLINGS = n_siblings()
BRANCHING = HalfStaged(
    name="siblings", at_arrival=True, equal=True, fanout=SIBLINGS.fanout, branch=SIBLINGS.branch, staged=STAGED
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a soak found."""

    regime: Regime
    law_scale: float
    step_s: float
    result: WindowResult
    begin_s: float
    samples: list[dict[str, Any]]
    cpu: machine.CpuShare | None
    left_groups: int | None  # in the engine after the drain; None for a stock one, which has none


class Sampler:
    """Reads the server every few seconds and writes a line each time. A reading that fails is a line that says so.

    control: None for a stock server, which has no state of ours to ask for.
    """

    def __init__(
        self, control: ControlClient | None, http: httpx.AsyncClient, out: IO[str], progress: Progress
    ) -> None:
        self._control, self._http, self._out, self._progress = control, http, out, progress
        self._cpu = machine.read_cpu(())
        self.samples: list[dict[str, Any]] = []

    async def run(self, begin_s: float) -> None:
        while True:
            due_s = begin_s + SAMPLE_S * (len(self.samples) + 1)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            sample = await self._sample(time.monotonic() - begin_s)
            self.samples.append(sample)
            write_line(self._out, {"line": "sample", **sample})
            if len(self.samples) % 12 == 0:
                print(brief(sample), flush=True)

    async def _sample(self, at_s: float) -> dict[str, Any]:
        sample: dict[str, Any] = {"at_s": round(at_s, 1), "processes": await asyncio.to_thread(server_processes)}
        before, self._cpu = self._cpu, machine.read_cpu(())
        share = machine.cpu_share(before, self._cpu)
        sample["foreign_cpu"] = round(share.foreign, 3) if share else None
        sample |= {"in_service": self._progress.in_service, "waiting": self._progress.waiting}
        try:
            if self._control is not None:
                (state,) = await self._control.engines()
                sample |= {name: state["tables"][name] for name in ("groups", "branches", "pending_steps")}
                sample |= {"kv_usage": round(state["kv_usage"], 4), **state["totals"]}
                sample["scale"] = round(state["correction"]["scale"], 3)
            sample["metrics"] = metrics_of((await self._http.get("/metrics")).raise_for_status().text)
        except (ControlError, httpx.HTTPError) as error:
            sample["error"] = f"{type(error).__name__}: {error}"
        return sample


def brief(sample: dict[str, Any]) -> str:
    memory = ", ".join(f"{name} {one['rss_mib']:.0f} MiB" for name, one in sample["processes"].items())
    return (
        f"{sample['at_s']:6.0f} s  {memory}; groups {sample.get('groups')}, in service {sample['in_service']}, waiting"
        f" {sample['waiting']}, KV {sample.get('kv_usage')}, fallbacks {sample.get('fallbacks')}"
    )


def metrics_of(text: str) -> dict[str, float]:
    """Our choice of metrics, each summed over its labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z]+:\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        if name in METRICS:
            found[name] = round(found.get(name, 0.0) + float(value), 4)
    return found


def server_processes() -> dict[str, dict[str, float]]:
    """Memory, open files and threads of the processes below this one, by name: all of them are the server's."""
    found: dict[str, dict[str, float]] = {}
    for pid in sorted(machine.descendants(os.getpid())):
        with suppress(OSError):  # it ended while we looked
            folder = Path("/proc") / str(pid)
            name = re.search(r"\((.*)\)", (folder / "stat").read_text()).group(1)  # type: ignore[union-attr]
            if name in found:
                name = f"{name}-{pid}"
            kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (folder / "smaps_rollup").read_text(), re.MULTILINE))
            found[name] = {
                "rss_mib": round(int(kib["Rss"]) / 1024, 1),
                "pss_mib": round(int(kib["Pss"]) / 1024, 1),
                "fds": len(os.listdir(folder / "fd")),
                "threads": len(os.listdir(folder / "task")),
            }
    return found


async def found_regime(target: Target, fleet: LocalFleet, options: argparse.Namespace) -> tuple[Regime, float, float]:
    """(operating point, measured over calibrated step time, mean step of `off`), as `taper demo` finds them."""
    assert fleet.profile is not None
    assert target.control is not None
    law = fleet.profile.latency()
    source = Synthetic(
        mix=Mix(branching_share=options.branching_share, branching=BRANCHING, slo_classes=CLASS_SHARES)
    ).within(fleet.context_tokens)
    trial = Campaign(
        regime=contended(law, source=source, load=options.load),
        policies=("taper",),
        rounds=1,
        seed=options.seed,
        plan=WindowPlan(),
    )
    scale = await measured_scale(trial, law, client=target.client, control=target.control)
    law = law.corrected(scale=scale, prefill_scale=1.0)
    regime = contended(law, source=source, load=options.load)
    off = operating_point(law, regime.source.demand(), concurrency=regime.max_concurrency, eager=False)
    return regime, scale, off.step_s


async def soak(options: argparse.Namespace, out: IO[str]) -> Outcome:
    fleet = LocalFleet(
        model=None,
        vllm_args=(),
        dialogue="tokens",
        profile=None,
        profile_path=options.profile,
        log=Path(tempfile.mkdtemp(prefix="taper-soak-")) / "server.log",
        say=print,
    )
    async with fleet:
        regime, scale, step_s = await found_regime(await fleet.target("taper"), fleet, options)
        print(f"steps under load take {scale:.2f} x the law; {regime.reason}", flush=True)
        load_s = options.minutes * 60.0
        plan = WindowPlan(ramp_s=RAMP_S, measure_s=load_s - RAMP_S, drain_s=DRAIN_S)
        planned = tuple(regime.source.requests(seed=options.seed, rate_rps=regime.rate_rps, horizon_s=load_s))
        policy = STOCK if options.stock else "taper"
        target = await fleet.target(policy)
        control, url = target.control, target.client.base_url.removesuffix("/v1/")
        client = SoakClient(
            target.client, patience_s=options.patience_s, abort_share=options.abort_share, step_s=step_s
        )
        if control is not None:
            await switch(policy, regime.slo, control)
        progress, begin_s, before = Progress(), time.monotonic(), machine.read_cpu(())
        async with httpx.AsyncClient(base_url=url, timeout=30.0, trust_env=False) as http:
            sampler = Sampler(control, http, out, progress)
            sampling = asyncio.create_task(sampler.run(begin_s))
            result = await run_window(
                client, planned, regime=regime, plan=plan, policy=policy, round_=0, progress=progress
            )
            sampling.cancel()
        cpu = machine.cpu_share(before, machine.read_cpu(()))
        left = None
        if control is not None:
            await control.until_idle()
            left = sum(one["tables"]["groups"] for one in await control.engines())
    return Outcome(
        regime=regime, law_scale=scale, step_s=step_s, result=result, begin_s=begin_s, samples=sampler.samples, cpu=cpu,
        left_groups=left,
    )  # fmt: skip


def about() -> dict[str, Any]:
    """Of what a run was made; asked for before it starts, since half an hour later the tree may be another."""
    return {
        "schema": "taper.soak/1",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": machine.commit(),
        "machine": asdict(machine.describe()),
    }


def account(found: Outcome, options: argparse.Namespace) -> dict[str, Any]:
    """The summary: memory, errors, attainment, throughput."""
    regime, result = found.regime, found.result
    ends = Counter(outcome(one) or "answered" for one in result.records)
    whole = summarize(result.records, result.window)
    named = ("goodput_tok_s", "raw_tok_s", "ttft_p50_s", "ttft_p95_s", "ttft_sent_p50_s", "ttft_sent_p95_s",
             "tpot_p50_s", "tpot_p95_s", "itl_p99_s", "victims", "victim_tpot_p50_s", "victim_tpot_p95_s")  # fmt: skip
    return {
        "minutes": options.minutes,
        "warm_up_s": options.warm_up_s,
        "load": options.load,
        "rate_rps": regime.rate_rps,
        "concurrency": regime.max_concurrency,
        "slo_tpot_s": regime.slo.tpot_s,
        "classes": CLASSES,
        "patience_s": options.patience_s,
        "law_scale": found.law_scale,
        "reason": regime.reason,
        "mix": regime.source.describe(),
        "outcomes": dict(sorted(ends.items())),
        "unserved": result.unserved,
        "drained_s": result.drained_s,
        "attainment": by_class(result.records, CLASSES, slo_tpot_s=regime.slo.tpot_s, window=result.window),
        "served": {name: getattr(whole, name) for name in named},
        "memory": memory(found.samples, after_s=options.warm_up_s, until_s=options.minutes * 60.0),
        "counters": counters(found),
        "foreign_cpu": found.cpu.foreign if found.cpu else None,
        "client_cpu": found.cpu.client if found.cpu else None,
    }


def memory(samples: Sequence[dict[str, Any]], *, after_s: float, until_s: float) -> dict[str, dict[str, Any]]:
    """Per process: slopes of memory (MiB an hour), open files and threads while the load ran."""
    loaded = [one for one in samples if one["at_s"] <= until_s]
    names = dict.fromkeys(name for one in loaded for name in one["processes"])
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        held = [(one["at_s"], one["processes"][name]) for one in loaded if name in one["processes"]]
        times = [at_s for at_s, _ in held]
        found[name] = {"samples": len(held)}
        for quantity in (*MEMORY, "fds", "threads"):
            slope = slope_of(times, [one[quantity] for _, one in held], after_s=after_s)
            found[name][quantity] = asdict(slope) if slope else None
    return found


def counters(found: Outcome) -> dict[str, Any]:
    """What must be zero, and what must not grow."""
    read = [one for one in found.samples if "error" not in one]
    ours = [one for one in read if "groups" in one]  # none of a stock server's
    half = len(ours) // 2

    def most(name: str, some: Sequence[dict[str, Any]]) -> float:
        return max((one[name] for one in some), default=0)

    last = read[-1] if read else {}
    return {
        "samples": len(found.samples),
        "failed_samples": len(found.samples) - len(read),
        "steps": last.get("steps"),
        "fallbacks": last.get("fallbacks"),
        "rejected_claims": last.get("rejected_claims"),
        "preemptions": last.get("metrics", {}).get("vllm:num_preemptions_total"),
        **{
            f"{name}_most": [most(name, ours[:half]), most(name, ours[half:])]  # of either half of the run
            for name in ("groups", "branches", "pending_steps", "kv_usage")
        },
        "groups_after_drain": found.left_groups,
    }


def picture(found: Outcome, minutes: Sequence[dict[str, Any]]) -> bytes:
    """Memory over time, and attainment per minute and class, as a PNG."""
    import altair as alt  # of the extra `report`: the run itself needs neither
    import vl_convert

    held = [
        {"minute": one["at_s"] / 60, "process": name, "mib": process["rss_mib"]}
        for one in found.samples
        for name, process in one["processes"].items()
    ]
    x = alt.X("minute:Q", title="minute of the load")
    resident = [
        alt.Chart(alt.Data(values=[one for one in held if one["process"] == name]), title=name)
        .mark_line()
        .encode(x=x, y=alt.Y("mib:Q", title="resident, MiB", scale=alt.Scale(zero=False)))
        .properties(width=680, height=110)
        for name in dict.fromkeys(one["process"] for one in held)
    ]
    shares = [
        {"minute": one["minute"] + 0.5, "who": f"{one['class']}, {one['kind']}", "met": one["attainment"]}
        for one in minutes
        if one["attainment"] is not None
    ]
    order = [f"{name}, {kind}" for name in CLASSES for kind in ("serial", "branching")]
    colours = ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#7f7f7f")
    kept = (
        alt.Chart(alt.Data(values=shares), title="requests served within their SLO, per minute")
        .mark_line(point=True)
        .encode(
            x=x,
            y=alt.Y("met:Q", title="attainment", axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("who:N", title="class", scale=alt.Scale(domain=order, range=list(colours))),
        )
        .properties(width=680, height=200)
    )
    return vl_convert.vegalite_to_png(alt.vconcat(*resident, kept).to_json(), scale=1.5)


def write_line(out: IO[str], body: dict[str, Any]) -> None:
    out.write(json.dumps(body, separators=(",", ":")) + "\n")
    out.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up-s", type=float, default=300.0, help="left out of the slopes")
    parser.add_argument("--load", type=float, default=1.5, help="x what fits the SLO")
    parser.add_argument("--branching-share", type=float, default=0.5)
    parser.add_argument("--abort-share", type=float, default=0.05)
    parser.add_argument("--patience-s", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="soak a plain vLLM instead")
    parser.add_argument("--profile", type=Path, help="a latency profile; left out: the cached one, or a calibration")
    parser.add_argument("--out", type=Path, default=Path("soak"), metavar="PREFIX")
    options = parser.parse_args()
    exit_on_sigterm()
    made_of = about()
    with options.out.with_suffix(".jsonl").open("w", encoding="utf-8") as out:
        found = asyncio.run(soak(options, out))
        minutes = by_minute(found.result.records, CLASSES, slo_tpot_s=found.regime.slo.tpot_s, begin_s=found.begin_s)
        for row in minutes:
            write_line(out, {"line": "minute", **row})
    summary = made_of | account(found, options)
    options.out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".png").write_bytes(picture(found, minutes))
    print(json.dumps({name: summary[name] for name in ("outcomes", "served", "memory", "counters")}, indent=1))


if __name__ == "__main__":
    main()
