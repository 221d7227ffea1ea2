"""The vLLM room: a scheduler subclass that enforces plans, and the seams it stands on.

Switch it on in any `vllm serve` line with

    --scheduler-cls taper.engines.vllm.scheduler.TaperScheduler
    --middleware taper.engines.vllm.middleware.ClaimsMiddleware      (optional: HTTP 400 for bad claims)
"""
