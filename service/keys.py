"""API keys: who may ask. Only their digests are kept, so no log, page or memory dump of the settings can show one."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pydantic import SecretStr

from service.errors import StartError, Unauthorized

MIN_CHARS = 16


class Keys:
    """Without any key everybody may ask."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [digest(key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, authorization: str | None) -> None:
        """Raises Unauthorized unless the header is `Bearer` with one of the keys. Takes as long for any wrong key."""
        if not self._digests:
            return
        scheme, _, sent = (authorization or "").partition(" ")
        found = digest(sent.strip())
        # Every key is compared, so the time tells nothing of which one was near.
        matches = [hmac.compare_digest(found, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("Send an API key of this service in the header Authorization: Bearer KEY.")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def load(single: SecretStr | None, file: Path | None) -> Keys:
    """Keys from the setting and from a file with one in a line; lines that start with # say something else."""
    keys = [] if single is None else [single.get_secret_value()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"The file of API keys {file} cannot be read: {type(error).__name__}.") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise StartError(f"The file of API keys {file} holds none; leave --api-key-file out to let everybody ask.")
        keys += found
    if any(len(key) < MIN_CHARS for key in keys):
        raise StartError(f"An API key has fewer than {MIN_CHARS} characters; take a longer one.")
    return Keys(keys)
