"""tokenization.TokenizationService on a real server, over a Unix socket and TCP, asked by our client and by generated ones."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jinja2 import Template
from tokenizers import Tokenizer

from kvatlas.config import ApiSettings, TokenServiceSettings
from kvatlas.errors import ConfigError, TokenizationError, TokenizationReason
from kvatlas.observe.metrics import Metrics
from kvatlas.proto.tokenization import tokenizer_pb2 as pb
from kvatlas.proto.tokenization import tokenizer_pb2_grpc
from kvatlas.serve.tokenization_server import TokenizationServer
from kvatlas.tokens.encoding import Encoding, LocalTokenizer
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.remote.service import ServiceBackend
from kvatlas.tokens.results import Tokenized, TokenSource
from kvatlas.tokens.tokenization import Tokenization
from kvatlas.types import MultimodalItem

MODEL = Path(__file__).parents[1] / "data" / "tinymodel"
PLAIN = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
HI = {"role": "user", "content": "Good morning 🌍, what is new?"}
TEXT = TextPrompt(model="tiny", text="one two three four five")
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WORD = "of-the-test"


# From llm-d's generated code. Types: 1 double, 5 int32, 8 bool, 9 string, 13 uint32, or a message; "*" is repeated.
CONTRACT = {
    "TokenizeRequest": "input=1:9 model_name=2:9 add_special_tokens=3:8",
    "TokenizeResponse": "input_ids=1*:13 success=2:8 error_message=3:9 offset_pairs=4*:13",
    "ConversationTurn": "messages=1*:ChatMessage",
    "ChatTemplateRequest": (
        "conversation_turns=1*:ConversationTurn tools=2*:ToolDescription documents=3*:Document "
        "chat_template=4:9 return_assistant_tokens_mask=5:8 continue_final_message=6:8 "
        "add_generation_prompt=7:8 chat_template_kwargs=8*:ChatTemplateKwargsEntry model_name=9:9"
    ),
    "ImageUrl": "url=1:9",
    "ContentPart": "type=1:9 text=2:9 image_url=3:ImageUrl",
    "ChatMessage": "role=1:9 content=2:9 content_parts=3*:ContentPart tool_calls_json=4:9",
    "ToolDescription": "tool=1*:ToolEntry",
    "Document": "document=1*:DocumentEntry",
    "Value": ("string_value=1:9 number_value=2:1 bool_value=3:8 list_value=4:ListValue struct_value=5:StructValue"),
    "ListValue": "values=1*:Value",
    "StructValue": "fields=1*:FieldsEntry",
    "ChatTemplateResponse": "rendered_prompt=1:9 success=2:8 error_message=3:9",
    "InitializeTokenizerRequest": "model_name=1:9 enable_thinking=2:8 add_generation_prompt=3:8",
    "InitializeTokenizerResponse": "success=1:8 error_message=2:9",
    "PlaceholderRange": "offset=1:5 length=2:5",
    "StringList": "values=1*:9",
    "PlaceholderRangeList": "ranges=1*:PlaceholderRange",
    "MultiModalFeatures": "mm_hashes=1*:MmHashesEntry mm_placeholders=2*:MmPlaceholdersEntry",
    "RenderChatCompletionRequest": (
        "model_name=1:9 messages=2*:ChatMessage tools_json=3:9 chat_template=4:9 "
        "add_generation_prompt=5:8 continue_final_message=6:8 chat_template_kwargs=7:9"
    ),
    "RenderChatCompletionResponse": (
        "request_id=1:9 token_ids=2*:13 features=3:MultiModalFeatures success=4:8 error_message=5:9"
    ),
    "RenderCompletionRequest": "model_name=1:9 prompt=2:9",
    "RenderCompletionResponse": "request_id=1:9 token_ids=2*:13 success=3:8 error_message=4:9",
}


class TinyTokenizer:
    """The tiny model's tokenizer with BOS before a text, as LocalTokenizer and its TextTokenizer."""

    name = str(MODEL)
    revision = None
    max_model_len = 4096
    before = array("I", [0])
    after = array("I")
    template = Template((MODEL / "chat_template.jinja").read_text())

    @property
    def text(self) -> TinyTokenizer:
        return self

    def encode(self, text: str) -> Encoding:
        found = PLAIN.encode(text, add_special_tokens=False)
        return Encoding(array("I", found.ids), array("I", (end for _, end in found.offsets)))

    def ids(self, text: str) -> array[int]:
        return self.encode(text).token_ids

    def render(self, chat: ChatPrompt) -> str:
        shown = [{**message, "content": message.get("content") or ""} for message in chat.messages]
        if chat.tools or chat.documents or chat.chat_template_kwargs:
            shown = [{"role": "system", "content": f"{chat.tools} {chat.documents} {chat.chat_template_kwargs}"}, *shown]
        return self.template.render(messages=shown, add_generation_prompt=chat.add_generation_prompt)

    def tokenize(self, prompt: Prompt) -> array[int]:
        text = prompt.text if isinstance(prompt, TextPrompt) else self.render(prompt)
        ids = self.encode(text).token_ids
        return self.before + ids if prompt.add_special_tokens else ids


