"""What the doctor says of tokenizers, renderers and services."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvatlas.config import RendererSettings, TokenServiceSettings, TokenSettings
from kvatlas.doctor import Check, Outcome, check_tokens

TINY = Path(__file__).parents[2] / "data" / "tinymodel"


def checks(settings: TokenSettings) -> dict[str, Check]:
    return {check.name: check for check in check_tokens(settings)}


def test_without_any_tokenizer_it_says_what_to_set() -> None:
    found = checks(TokenSettings())
    assert found["tokenizers"].outcome is Outcome.SKIP
    assert "tokens.directories" in (found["tokenizers"].remedy or "")


def test_a_tokenizer_that_works_is_told_with_its_revision() -> None:
    found = checks(TokenSettings(models={"tiny": str(TINY)}))
    assert found["tokenizers"].outcome is Outcome.OK
    assert found["tokenizer tiny"].outcome is Outcome.OK
    assert "sha256:" in found["tokenizer tiny"].seen
    assert "prefix store works" in found["tokenizer tiny"].seen


def test_one_without_a_chat_template_is_warned_of(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    found = checks(TokenSettings(models={"tiny": str(tmp_path)}))["tokenizer tiny"]
    assert found.outcome is Outcome.WARN
    assert "chats do not work" in found.seen
    assert "tokens.chatTemplates" in (found.remedy or "")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_one_that_is_missing_or_broken_fails(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert checks(TokenSettings(models={"m": str(tmp_path)}))["tokenizer m"].outcome is Outcome.FAIL


def test_a_template_file_that_is_missing_is_told_by_its_setting() -> None:
    found = checks(TokenSettings(models={"tiny": str(TINY)}, chat_templates={"tiny": "/nowhere.jinja"}))
    assert found["tokenizers"].outcome is Outcome.FAIL
    assert "tokens.chatTemplates.tiny" in found["tokenizers"].seen


def test_remote_ones_that_do_not_answer_fail() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        port = taken.getsockname()[1]
        url, address = f"http://127.0.0.1:{port}", f"127.0.0.1:{port}"
        found = checks(
            TokenSettings(renderer=RendererSettings(endpoints=(url,)), service=TokenServiceSettings(address=address))
        )
    assert (found[f"renderer {url}"].outcome, found[f"service {address}"].outcome) == (Outcome.FAIL, Outcome.FAIL)


def test_a_service_that_listens_is_seen(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        address = f"unix://{tmp_path}/s"
        assert checks(TokenSettings(service=TokenServiceSettings(address=address)))[f"service {address}"].outcome is Outcome.OK
