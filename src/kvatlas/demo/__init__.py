"""``python -m kvatlas.demo``: two recorded vLLM engines, replayed over real ZeroMQ to a real service, and its answers checked.

What the service predicts is compared with what the engines themselves said at the time (``cached_tokens``).
"""
