"""TAPER: per-step admission control of parallel branches for LLM serving."""

__version__ = "0.1.0"