TINY = TinyTokenizer()


class TinyBackend:
    """A backend that knows one model, and what goes wrong with some prompts."""

    def tokenize(self, prompt: Prompt, timeout_s: float) -> Tokenized:
        text = prompt.text if isinstance(prompt, TextPrompt) else str(prompt.messages)
        items: tuple[MultimodalItem, ...] = ()
        if "image_url" in text:
            items = (MultimodalItem("abc", 1, 2), MultimodalItem("def", 4, 1))
        if text == "wait":
            time.sleep(0.5)
        if text == "too long":
            raise TokenizationError(TokenizationReason.TOO_MANY_TOKENS, "prompt", "9 tokens, and the model takes 8", "less")
        load(prompt.model)
        return Tokenized(token_ids=TINY.tokenize(prompt), source=TokenSource.LOCAL, tokenizer="tiny", multimodal=items)

    def close(self) -> None:
        pass


def load(model: str) -> LocalTokenizer:
    if model != "tiny":
        raise TokenizationError(TokenizationReason.UNKNOWN_MODEL, "model", f"{model!r} is not here", "name another")
    return TINY  # type: ignore[return-value]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/tokenizer.sock"


@asynccontextmanager
async def serving(address: str, *, mode: int = 0o600, timeout_s: float = 5, **api: Any) -> AsyncIterator[str]:
    tokenization = Tokenization([TinyBackend()], Metrics())
    server = TokenizationServer(ApiSettings(**api), tokenization, load, timeout_s, Metrics())
    try:
        listening = server.listen(address, mode)
        await server.start()
        yield listening
    finally:
        await server.stop(1)
        tokenization.close()


@contextmanager
def asking(address: str, **settings: Any) -> Iterator[ServiceBackend]:
    backend = ServiceBackend(TokenServiceSettings(address=address, **{"timeout": 5, **settings}))
    try:
        yield backend
    finally:
        backend.close()


async def told(backend: ServiceBackend, prompt: Prompt) -> Tokenized:
    return await asyncio.to_thread(backend.tokenize, prompt, 5)


async def failure(backend: ServiceBackend, prompt: Prompt = TEXT, timeout_s: float = 5) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        await asyncio.to_thread(backend.tokenize, prompt, timeout_s)
    return caught.value


def chat(**fields: Any) -> ChatPrompt:
    return ChatPrompt(**{"model": "tiny", "messages": [HI], **fields})


# -- our client and our service -----------------------------------------------------------------------------------------

EXPRESSED: dict[str, Prompt] = {
    "text": TEXT,
    "text without special tokens": TextPrompt(model="tiny", text="Grüße 🌍", add_special_tokens=False),
    "chat": chat(),
    "answered before": chat(messages=[HI, {"role": "assistant", "content": "No."}, HI], add_generation_prompt=False),
    "tools and arguments": chat(tools=[{"type": "function", "function": {"name": "f"}}], chat_template_kwargs={"a": [1, None]}),
    "tool calls": chat(messages=[HI, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "n": 2}]}]),
    "parts": chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]),
}


