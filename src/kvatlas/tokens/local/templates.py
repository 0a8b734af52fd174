"""Chat templates: which one it is, what it wants to see, and the text that it makes. Imports jinja2 and transformers.

Templates run in the sandbox of transformers, as in the engine. What it does around a template (``continue_final_message``)
follows vLLM 0.32 with the transformers that it pins (below 5.20): newer ones drop absent values from messages and give
reasoning further names, which changes what some templates write. Newer sandboxes also refuse names with an underscore in a
``namespace``: such a template is refused here where transformers is that new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import jinja2
from jinja2 import nodes
from transformers.utils import chat_template_utils

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.template_bounds import TooMuchError, bound, text_of

ContentFormat: TypeAlias = Literal["string", "openai"]
"""How a template wants a message's content: one string, or a list of parts."""
ModelTemplates: TypeAlias = str | Mapping[str, str] | None
"""A model's own: one, several by name, or none."""

_TEMPLATE_CHARS_MAX = 1 << 20
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled template. Made by :func:`compiled`; many threads may use it at once."""

    def __init__(self, source: str) -> None:
        try:
            environment = chat_template_utils._compile_jinja_template("").environment.overlay()  # set up, nothing rendered
            tree = environment.parse(source)
            self.content_format = _content_format(tree)
            bound(environment, tree)
            self._template = jinja2.Template.from_code(
                environment, environment.compile(tree), environment.make_globals(None), None
            )
        except Exception as error:  # the parser and compiler raise more than their own errors
            raise _failure(error, source) from error
        self._source = source
        self.knows_developers = '"developer"' in source or "'developer'" in source
        """Without it the engine turns developer messages into system messages."""

    def render(self, messages: list[dict[str, Any]], arguments: Mapping[str, Any], *, continue_final_message: bool) -> str:
        """Return the text of a conversation. Raises TokenizationError, BAD_TEMPLATE."""
        continued = ""
        if continue_final_message:
            messages, continued = self._tagged(messages)
        try:
            text = text_of(self._template, {"messages": messages, **arguments})
        except Exception as error:  # whatever the template's expressions raise
            raise _failure(error, self._source) from error
        return _until_tag(text, continued) if continue_final_message else text

    def _tagged(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """Return the messages with a mark at the end of the last one, and its text."""
        last = dict(messages[-1])
        messages = [*messages[:-1], last]
        content = last.get("content")
        if isinstance(content, list):
            content = last["content"] = [dict(part) for part in content]
        if content is None or "content" not in self._source:
            raise _not_continued("the last message has no content, or the template does not show it")
        if isinstance(content, str):
            last["content"] = content + _TAG
            return messages, content
        for part in reversed(content):
            if "text" in part:
                text: str = part["text"]
                part["text"] = text + _TAG
                return messages, text
        raise _not_continued("the last message has no text")


@lru_cache(maxsize=64)
def compiled(source: str) -> ChatTemplate:
    """Return a template ready for use; it is compiled once. Raises TokenizationError, BAD_TEMPLATE."""
    if len(source) > _TEMPLATE_CHARS_MAX:
        raise _refusal(
            f"it has {len(source)} characters", f"the engine's templates have a few thousand, {_TEMPLATE_CHARS_MAX} at most"
        )
    return ChatTemplate(source)


def choose(given: str | None, own: ModelTemplates, *, with_tools: bool) -> str | None:
    """Return the template's text: the given one (or the model's own of that name), else its own; None: there is none."""
    if isinstance(own, Mapping):
        if given is not None:
            return own.get(given, given)
        if with_tools and "tool_use" in own:
            return own["tool_use"]
        return own.get("default")
    return own if given is None else given


def missing() -> TokenizationError:
    """Return the error for a model without any template."""
    return _refusal("the model has none", "set tokens.chatTemplates to the file that engines get with --chat-template")


# --- continue_final_message


def _until_tag(text: str, continued: str) -> str:
    """Return a rendered text up to the end of its last message."""
    tag = _TAG.strip()
    if continued.strip() not in text or tag not in text:
        raise _not_continued("the template does not show the last message as it is")
    end = text.rindex(tag)
    if text[end : end + len(_TAG)] == _TAG:
        return text[:end]
    return text[:end].rstrip()  # the template strips messages


def _not_continued(problem: str) -> TokenizationError:
    return TokenizationError(
        TokenizationReason.BAD_MESSAGES, "continue_final_message", problem, "end with a message whose text the template shows"
    )


# --- the content's format, as vLLM tells it from a template's syntax tree


def _content_format(tree: nodes.Template) -> ContentFormat:
    """Return "openai" where a template loops over a message's content."""
    try:
        return "openai" if _loops_over_content(tree) else "string"
    except AssertionError:  # a loop or an assignment with several targets: vLLM gives up, too
        return "string"


