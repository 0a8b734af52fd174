"""A tokenizer's directory becomes its tokens: special tokens around texts, templates within bounds, clear errors."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.huggingface import HuggingFaceTokenizer, load_huggingface
from kvatlas.tokens.local.model_config import max_model_len
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt
from tests.models.chats import DATA, Variant, write_model

TINY = DATA / "tinymodel"
HELLO = ({"role": "user", "content": "hello"},)


def _load(directory: Path = TINY, **kwargs: Any) -> HuggingFaceTokenizer:
    return load_huggingface(directory, name="tiny", revision=kwargs.pop("revision", None), **kwargs)


def _chat(template: str, **kwargs: Any) -> str:
    return _load(chat_template=template).render(ChatPrompt(model="tiny", messages=HELLO, **kwargs))


def _error(run: Any, *args: Any, **kwargs: Any) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        run(*args, **kwargs)
    return caught.value


def _copy(directory: Path, **changes: Any) -> Path:
    """Copy the tiny model; ``changes`` to tokenizer.json."""
    model = write_model(directory / "model", Variant())
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return model


@pytest.fixture(scope="module")
def tiny() -> HuggingFaceTokenizer:
    return _load()


def test_it_says_what_it_is(tiny: HuggingFaceTokenizer) -> None:
    assert (tiny.name, tiny.max_model_len) == ("tiny", 4096)
    assert tiny.revision is not None
    assert tiny.revision == _load().revision
    assert _load(revision="abc").revision == "abc"


def test_a_file_that_tokens_depend_on_changes_the_revision(tiny: HuggingFaceTokenizer, tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / "chat_template.jinja").write_text("other")
    assert _load(model).revision != tiny.revision


def test_texts_have_their_tokens_and_where_each_ends(tiny: HuggingFaceTokenizer) -> None:
    assert tiny.text is not None
    text = "Hello  wörld 🙂\n\n x  "
    found = tiny.text.encode(text)
    assert found.token_ids == tiny.tokenize(TextPrompt(model="tiny", text=text)) == tiny.text.ids(text)
    assert found.token_ids.typecode == found.ends.typecode == "I"
    assert len(found.ends) == len(found.token_ids)
    assert list(found.ends) == sorted(found.ends)
    assert found.ends[-1] == len(text)


@pytest.mark.parametrize("method", ["encode", "ids"])
def test_other_threads_run_while_a_text_is_tokenized(tiny: HuggingFaceTokenizer, method: str) -> None:
    text = " ".join(f"word{number}" for number in range(100_000))
    began, ended = threading.Event(), threading.Event()

    def tokenize() -> None:
        began.set()
        getattr(tiny.text, method)(text)
        ended.set()

    thread = threading.Thread(target=tokenize)
    thread.start()
    began.wait(20)
    turns = 0
    while not ended.wait(0.002):
        turns += 1
    thread.join()
    assert turns > 20


def test_ends_count_white_space_that_a_post_processor_would_cut_off(tmp_path: Path) -> None:
    model = _copy(
        tmp_path, post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    )
    text = _load(model).text
    assert text is not None
    assert text.encode("a \n").ends[-1] == 3


def test_an_empty_text_has_no_tokens_and_is_no_prompt(tiny: HuggingFaceTokenizer) -> None:
    assert tiny.text is not None
    assert tiny.text.encode("").token_ids == array("I")
    assert _error(tiny.tokenize, TextPrompt(model="tiny", text="")).reason is TokenizationReason.BAD_TEXT


def test_special_tokens_stand_around_texts(tmp_path: Path) -> None:
    tokenizer = _load(write_model(tmp_path / "model", Variant(specials=True)))
    assert tokenizer.text is not None
    assert (list(tokenizer.text.before), list(tokenizer.text.after), tokenizer.specials_around) == ([0], [1], 2)
    own = list(tokenizer.text.encode("hello").token_ids)
    assert list(tokenizer.tokenize(TextPrompt(model="tiny", text="hello"))) == [0, *own, 1]
    assert list(tokenizer.tokenize(TextPrompt(model="tiny", text="hello", add_special_tokens=False))) == own


def test_special_tokens_that_are_not_around_the_text_make_it_one_step(tmp_path: Path) -> None:
    mark = {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    twice = [sequence, {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, sequence]
    model = _copy(
        tmp_path,
        post_processor={
            "type": "TemplateProcessing",
            "single": twice,
            "pair": [*twice, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": mark},
        },
    )
    tokenizer = _load(model)
    assert tokenizer.text is None
    assert 0 in tokenizer.tokenize(TextPrompt(model="tiny", text="hello"))


def test_truncation_and_padding_of_its_file_are_off(tiny: HuggingFaceTokenizer, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", **fill}
    prompt = TextPrompt(model="tiny", text="one two three four five")
    assert _load(_copy(tmp_path, truncation=truncation, padding=padding)).tokenize(prompt) == tiny.tokenize(prompt)


def test_marks_of_special_tokens_in_texts_are_special_tokens(tiny: HuggingFaceTokenizer) -> None:
    assert tiny.text is not None
    assert list(tiny.text.encode("<|im_start|><|im_end|>").token_ids) == [3, 4]


def test_half_of_a_surrogate_pair_is_refused(tiny: HuggingFaceTokenizer) -> None:
    error = _error(tiny.tokenize, TextPrompt(model="tiny", text="a\ud800"))
    assert (error.reason, error.field) == (TokenizationReason.BAD_TEXT, "prompt")
    assert "character 1" in error.problem
    messages = [HELLO[0], {"role": "user", "content": [{"type": "text", "text": "b\udc00"}]}]
    error = _error(tiny.tokenize, ChatPrompt(model="tiny", messages=messages))
    assert (error.reason, error.field) == (TokenizationReason.BAD_TEXT, "messages[1].content[0].text")


def test_many_threads_may_use_one_tokenizer(tiny: HuggingFaceTokenizer) -> None:
    prompts = [ChatPrompt(model="tiny", messages=[{"role": "user", "content": f"text {n} " * n}]) for n in range(40)]
    alone = [tiny.tokenize(prompt) for prompt in prompts]
    together: list[list[array[int]]] = []
    threads = [
        threading.Thread(target=lambda: together.append([tiny.tokenize(prompt) for prompt in prompts])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [alone] * 4


# --- templates


def test_its_own_template_renders(tiny: HuggingFaceTokenizer) -> None:
    chat = ChatPrompt(model="tiny", messages=HELLO)
    assert tiny.render(chat) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.text is not None
    assert tiny.tokenize(chat) == tiny.text.encode(tiny.render(chat)).token_ids


def test_a_configured_template_comes_first() -> None:
    assert _chat("{{ messages[0].content }}!") == "hello!"


def test_a_request_brings_a_template_only_where_it_is_trusted(tiny: HuggingFaceTokenizer) -> None:
    in_request = ChatPrompt(model="tiny", messages=HELLO, chat_template="T")
    in_arguments = ChatPrompt(model="tiny", messages=HELLO, chat_template_kwargs={"chat_template": "T"})
    for chat, field in ((in_request, "chat_template"), (in_arguments, "chat_template_kwargs.chat_template")):
        error = _error(tiny.render, chat)
        assert (error.reason, error.field) == (TokenizationReason.BAD_TEMPLATE, field)
        assert "tokens.trustRequestTemplate" in error.remedy
        assert _load(trust_request_template=True).render(chat) == "T"


def test_named_templates_go_by_whether_there_are_tools(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / "chat_template.jinja").write_text("default")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = _load(model, trust_request_template=True)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tokenizer.render(ChatPrompt(model="tiny", messages=HELLO)) == "default"
    assert tokenizer.render(ChatPrompt(model="tiny", messages=HELLO, tools=tools)) == "tools"
    assert tokenizer.render(ChatPrompt(model="tiny", messages=HELLO, chat_template="tool_use")) == "tools"


def test_without_a_template_chats_are_refused_and_texts_are_not(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / "chat_template.jinja").unlink()
    tokenizer = _load(model)
    assert _error(tokenizer.render, ChatPrompt(model="tiny", messages=HELLO)).reason is TokenizationReason.BAD_TEMPLATE
    assert tokenizer.tokenize(TextPrompt(model="tiny", text="hello"))


def test_a_processor_template_comes_before_the_tokenizers_where_there_are_no_tools(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / "preprocessor_config.json").write_text("{}")
    (model / "chat_template.json").write_text('{"chat_template": "processor"}')
    tools = [{"type": "function", "function": {"name": "f"}}]
    tokenizer = _load(model)
    assert tokenizer.render(ChatPrompt(model="tiny", messages=HELLO)) == "processor"
    assert tokenizer.render(ChatPrompt(model="tiny", messages=HELLO, tools=tools)).startswith("<|im_start|>")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("one\n{% for m in %}", "line 2: Expected an expression"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("\n\n{{ raise_exception('only two roles') }}", "line 3: only two roles"),
        ("\n{{ messages[0].no.thing }}", "line 2: 'dict object' has no attribute 'no'"),
        ("{{ 1 / 0 }}", "line 1: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "more than"),
        ("{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "too large"),
        ("{{ 'a' * 10 ** 9 }}", "too large"),
        ("{{ 10 ** 99999 }}", "too large"),
        ("{{ '%999999999d' % 1 }}", "too large"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
            "more than",
        ),
    ],
)
def test_a_template_that_fails_is_named_with_its_line(template: str, problem: str) -> None:
    error = _error(_chat, template)
    assert (error.reason, error.field) == (TokenizationReason.BAD_TEMPLATE, "chat_template")
    assert problem in error.problem


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvatlas.tokens.local.template_bounds.SECONDS_MAX", 0.2)
    error = _error(_chat, template)
    assert error.reason is TokenizationReason.BAD_TEMPLATE
    assert "0.2 s" in error.problem


def test_bounds_do_not_change_what_loops_see() -> None:
    loop = "{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex0 }};"
    many = "{% for i in range(300) %}" + loop + "{% endfor %}"
    lines = [
        f"{i + 1}/300{i == 299}{i - 1 if i else ''}{i + 1 if i < 299 else ''}{299 - i};" for i in range(300)
    ]  # undefined renders as nothing
    assert _chat(many) == "".join(lines)
    assert _chat("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}") == "a1"
    assert _chat("{% for x in nothing %}{{ x }}{% else %}none{% endfor %}") == "none"
    assert _chat("{% for m in messages recursive %}{{ m.role }}{% endfor %}{{ 'a' ~ 1 ~ none ~ true }}") == "usera1NoneTrue"


def test_templates_are_compiled_once() -> None:
    from kvatlas.tokens.local import templates

    template = "{{ messages[0].content }} once"
    _chat(template)
    before = templates.compiled.cache_info().misses
    assert _chat(template) == "hello once"
    assert templates.compiled.cache_info().misses == before


# --- files


def test_a_directory_that_is_not_there_is_broken(tmp_path: Path) -> None:
    error = _error(_load, tmp_path / "none")
    assert error.reason is TokenizationReason.BROKEN_TOKENIZER
    assert (error.field, error.problem.split(": ")[0]) == ("model", str(tmp_path / "none"))


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / "tokenizer.json").unlink()
    error = _error(_load, model)
    assert error.reason is TokenizationReason.BROKEN_TOKENIZER
    assert (error.field, error.problem.split(": ")[0]) == ("model", str(model / "tokenizer.json"))
    assert "missing" in error.problem


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_named(file: str, content: bytes, tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / file).write_bytes(content)
    error = _error(_load, model)
    assert error.reason is TokenizationReason.BROKEN_TOKENIZER
    assert (error.field, error.problem.split(": ")[0]) == ("model", str(model / file))


def test_a_tokenizer_of_no_known_kind_is_named(tmp_path: Path) -> None:
    error = _error(_load, _copy(tmp_path, model={"type": "Other"}))
    assert error.reason is TokenizationReason.BROKEN_TOKENIZER
    assert error.problem.split(": ")[0].endswith("tokenizer.json")


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    with contextlib.suppress(TokenizationError):
        _load(model)
    assert not ran.exists()


def test_loading_opens_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert _load(shutil.copytree(TINY, tmp_path / "model")).text is not None


def test_chats_that_the_engine_writes_with_its_own_code_need_a_renderer(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["DeepseekV32ForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = _load(model)
    error = _error(tokenizer.render, ChatPrompt(model="tiny", messages=HELLO))
    assert error.reason is TokenizationReason.UNSUPPORTED
    assert "tokens.renderer.endpoints" in error.remedy
    assert tokenizer.tokenize(TextPrompt(model="tiny", text="hello"))


def test_importing_needs_no_transformers_and_loading_says_what_to_install() -> None:
    script = f"""