@pytest.mark.parametrize("where", ["unix", "127.0.0.1:0", "[::1]:0"])
async def test_prompts_become_the_same_tokens_there_as_here(address: str, where: str) -> None:
    async with serving(address if where == "unix" else where) as listening:
        with asking(listening) as backend:
            for name, prompt in EXPRESSED.items():
                found = await told(backend, prompt)
                assert found.token_ids == TINY.tokenize(prompt), name
                assert (found.source, found.tokenizer) == (TokenSource.SERVICE, listening)


async def test_images_keep_their_hashes_and_places(address: str) -> None:
    async with serving(address) as listening:
        with asking(listening) as backend:
            found = await told(backend, chat(messages=[{"role": "user", "content": [IMAGE, IMAGE]}]))
    assert found.multimodal == (MultimodalItem("abc", 1, 2), MultimodalItem("def", 4, 1))


async def test_a_cut_with_side_and_number_is_made_here(address: str) -> None:
    whole = TINY.tokenize(TEXT)
    async with serving(address) as listening:
        with asking(listening) as backend:
            for cut, wanted in (
                (Truncation(3, "left"), whole[-3:]),
                (Truncation(3, "right"), whole[:3]),
                (Truncation(1000, "right"), whole),
            ):
                assert (await told(backend, TextPrompt(model="tiny", text=TEXT.text, truncation=cut))).token_ids == wanted
            refused = await failure(backend, TextPrompt(model="tiny", text="too long", truncation=Truncation(3, "left")))
            assert refused.reason is TokenizationReason.UNSUPPORTED, "the service refused the whole, not what is left of it"
            none_left = await failure(backend, TextPrompt(model="tiny", text="x", truncation=Truncation(0, "left")))
            assert none_left.reason is TokenizationReason.BAD_TRUNCATION


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (TextPrompt(model="tiny", text="x", truncation=Truncation(-1, "left")), "truncate_prompt_tokens"),
        (TextPrompt(model="tiny", text="x", truncation=Truncation(5)), "truncation_side"),
        (chat(documents=[{"text": "x"}]), "documents"),
        (chat(reasoning_effort="low"), "reasoning_effort"),
        (chat(add_special_tokens=True), "add_special_tokens"),
        (chat(tools=[]), "tools"),
        (chat(tools=[{}], tool_choice="none"), "tool_choice"),
        (chat(messages=[HI, {"role": "tool", "content": "x", "tool_call_id": "1"}]), "messages[1].tool_call_id"),
        (chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]), "messages[0].content[0]"),
        (chat(messages=[{"role": "user", "content": [{**IMAGE, "uuid": "1"}]}]), "messages[0].content[0]"),
        (chat(messages=[{"role": "user", "content": []}]), "messages[0].content"),
    ],
)
async def test_what_the_messages_cannot_express_is_not_sent(prompt: Prompt, field: str) -> None:
    with asking("127.0.0.1:1") as backend:
        error = await failure(backend, prompt)
    assert (error.reason, error.field) == (TokenizationReason.UNSUPPORTED, field)


async def test_failures_come_back_as_what_they_were(address: str) -> None:
    async with serving(address, timeout_s=5) as listening:
        with asking(listening, failures_max=1, timeout=5) as backend:
            unknown = await failure(backend, TextPrompt(model="other", text="x"))
            plain = await failure(backend, TextPrompt(model="other", text="x", add_special_tokens=False))
            refused = await failure(backend, TextPrompt(model="tiny", text="too long"))
            broken = await failure(backend, TextPrompt(model="tiny", text="\ud800"))
            assert await told(backend, TEXT), "none of them is the service's failure"
    assert (unknown.reason, plain.reason) == (TokenizationReason.UNKNOWN_MODEL,) * 2
    assert (refused.reason, refused.field, refused.remedy) == (TokenizationReason.REFUSED, "prompt", "less")
    assert "the model takes 8" in refused.problem
    assert unknown.field == "model"
    assert broken.reason is TokenizationReason.BAD_TEXT