def _reads(node: Any, variable: str, key: str | None = None) -> bool:
    """Whether an expression is a variable or its ``key``, perhaps filtered, tested or sliced."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _reads(node.node, variable, key)
    if isinstance(node, nodes.Test):
        return _reads(node.node, variable, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, variable, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == variable
    if isinstance(node, nodes.Getitem):
        return _reads_plainly(node.node, variable) and isinstance(node.arg, nodes.Const) and bool(node.arg.value == key)
    return isinstance(node, nodes.Getattr) and _reads_plainly(node.node, variable) and node.attr == key


def _reads_plainly(node: Any, variable: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == variable


def _name(target: Any) -> str:
    assert isinstance(target, nodes.Name)
    return target.name


def _names_of_messages(tree: nodes.Template) -> list[str]:
    """Return ``messages`` and all that is assigned from it."""
    names = ["messages"]
    for name in names:  # grows
        for assignment in tree.find_all(nodes.Assign):
            if _reads(assignment.node, name):
                assigned = _name(assignment.target)
                if assigned not in names:
                    names.append(assigned)
    return names


def _names_of_message(tree: nodes.Template) -> list[str]:
    names = _names_of_messages(tree)
    return [_name(loop.target) for loop in tree.find_all(nodes.For) if any(_reads(loop.iter, name) for name in names)]


def _loops_over_content(tree: nodes.Template) -> bool:
    messages = _names_of_message(tree)

    def is_content(node: Any) -> bool:
        return any(_reads(node, name, "content") for name in messages)

    calls = list(tree.find_all(nodes.Call))
    parameters_by_loop: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        parameters = _content_parameters(macro, calls, is_content)
        for loop in macro.find_all(nodes.For):
            if parameters or id(loop) not in parameters_by_loop:
                parameters_by_loop[id(loop)] = parameters
    for loop in tree.find_all(nodes.For):
        if is_content(loop.iter):
            _name(loop.target)
            return True
        if not isinstance(loop.iter, nodes.Name):
            continue
        parameters_here = parameters_by_loop.get(id(loop))
        if (parameters_here and loop.iter.name in parameters_here) or (parameters_here is None and loop.iter.name == "content"):
            _name(loop.target)
            return True
    return False


def _content_parameters(macro: nodes.Macro, calls: Sequence[nodes.Call], is_content: Any) -> set[str]:
    """Return the parameters of a macro that are given a message's content somewhere."""
    names = [argument.name for argument in macro.args]
    found: set[str] = set()
    for call in calls:
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        found.update(name for name, value in zip(names, call.args, strict=False) if is_content(value))
        found.update(value.key for value in call.kwargs if value.key in names and is_content(value.value))
    return found


# --- failures


def _failure(error: BaseException, source: str) -> TokenizationError:
    """Return what a template's failure means, with its line and message."""
    line: int | None
    if isinstance(error, jinja2.TemplateSyntaxError):
        line, message = error.lineno, error.message or "a mistake in its syntax"
    else:
        line, message = _line(error), str(error) or type(error).__name__
    where = "" if line is None or line > source.count("\n") + 1 else f"line {line}: "
    if not isinstance(error, jinja2.TemplateError | TooMuchError):
        message = f"{type(error).__name__}: {message}"
    return _refusal(f"{where}{message[:500]}", "mend the template, or what it is given")


def _line(error: BaseException) -> int | None:
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _refusal(problem: str, remedy: str) -> TokenizationError:
    return TokenizationError(TokenizationReason.BAD_TEMPLATE, "chat_template", problem, remedy)
