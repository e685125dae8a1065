"""Names on Hugging Face's hub to folders here: the cache first, and a machine offline is told in a second."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dig.packages import quietly, require

PATIENCE = 3.0
"""Seconds for the hub to answer whether a name exists. Its client alone would try for half a minute."""
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubError(ValueError):
    """A name cannot be fetched; the message says why and what to do instead."""


def is_hub_name(text: str) -> bool:
    """Whether this may be a name on the hub, ``facebook/DiT-XL-2-256``, rather than a path."""
    # Where the first folder is there, the second is misspelt.
    return bool(_NAME.fullmatch(text)) and not text.endswith(_FILES) and not Path(text).parent.exists()


def in_cache(name: str, *, patterns: Sequence[str], needed: Sequence[str]) -> Path | None:
    """The folder of a name in the hub's cache, if it is there with what is needed: see `fetch`.

    Raises:
        ValueError: It is no name, by the hub's rules.
        MissingPackageError: The hub's client is not installed.
    """
    hub = require("huggingface_hub", f"{name!r} from the hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with quietly():
            folder = Path(hub.snapshot_download(name, local_files_only=True, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        return None
    return folder if any(next(folder.glob(pattern), None) for pattern in needed) else None


def fetch(name: str, *, patterns: Sequence[str], needed: Sequence[str], what: str) -> Path:
    """The folder of a name, fetched where it isn't in the cache yet.

    Args:
        name: ``owner/name``.
        patterns: Of the files to fetch.
        needed: Of one file at least one pattern must be met, for what lies in the cache to be enough.
        what: For the message: ``the VAE``.

    Raises:
        HubError: There is no such name, the hub can't be reached, or offline mode is on and it is not in the cache.
        MissingPackageError: The hub's client is not installed.
    """
    hub = require("huggingface_hub", f"{what} {name!r} from the hub")
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    instead = f"give the folder of a download instead, or run once where the hub can be reached: hf download {name}"
    try:
        if (folder := in_cache(name, patterns=patterns, needed=needed)) is not None:
            return folder
    except ValueError as error:  # No name at all, by the hub's rules.
        raise HubError(f"{what} {name!r} is neither a folder nor a name on the hub: {str(error)[:200]}") from None
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{what} {name!r} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set; {instead}"
        )
    try:
        with quietly():
            hub.HfApi().model_info(name, timeout=PATIENCE)
            return Path(hub.snapshot_download(name, allow_patterns=list(patterns), etag_timeout=PATIENCE))
    except GatedRepoError:
        raise HubError(f"{what} {name!r} is gated: accept its terms on the hub and log in (hf auth login)") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{what} {name!r} is neither a folder nor a name on the hub (a private one needs hf auth login)"
        ) from None
    except HfHubHTTPError as error:
        raise HubError(f"the hub refuses {what} {name!r}: {' '.join(str(error).split())[:200]}; {instead}") from None
    # The client's connection has errors of its own, by the version of the library beneath.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise HubError(
            f"{what} {name!r} is neither a folder nor in the hub's cache, and the hub cannot be reached ({reason}); "
            f"{instead}"
        ) from None
