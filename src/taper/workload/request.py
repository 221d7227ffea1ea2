"""The one request shape of bench and simulator."""

from __future__ import annotations

from dataclasses import dataclass, replace

from taper.core.types import ConfigError
from taper.records import Kind

Stage = tuple[int, ...]  # output tokens of each branch; one entry = a serial stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One logical request as the client sends it, with the lengths its answers will turn out to have.

    Its shape follows from (seed, index), whatever the policy and the load.
    """

    seed: int
    index: int
    arrival_s: float  # from the start of the run
    prompt_tokens: int
    stages: tuple[Stage, ...]
    slo_factor: float = 1.0  # on the run's TPOT SLO

    @property
    def tokens(self) -> int:
        """Output tokens of all branches of all stages."""
        return sum(map(sum, self.stages))

    @property
    def serial_tokens(self) -> int:
        return sum(stage[0] for stage in self.stages if len(stage) == 1)

    @property
    def critical_path_tokens(self) -> int:
        """Output tokens one after the other when every branch runs at once."""
        return sum(map(max, self.stages))

    @property
    def branches(self) -> int:
        """Branches of the widest stage."""
        return max(map(len, self.stages))

    @property
    def branching(self) -> bool:
        return self.branches > 1

    @property
    def kind(self) -> Kind:
        return "branching" if self.branching else "serial"

    @property
    def context_sum_tokens(self) -> float:
        """Sum over the output tokens of the context each is computed with."""
        prefix, total = float(self.prompt_tokens), 0.0
        for stage in self.stages:
            total += sum(prefix * tokens + tokens * tokens / 2 for tokens in stage)
            prefix += sum(stage)
        return total

    def part(self, stage: int) -> Request:
        """One stage as a request of its own."""
        return replace(self, stages=self.stages[stage : stage + 1])

    @property
    def join_tokens(self) -> int:
        """Output tokens that a join has to compute again: all but those of the longest branch."""
        return sum(sum(stage) - max(stage) for stage in self.stages[:-1])

    @property
    def peak_context_tokens(self) -> int:
        """Longest context of any branch, with one token of branch header for each branch of a fork."""
        prefix = peak = self.prompt_tokens
        for stage in self.stages:
            headers = len(stage) if len(stage) > 1 else 0
            peak = max(peak, prefix + headers + max(stage))
            prefix += headers + sum(stage)
        return peak

    def fitted(self, context_tokens: int) -> Request:
        """The request, shrunk as a whole where it would outgrow a model's context of `context_tokens`.

        Raises ConfigError where not even one token per branch fits.
        """
        factor, fit = 1.0, self
        for _ in range(64):
            if fit.peak_context_tokens <= context_tokens:
                return fit
            # headers and the floor of one token do not shrink, so one round need not be enough
            factor *= min(0.98, context_tokens / fit.peak_context_tokens)
            stages = tuple(tuple(max(1, int(tokens * factor)) for tokens in stage) for stage in self.stages)
            fit = replace(self, prompt_tokens=max(1, int(self.prompt_tokens * factor)), stages=stages)
        raise ConfigError(f"request {self.index}: {self.stages} fits no context of {context_tokens} tokens")
