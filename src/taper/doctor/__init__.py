"""`taper doctor`: what is installed, what will not work here, and what to do about it."""

from taper.doctor.check import Check
from taper.doctor.report import exit_code, render, run_checks

__all__ = ["Check", "exit_code", "render", "run_checks"]
