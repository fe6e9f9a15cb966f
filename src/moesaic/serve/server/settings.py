"""What a server is told once, when it starts; and the keys that its clients must have."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.errors import UsageError

KEYS_VARIABLE = "MOESAIC_API_KEYS"
_PRINTABLE = re.compile(r"[!-~]+")


class ApiKeys:
    """The keys of which a client must have one; without any, everybody is let in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def admit(self, authorization: bytes | None) -> bool:
        """Whether a request with this ``Authorization`` header is let in; takes as long for every wrong key."""
        if not self._keys:
            return True
        scheme, _, given = (authorization or b"").partition(b" ")
        found = False
        for key in self._keys:  # all of them: which one was near must not show in the time
            found |= hmac.compare_digest(key, given.strip())
        return found and scheme.lower() == b"bearer"


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """The keys of a file (one a line; ``#`` begins a comment) and of ``MOESAIC_API_KEYS`` (with commas or spaces).

    Raises:
        UsageError: where the file cannot be read, a key cannot stand in a header, or a source is there but empty.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UsageError(f"the API keys in {str(file)!r} cannot be read: {reason}") from error
        keys += [key for line in lines if (key := line.partition("#")[0].strip())]
        if not keys:
            raise UsageError(f"there is no API key in {str(file)!r}: write one a line")
    if KEYS_VARIABLE in environment:
        told = environment[KEYS_VARIABLE].replace(",", " ").split()
        if not told:
            raise UsageError(f"{KEYS_VARIABLE} is set, but there is no key in it: give one, or unset it")
        keys += told
    for place, key in enumerate(keys, start=1):
        if not _PRINTABLE.fullmatch(key):
            raise UsageError(f"API key {place} has characters other than printable ASCII, or a space")
    return ApiKeys(keys)


@dataclass(frozen=True)
class ServerSettings:
    """What a server is, and what it lets clients do.

    Attributes:
        name: the base model's, for ``model`` of a request.
        host, port: where it listens; port 0: any free one.
        keys: of clients. adapter_folder: where adapters may be loaded from by clients; None: they may not.
        max_batch, max_queue: sequences that run, and sequences that may wait for it.
        max_body: bytes. max_prompt, max_tokens: tokens of a prompt, and new tokens of a continuation; None: as many as
            the context takes.
        drain_seconds: how long requests in flight may take after the server was asked to end.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: ApiKeys = field(default_factory=ApiKeys)
    adapter_folder: Path | None = None
    max_batch: int = 64
    max_queue: int = 256
    max_body: int = 4 << 20
    max_prompt: int | None = None
    max_tokens: int | None = None
    drain_seconds: float = 30.0

    @property
    def max_sequences(self) -> int:
        """Sequences in flight at most."""
        return self.max_batch + self.max_queue
