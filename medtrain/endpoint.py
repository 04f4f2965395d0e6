"""What every client of an OpenAI-compatible endpoint needs: its key, and words that hold no secret.

The key comes from the environment, goes to the client, and nowhere else. What a server says is
shown in part: never a body that may echo the request, never the key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from medtrain.errors import ConfigError

if TYPE_CHECKING:
    import openai

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
"""Local servers ask for no key, but the client insists on sending one."""

_QUOTE_LIMIT = 200


def key_from_environment(variable: str) -> str:
    """The key; empty where there is none."""
    return os.environ.get(variable, "").strip()


def load_secrets(path: str | None) -> None:
    """Put the NAME=value lines of a secrets file into this process's environment.

    What the environment has already stays. Empty lines and those that begin with # are left out;
    `export` before a name and quotes around a value are allowed.

    Raises:
        ConfigError: the file is not there, may be read by others, or has a line of another form.
    """
    for name, value in read_secrets(path).items():
        os.environ.setdefault(name, value)


def read_secrets(path: str | None) -> dict[str, str]:
    """The names and values of a secrets file; nothing for None."""
    if path is None:
        return {}
    file = Path(path).expanduser()
    try:
        mode, text = file.stat().st_mode, file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The secrets file {file} cannot be read: {error.strerror}",
            fix="Write NAME=value lines into it and chmod 600 it, or unset cluster.secrets_file.",
        ) from error
    if mode & 0o077:
        raise ConfigError(
            f"Others than its owner may use the secrets file {file}", fix=f"chmod 600 {file}"
        )
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not name or name.startswith("#"):
            continue
        if not equals or not name.strip().isidentifier():
            # The line itself may be the secret.
            raise ConfigError(f"{file}, line {number}, is not of the form NAME=value")
        found[name.strip()] = value.strip().strip("\"'")
    return found


def without_credentials(url: str) -> str:
    """An address as it may be shown: a password or a token in it stays out."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def own_words(error: openai.OpenAIError, key: str) -> str:
    """The server's message, where there is one."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else None
    # FastAPI's `detail`, when a list, echoes the input.
    found = [inner.get("message"), inner.get("detail")] if isinstance(inner, dict) else [inner]
    words = next((words for words in found if isinstance(words, str)), "")[:_QUOTE_LIMIT]
    return words.replace(key, "[key]") if key and key != NO_KEY else words