async def test_a_service_that_is_slow_gone_and_back(address: str) -> None:
    now_s = [0.0]
    settings = TokenServiceSettings(address=address, timeout=5, failures_max=2, retry_after=10)  # type: ignore[arg-type]
    backend = ServiceBackend(settings, lambda: now_s[0])
    wait = TextPrompt(model="tiny", text="wait")
    async with serving(address):
        hurried = await failure(backend, wait, 0.02)
        assert hurried.reason is TokenizationReason.TIMEOUT
        assert (await told(backend, TEXT)).token_ids
    assert (await failure(backend)).reason is TokenizationReason.UNAVAILABLE
    assert (await failure(backend)).reason is TokenizationReason.UNAVAILABLE
    assert (await failure(backend)).reason is TokenizationReason.CIRCUIT_OPEN
    async with serving(address):
        assert (await failure(backend)).reason is TokenizationReason.CIRCUIT_OPEN
        for _ in range(100):  # gRPC too waits before it connects again
            now_s[0] += 10
            try:
                assert (await told(backend, TEXT)).token_ids == TINY.tokenize(TEXT)
                break
            except TokenizationError as error:
                assert error.reason is TokenizationReason.UNAVAILABLE  # noqa: PT017
                await asyncio.sleep(0.1)
        else:
            raise AssertionError("did not come back")
    backend.close()
    assert (await failure(backend)).reason in (TokenizationReason.UNAVAILABLE, TokenizationReason.CIRCUIT_OPEN)


async def test_calls_in_progress_are_bounded(address: str) -> None:
    async with serving(address) as listening:
        with asking(listening, calls_max=1) as backend:
            first = asyncio.create_task(told(backend, TextPrompt(model="tiny", text="wait")))
            await asyncio.sleep(0.1)
            assert (await failure(backend, timeout_s=0.05)).reason is TokenizationReason.BUSY
            assert (await first).token_ids


async def test_the_token_is_needed_where_there_is_one(address: str) -> None:
    async with serving(address, token=WORD) as listening:
        with asking(listening) as backend:
            error = await failure(backend)
            assert (error.reason, error.remedy) == (TokenizationReason.UNAVAILABLE, "check tokens.service.token")
        with asking(listening, token=WORD) as backend:
            assert await told(backend, TEXT)
        async with grpc.aio.insecure_channel(listening) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "tokenization.TokenizationService"):
                assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == 1


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    made, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


async def test_tls_is_checked_by_the_given_certificates(certificate: Path) -> None:
    api = {"tls_cert_file": str(certificate), "tls_key_file": str(certificate.with_name("key.pem"))}
    async with serving("localhost:0", **api) as listening:
        with asking(listening, ca_file=str(certificate)) as backend:
            assert await told(backend, TEXT)
        with asking(listening) as backend:
            assert (await failure(backend)).reason is TokenizationReason.UNAVAILABLE
    with pytest.raises(ConfigError, match="caFile"), asking("localhost:1", ca_file=f"{certificate}.none"):
        pass


# -- llm-d's clients ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[tokenizer_pb2_grpc.TokenizationServiceAsyncStub]:
    async with serving(address) as listening, grpc.aio.insecure_channel(listening) as channel:
        yield tokenizer_pb2_grpc.TokenizationServiceStub(channel)  # type: ignore[misc]


async def test_the_calls_of_llmds_client_in_its_order(address: str) -> None:
    async with stub(address) as service:
        loaded = await service.InitializeTokenizer(pb.InitializeTokenizerRequest(model_name="tiny", add_generation_prompt=True))
        assert loaded.success
        warm = pb.RenderChatCompletionRequest(model_name="tiny", add_generation_prompt=True)
        warm.messages.add(role="user", content="warmup")
        answer = await service.RenderChatCompletion(warm)
        assert (answer.success, answer.HasField("features")) == (True, False)
        assert list(answer.token_ids) == TINY.tokenize(chat(messages=[{"role": "user", "content": "warmup"}])).tolist()
        rendered = await service.RenderCompletion(pb.RenderCompletionRequest(model_name="tiny", prompt="x y z"))
        assert (rendered.success, list(rendered.token_ids)) == (True, [0, *TINY.encode("x y z").token_ids])
        text = "é🌍 and so on"
        placed = await service.Tokenize(pb.TokenizeRequest(input=text, model_name="tiny", add_special_tokens=True))
        assert (placed.success, len(placed.offset_pairs)) == (True, 2 * len(placed.input_ids))
        assert placed.offset_pairs[:2] == [0, 0], "BOS has no place in the text"
        wanted = [number for pair in PLAIN.encode(text, add_special_tokens=False).offsets for number in pair]
        assert list(placed.offset_pairs)[2:] == wanted


