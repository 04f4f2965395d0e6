"""The hub's many ways to fail as one message each, none of which holds a token.

`RefusedError`: the hub answers, and does not give this one thing (gated, private, not there);
others may still be had. EndpointError: it cannot be reached, or is in trouble: nothing can be had.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from medtrain.errors import DataError, EndpointError, MedtrainError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RefusedError(EndpointError):
    """The hub answers, and does not give this one thing."""


@contextmanager
def said_clearly(name: str, why: str) -> Iterator[None]:
    """Turn the hub's errors into one message each; none of them holds the token."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    # httpx's in some versions of huggingface_hub, its successor's in others.
    transport = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        yield
    except MedtrainError:
        raise
    except GatedRepoError as error:
        raise gated(name, why) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise _unreachable(name, why, f"status {status}") from error
        raise RefusedError(
            f"The hub does not give {name} ({why}): status {status}",
            fix=f"Check the name and the revision; for a private repository export HF_TOKEN"
            f"{' of an account that sees it' if os.environ.get('HF_TOKEN') else ''}.",
        ) from error
    except HFValidationError as error:
        raise DataError(f"{why}: {name} is no hub id", fix="Write it like org/name.") from error
    except (transport, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and (error.filename or error.errno in _DISK_FULL):
            raise  # the disk's, not the hub's
        raise _unreachable(name, why, _first_line(error)) from error


def _unreachable(name: str, why: str, reason: str) -> EndpointError:
    token = os.environ.get("HF_TOKEN")
    return EndpointError(
        f"The hub cannot be reached for {name} ({why}): "
        f"{reason.replace(token, '…') if token else reason}",
        fix="Run it where there is a network (a login node; check HTTPS_PROXY and HF_ENDPOINT). "
        "What has arrived is kept.",
    )


def gated(name: str, why: str) -> RefusedError:
    """The refusal of a repository whose terms must be accepted first."""
    terms = f"accept its terms on the hub (https://huggingface.co/{name})"
    fix = f"First {terms}, then export HF_TOKEN=… of that account."
    if os.environ.get("HF_TOKEN"):
        fix = f"HF_TOKEN is set, but its account has no access: {terms}."
    return RefusedError(
        f"{name} ({why}) is gated: the hub gives it to known accounts only", fix=fix
    )


def was_gated(error: BaseException) -> bool:
    """Whether an error goes back to a gated repository."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__
    return cause is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
