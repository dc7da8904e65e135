"""The secret of a job whose launcher made none: it is derived from a file of the user's and the job's name.

Ranks that one user started on hosts with a shared home directory hold the same `~/.ferro/secret`. Each job derives its
own from it, so that jobs cannot connect to one another by mistake.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from ferro.errors import AuthenticationError
from ferro.rendezvous.auth import private_file

SECRET_BYTES = 32

_REMEDY = "Start the job with `ferro run`, or set FERRO_SECRET to the same random value on all ranks."


def per_user_secret(home: Path | None = None) -> bytes:
    """Read this user's 32 bytes from `.ferro/secret` under `home`, which holds them as hexadecimal digits, or make it.

    Ranks that make the file at the same time end with the same secret. AuthenticationError says that others can read
    the file or own it, or that it is damaged or cannot be written.
    """
    try:
        path = (home or Path.home()) / ".ferro" / "secret"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            with suppress(FileExistsError):  # another rank was first; its secret is read below
                private_file.write(path, secrets.token_hex(SECRET_BYTES).encode() + b"\n", os.link)
        secret = bytes.fromhex(private_file.read(path, 4 * SECRET_BYTES).decode("ascii"))
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"it holds {len(secret)} bytes instead of {SECRET_BYTES}")
        return secret
    except (private_file.NotPrivateError, ValueError) as exc:
        raise AuthenticationError(
            f"the secret cannot be trusted: {exc}. If you made it yourself run `chmod 600 {path}`; else remove it, and "
            "the next job makes a new one."
        ) from exc
    except RuntimeError as exc:
        raise AuthenticationError(f"this user has no home directory to keep a secret in. {_REMEDY}") from exc
    except OSError as exc:
        raise AuthenticationError(f"the secret in {path} cannot be read or made: {exc}. {_REMEDY}") from exc


def derive(secret: bytes, job: str) -> bytes:
    """Derive the secret of one job: HMAC-SHA256(secret, job), 32 bytes."""
    return hmac.new(secret, job.encode(), hashlib.sha256).digest()