import sys
from pathlib import Path
from kvatlas.errors import TokenizationError
from kvatlas.tokens.local.huggingface import load_huggingface
assert "transformers" not in sys.modules and "jinja2" not in sys.modules
sys.modules["transformers"] = None
try:
    load_huggingface(Path({str(TINY)!r}), name="tiny", revision=None)
except TokenizationError as error:
    print(error.reason.value, error.remedy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "not_installed pip install 'kvatlas[tokens]'"


def test_loading_says_nothing_on_the_console() -> None:
    script = f"""
from pathlib import Path
from kvatlas.tokens.local.huggingface import load_huggingface
from kvatlas.tokens.prompts import TextPrompt
tokenizer = load_huggingface(Path({str(TINY)!r}), name="tiny", revision=None)
tokenizer.tokenize(TextPrompt(model="tiny", text="long " * 9000))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


# --- the model's length


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "seq_length": 512}, 512),
        ({}, 2048),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": None}}, 4096),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"rope_type": "longrope", "factor": 32.0},
            },
            4096,
        ),
        (
            {"model_type": "gemma3_text", "max_position_embeddings": 131072, "rope_scaling": {"type": "linear", "factor": 8.0}},
            131072,
        ),
        (
            {
                "max_position_embeddings": 1000,
                "rope_parameters": {"full": {"rope_type": "linear", "factor": 2.0}, "sliding": {"rope_type": "default"}},
            },
            2000,
        ),
    ],
)
def test_the_models_length_is_what_vllm_derives(config: dict[str, Any], length: int) -> None:
    assert max_model_len(config) == length


def test_without_a_config_the_models_length_is_not_known(tmp_path: Path) -> None:
    model = _copy(tmp_path)
    (model / "config.json").unlink()
    assert _load(model).max_model_len is None
