"""Plugins that a configuration for llm-d names, though another part of kvatlas does their work.

They take the same parameters as llm-d's, as strictly. ``done_by`` says in one line who does the work; ``adopted`` which
parameters become settings of that part (``kvatlas.serve.routing.picker``). Others are without effect, and a note says so.
"""