async def test_chats_become_text_with_tools_documents_and_arguments(address: str) -> None:
    def value(**kind: Any) -> pb.Value:
        return pb.Value(**kind)

    request = pb.ChatTemplateRequest(model_name="tiny", add_generation_prompt=True)
    request.conversation_turns.add().messages.add(role="user", content="hi")
    request.conversation_turns.add().messages.add(role="user", content="there")
    request.tools.add().tool["name"].string_value = "f"
    request.documents.add().document["deep"].CopyFrom(
        value(list_value=pb.ListValue(values=[value(number_value=3), value(number_value=0.5), value(bool_value=True), value()]))
    )
    request.chat_template_kwargs["a"].CopyFrom(value(struct_value=pb.StructValue(fields={"b": value(string_value="c")})))
    async with stub(address) as service:
        answer = await service.RenderChatTemplate(request)
        assert answer.success
        assert answer.rendered_prompt == TINY.render(
            ChatPrompt(
                model="tiny",
                messages=[{"role": "user", "content": "hi"}, {"role": "user", "content": "there"}],
                tools=[{"name": "f"}],
                documents=[{"deep": [3, 0.5, True, None]}],
                chat_template_kwargs={"a": {"b": "c"}},
            )
        )
        request.return_assistant_tokens_mask = True
        with pytest.raises(grpc.aio.AioRpcError, match="return_assistant_tokens_mask") as caught:
            await service.RenderChatTemplate(request)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        (lambda chat: setattr(chat, "model_name", ""), "model_name", grpc.StatusCode.NOT_FOUND),
        (lambda chat: setattr(chat, "model_name", "other"), "model", grpc.StatusCode.NOT_FOUND),
        (lambda chat: setattr(chat, "tools_json", "{"), "tools_json", grpc.StatusCode.INVALID_ARGUMENT),
        (lambda chat: setattr(chat, "tools_json", "[1]"), "tools_json", grpc.StatusCode.INVALID_ARGUMENT),
        (lambda chat: setattr(chat, "chat_template_kwargs", "[]"), "chat_template_kwargs", grpc.StatusCode.INVALID_ARGUMENT),
        (
            lambda chat: setattr(chat.messages[0], "tool_calls_json", '"x"'),
            "messages[0].tool_calls_json",
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            lambda chat: chat.messages[0].content_parts.add(type="video_url"),
            "messages[0].content_parts[0]",
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_a_bad_request_is_refused_by_field(
    address: str, change: Callable[[Any], None], field: str, code: grpc.StatusCode
) -> None:
    request = pb.RenderChatCompletionRequest(model_name="tiny")
    request.messages.add(role="user", content="hi")
    change(request)
    async with stub(address) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.RenderChatCompletion(request)
    assert caught.value.code() is code
    assert (caught.value.details() or "").startswith(f"{field}: ")


def test_llmds_contract_is_kept_field_for_field() -> None:
    """Names, numbers and types as in llm-d-kv-cache 7be76e1, api/tokenizerpb/tokenizer.proto."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    shapes = {
        message.name: " ".join(
            f"{field.name}={field.number}{'*' if field.label == field.LABEL_REPEATED else ''}"
            f":{field.type_name.rpartition('.')[2] or field.type}"
            for field in message.field
        )
        for message in file.message_type
    }
    assert (file.package, file.syntax) == ("tokenization", "proto3")
    assert shapes == CONTRACT
    optional = {f"{m.name}.{f.name}" for m in file.message_type for f in m.field if f.proto3_optional}
    assert optional == {
        "ContentPart.text",
        "ContentPart.image_url",
        "ChatMessage.content",
        "ChatMessage.tool_calls_json",
        "RenderChatCompletionRequest.tools_json",
        "RenderChatCompletionRequest.add_generation_prompt",
        "RenderChatCompletionRequest.chat_template_kwargs",
    }
    (service,) = file.service
    assert [(call.name, call.input_type, call.output_type) for call in service.method] == [
        (name, f".tokenization.{asked}", f".tokenization.{answer}")
        for name, asked, answer in (
            ("Tokenize", "TokenizeRequest", "TokenizeResponse"),
            ("RenderChatTemplate", "ChatTemplateRequest", "ChatTemplateResponse"),
            ("InitializeTokenizer", "InitializeTokenizerRequest", "InitializeTokenizerResponse"),
            ("RenderChatCompletion", "RenderChatCompletionRequest", "RenderChatCompletionResponse"),
            ("RenderCompletion", "RenderCompletionRequest", "RenderCompletionResponse"),
        )
    ]


# -- the socket ---------------------------------------------------------------------------------------------------------


def mode_of(address: str) -> int | None:
    """Return type and permissions of a socket's file; None where there is none."""
    try:
        return os.lstat(address.removeprefix("unix://")).st_mode
    except FileNotFoundError:
        return None


def put(path: Path, text: str) -> Path:
    """Write a file in place of whatever is there."""
    path.unlink(missing_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o660])
