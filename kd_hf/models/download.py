"""Fetching a model's files from the Hub, whole and unchanged."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from kd_hf.errors import UserError
from kd_hf.hub_client import patiently

_SHA256 = 64  # hexadecimal digits
_STATUS = {
    401: "the Hub does not accept the token; renew HF_TOKEN, or `hf auth login`",
    429: "the Hub asks for fewer requests; try again in some minutes",
}
_WAITS = (1.0, 5.0)  # seconds before another try


def download_model(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch matching files of a Hub repository (from the cache when offline) and return their folder.

    What a passing failure of the Hub interrupts is tried again; weights that did not arrive as they were sent are
    fetched once more.

    Raises:
        UserError: no such repository or revision, no access, no network, or weights that arrive damaged.
    """
    from huggingface_hub import errors, snapshot_download

    explanations: dict[type[Exception], str] = {  # the first that fits counts
        errors.HFValidationError: "is neither a folder nor a valid Hub id (org/name)",
        errors.GatedRepoError: f"is gated: accept its terms on https://huggingface.co/{repository}, "
        "then `hf auth login` or set HF_TOKEN",
        errors.RepositoryNotFoundError: "is neither a folder nor a repository on the Hub (a private one needs "
        "`hf auth login` or HF_TOKEN)",
        errors.RevisionNotFoundError: f"has no revision '{revision}'",
        errors.LocalEntryNotFoundError: "is not in the cache and the Hub cannot be reached (HF_HUB_OFFLINE?); "
        f"download it where there is a network (`hf download {repository}`) or give a folder",
    }

    def fetch(force: bool = False) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, force_download=force))
        except errors.LocalEntryNotFoundError as error:
            # "not in the cache" is also how the client ends when the Hub answered, but with an error
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                raise error.__cause__ from None
            raise UserError(f"model '{repository}' {explanations[errors.LocalEntryNotFoundError]}") from error

    try:
        folder = patiently(fetch, _WAITS)
        damaged = damaged_weights(folder)
        if damaged:
            folder = patiently(partial(fetch, force=True), _WAITS)
            damaged = damaged_weights(folder)
    except UserError:
        raise
    except Exception as error:  # the client lets through whatever its HTTP library raises
        text = next((text for kind, text in explanations.items() if isinstance(error, kind)), _explain_download(error))
        raise UserError(f"model '{repository}' {text}") from error
    if damaged:
        raise UserError(f"model '{repository}': {damaged[0]} arrives damaged from the Hub: its checksum is another")
    return folder


def damaged_weights(folder: Path) -> list[str]:
    """Large files of a cached repository whose content is not what their name in the cache says: its SHA-256."""
    found = []
    for path in folder.glob("*"):
        named = path.resolve().name
        if path.is_symlink() and len(named) == _SHA256:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != named:
                    found.append(path.name)
    return found


def _explain_download(error: BaseException) -> str:
    """What went wrong, for the errors that have no explanation of their own."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    reason = _STATUS.get(status) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"could not be downloaded: {reason}"
