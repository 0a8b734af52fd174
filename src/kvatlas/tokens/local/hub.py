"""Fetches a model's tokenizer files from the Hugging Face hub into its cache: never weights, never code."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.formats import is_tokenizer_file

FILE_BYTES_MAX = 128 << 20
"""Largest file that is fetched; the largest tokenizers known have about 35 MB."""
TOTAL_BYTES_MAX = 256 << 20
FILES_MAX = 32
IN_FLIGHT_MAX = 4
ANSWER_TIMEOUT_S = 10.0
"""Longest wait for an answer of the hub to one request."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_CONFIGS = frozenset({"config.json", "params.json"})
_LAST = ("tekken.json", "tokenizer.json")
"""Fetched last: without them a snapshot is no tokenizer, so an interrupted download is never taken for a whole one."""


class Hub:
    """huggingface_hub, with bounds. It has its own settings: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE."""

    def __init__(
        self,
        *,
        cache_directory: Path | None = None,
        endpoint: str | None = None,
        timeout_s: float = 60.0,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """``timeout_s``: how long ``fetch`` waits for all files; a download that takes longer goes on for the next caller."""
        try:
            import huggingface_hub.constants
        except ImportError:
            problem = "huggingface_hub is not installed"
            raise TokenizationError(
                TokenizationReason.NOT_INSTALLED, "model", problem, "pip install 'kvatlas[tokens]'"
            ) from None
        self.cache_directory = cache_directory or Path(huggingface_hub.constants.HF_HUB_CACHE)
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._lock = threading.Lock()
        self._in_flight: dict[tuple[str, str], Future[Path]] = {}

    def fetch(self, name: str, revision: str | None) -> Path:
        """Return the directory of a model's snapshot with all its tokenizer files. Raises TokenizationError."""
        if not _NAME.fullmatch(name) or "--" in name or ".." in name:
            raise _error(TokenizationReason.UNKNOWN_MODEL, "the hub has no such names", "ask by a name such as org/model")
        key = (name, revision or "main")
        with self._lock:
            future = self._in_flight.get(key)
            if future is None:
                if len(self._in_flight) >= IN_FLIGHT_MAX:
                    problem = f"{IN_FLIGHT_MAX} other tokenizers are being fetched from the hub"
                    raise _error(TokenizationReason.BUSY, problem, "try again later")
                future = self._in_flight[key] = Future()
                threading.Thread(target=self._run, args=(key, future), name=f"hub {name}", daemon=True).start()
        try:
            return future.result(self._timeout_s)
        except FutureTimeoutError:
            problem = f"the hub did not bring all files within {self._timeout_s:g} s"
            raise _error(TokenizationReason.TIMEOUT, problem, "try again later: the download goes on") from None

    def _run(self, key: tuple[str, str], future: Future[Path]) -> None:
        try:
            result = self._fetch(*key)
        except BaseException as error:
            future.set_exception(_told(error))
        else:
            future.set_result(result)
        finally:
            with self._lock:
                del self._in_flight[key]

    def _fetch(self, name: str, revision: str) -> Path:
        """Ask once for the commit, the files and their sizes, then fetch each: every request has its time limit.

        (``snapshot_download`` lists the files in a request without one.)
        """
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi(endpoint=self._endpoint, library_name="kvatlas").model_info(
            name, revision=revision, files_metadata=True, timeout=self._answer_timeout_s
        )
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        wanted = sorted(
            (file for file in sizes if is_tokenizer_file(file) or file in _CONFIGS), key=lambda file: (file in _LAST, file)
        )
        _check_sizes({file: sizes[file] for file in wanted})
        directories = {
            Path(
                hf_hub_download(
                    name,
                    file,
                    revision=revision,
                    cache_dir=self.cache_directory,
                    endpoint=self._endpoint,
                    etag_timeout=self._answer_timeout_s,
                    library_name="kvatlas",
                )
            ).parent
            for file in wanted
        }
        if len(directories) != 1:
            raise _error(TokenizationReason.UNAVAILABLE, f"revision {revision} moved while it was fetched", "try again")
        return directories.pop()


def _check_sizes(sizes: dict[str, int | None]) -> None:
    if not sizes:
        raise _error(TokenizationReason.UNKNOWN_MODEL, "the hub has the model, but no tokenizer files of it", "name another")
    for file, size in sizes.items():
        if size is None or size > FILE_BYTES_MAX:
            problem = f"{file} on the hub has {'an unknown size' if size is None else f'{size} bytes'}"
            raise _error(TokenizationReason.BROKEN_TOKENIZER, problem, f"at most {FILE_BYTES_MAX} bytes are fetched")
    if len(sizes) > FILES_MAX or sum(size or 0 for size in sizes.values()) > TOTAL_BYTES_MAX:
        problem = f"{len(sizes)} files of {sum(size or 0 for size in sizes.values())} bytes on the hub"
        raise _error(
            TokenizationReason.BROKEN_TOKENIZER, problem, f"at most {FILES_MAX} of {TOTAL_BYTES_MAX} bytes are fetched"
        )


def _error(reason: TokenizationReason, problem: str, remedy: str) -> TokenizationError:
    return TokenizationError(reason, "model", problem, remedy)


def _told(error: BaseException) -> TokenizationError:
    """Return what went wrong with the hub as an error that tells what to do."""
    from huggingface_hub import errors

    unknown, unavailable = TokenizationReason.UNKNOWN_MODEL, TokenizationReason.UNAVAILABLE
    if isinstance(error, TokenizationError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return _error(unknown, "the hub gives it only to some", "accept its terms on the hub, and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return _error(unknown, "the hub does not have this revision of it", "correct tokens.revisions")
    if isinstance(error, errors.RepositoryNotFoundError):
        return _error(unknown, "the hub does not have it, or not for this HF_TOKEN", "correct the name")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _error(unknown, "the hub may not be asked (HF_HUB_OFFLINE)", "bring the tokenizer's files, or allow the hub")
    return _error(unavailable, f"the hub cannot be asked ({type(error).__name__})", "see to the network, or bring the files")