async def test_a_socket_is_for_those_it_is_meant_for_and_gone_at_the_end(address: str, mode: int) -> None:
    async with serving(address, mode=mode) as listening:
        assert listening == address
        assert mode_of(address) == stat.S_IFSOCK | mode
    assert mode_of(address) is None


async def test_a_socket_that_was_left_behind_is_replaced(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(address.removeprefix("unix://"))
        left.listen()
    async with serving(address) as listening:
        with asking(listening) as backend:
            assert await told(backend, TEXT)


async def test_a_socket_in_use_and_a_file_are_left_as_they_are(address: str, tmp_path: Path) -> None:
    file = put(tmp_path / "file", "kept")
    async with serving(address) as listening:
        with pytest.raises(ConfigError, match="another service listens there"):
            async with serving(address):
                pass
        with asking(listening) as backend:
            assert await told(backend, TEXT), "the first one still answers"
        with pytest.raises(ConfigError, match="no socket"):
            async with serving(f"unix:{file}"):
                pass
    assert stat.S_ISREG(mode_of(str(file)) or 0)


async def test_a_socket_that_another_took_meanwhile_is_not_removed(address: str) -> None:
    async with serving(address):
        put(Path(address.removeprefix("unix://")), "another's")
    assert stat.S_ISREG(mode_of(address) or 0)


@pytest.mark.parametrize(
    "address", ["unix://", "unix:/" + "x" * 200, "nowhere", "127.0.0.1:99999", "127.0.0.1:x", "unix:///none/there.sock"]
)
async def test_an_address_that_cannot_be_had_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        async with serving(address):
            pass


async def test_a_port_in_use_is_refused() -> None:
    async with serving("127.0.0.1:0") as listening:
        with pytest.raises(ConfigError, match="cannot listen"):
            async with serving(listening):
                pass


# -- services that misbehave, and llm-d's own ways ------------------------------------------------------------------------


class OddService(tokenizer_pb2_grpc.TokenizationServiceServicer):
    """Answers a text by its own instructions."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.loaded = False

    def RenderCompletion(self, request: pb.RenderCompletionRequest, context: Any) -> pb.RenderCompletionResponse:  # noqa: N802
        self.calls.append("RenderCompletion")
        kind, _, text = request.prompt.partition(":")
        if kind == "status":
            code, _, details = text.partition(":")
            context.abort(grpc.StatusCode[code], details)
        if kind == "hang":
            time.sleep(1)
        return pb.RenderCompletionResponse(success=kind == "empty", error_message=text)

    def RenderChatCompletion(self, request: Any, context: Any) -> pb.RenderChatCompletionResponse:  # noqa: N802
        answer = pb.RenderChatCompletionResponse(success=True, token_ids=[1, 2, 3])
        answer.features.mm_hashes["image"].values.append("abc")
        answer.features.mm_placeholders["image"].ranges.add(offset=2, length=2)
        return answer

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        self.calls.append("Tokenize")
        if not self.loaded:
            text = f"Failed to tokenize prompt: Tokenizer not initialized for model: {request.model_name}"
            context.abort(grpc.StatusCode.INTERNAL, text)
        return pb.TokenizeResponse(success=True, input_ids=[5, 6])

    def InitializeTokenizer(self, request: Any, context: Any) -> pb.InitializeTokenizerResponse:  # noqa: N802
        self.calls.append("InitializeTokenizer")
        self.loaded = request.model_name == "tiny"
        text = "" if self.loaded else f"Failed to initialize renderer for model: {request.model_name}"
        return pb.InitializeTokenizerResponse(success=self.loaded, error_message=text)


@contextmanager
def odd() -> Iterator[tuple[OddService, str]]:
    servicer = OddService()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    tokenizer_pb2_grpc.add_TokenizationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("text", "reason", "counts"),
    [
        ("false:Render failed: too long", TokenizationReason.REFUSED, False),
        ("false:Failed to load renderer for model: m", TokenizationReason.UNKNOWN_MODEL, False),
        ("false:oops", TokenizationReason.UNAVAILABLE, False),
        ("status:INTERNAL:Render failed: the prompt has 9 tokens", TokenizationReason.REFUSED, False),
        ("status:INTERNAL:This model's maximum context length is 8 tokens.", TokenizationReason.TOO_MANY_TOKENS, False),
        ("status:INTERNAL:Either prompt or ... (parameter=prompt)", TokenizationReason.REFUSED, False),
        ("status:INTERNAL:tiny is not a multimodal model", TokenizationReason.REFUSED, False),
        ("status:INTERNAL:segfault", TokenizationReason.UNAVAILABLE, False),
        ("status:INVALID_ARGUMENT:no", TokenizationReason.REFUSED, False),
        ("status:UNIMPLEMENTED:no", TokenizationReason.UNSUPPORTED, False),
        ("status:UNAVAILABLE:later", TokenizationReason.UNAVAILABLE, True),
        ("hang:", TokenizationReason.TIMEOUT, True),
        ("empty:", TokenizationReason.UNAVAILABLE, True),
    ],
)
async def test_a_services_failures_have_their_reasons(text: str, reason: TokenizationReason, counts: bool) -> None:
    timeout_s = 0.3 if reason is TokenizationReason.TIMEOUT else 5
    with odd() as (_, address), asking(address, failures_max=1, timeout=timeout_s) as backend:
        prompt = TextPrompt(model="tiny", text=text)
        assert (await failure(backend, prompt)).reason is reason
        again = (await failure(backend, prompt)).reason
        assert again is (TokenizationReason.CIRCUIT_OPEN if counts else reason)


async def test_a_model_that_llmds_service_has_not_loaded_is_loaded_once() -> None:
    plain = TextPrompt(model="tiny", text="x", add_special_tokens=False)
    with odd() as (service, address), asking(address) as backend:
        assert (await told(backend, plain)).token_ids.tolist() == [5, 6]
        assert (await told(backend, plain)).token_ids.tolist() == [5, 6]
        assert service.calls == ["Tokenize", "InitializeTokenizer", "Tokenize", "Tokenize"]
        service.loaded = False  # restarted
        assert (await told(backend, plain)).token_ids.tolist() == [5, 6]
        service.loaded = False
        error = await failure(backend, TextPrompt(model="other", text="x", add_special_tokens=False))
        assert error.reason is TokenizationReason.UNKNOWN_MODEL


async def test_items_outside_the_prompt_are_no_answer() -> None:
    with odd() as (_, address), asking(address) as backend:
        error = await failure(backend, chat())
    assert error.reason is TokenizationReason.UNAVAILABLE
    assert "a placeholder at 2" in error.problem


# -- kvatlas tokenizer --------------------------------------------------------------------------------------------------


def test_the_command_serves_a_directory_until_it_is_told_to_stop(address: str) -> None:
    command = [sys.executable, "-m", "kvatlas", "tokenizer", "--listen", address, "--model", f"named={MODEL}"]
    command += ["--tokenizers", str(MODEL.parent)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "KVATLAS_TOKENS_TIMEOUT": "20s"})
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert address in said, said
        assert "named" in said
        assert "tinymodel" in said
        with asking(address, timeout=20) as backend:
            for model in ("named", "tinymodel"):
                prompt = TextPrompt(model=model, text=TEXT.text, add_special_tokens=False)
                assert backend.tokenize(prompt, 20).token_ids == TINY.encode(TEXT.text).token_ids
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert not Path(address.removeprefix("unix://")).exists()
