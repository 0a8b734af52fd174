"""Plugins that a configuration for llm-d names, though another part of kvatlas does their work.

They take the same parameters as llm-d's, as strictly. Who does the work reads those that have a meaning here from
``PickerConfig.parameters_of``; ``done_by`` says in one line who that is.
"""
