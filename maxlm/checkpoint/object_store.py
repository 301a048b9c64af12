"""Objects under a URL, through TensorStore's KvStore: list, read, write, delete, each in bounded time.

TensorStore tries a request again when the server is busy or the line is cut; its own 32 tries may take half an hour.
Here it has 9 (some 40 s), and no request, tries included, takes longer than `SECONDS`.
"""

from __future__ import annotations

import os
import urllib.parse
from typing import Any

from maxlm.checkpoint.layout import CheckpointError

RETRIES = {"max_retries": 9, "initial_delay": "500ms", "max_delay": "8s"}
SECONDS = 300.0
BRIEFLY = 5.0  # for what is only tidied up

_CAUSES = (  # what TensorStore says, what we say, how to fix it
    (("PERMISSION_DENIED", "UNAUTHENTICATED"), "access denied",
     "check the credentials, and that they may list, read, write and delete there"),
    (("NOT_FOUND",), "no such bucket", "check the URL"),
    (("INVALID_ARGUMENT", "Invalid "), "not a URL of an object store", "check the URL"),
)


class Objects:
    """The objects whose names begin with `url`; keys are what follows. Every method raises CheckpointError in one line
    that says what to do."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") + "/"
        self._kvstore: Any = None

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        kvstore = self._open()
        return sorted(key.decode() for key in self._wait("listing", prefix, kvstore.list, _range(prefix)))

    def read(self, key: str) -> bytes | None:
        """The object's bytes; None where there is no such object."""
        found = self._wait("reading", key, self._open().read, key)
        return found.value if found.state == "value" else None

    def write(self, key: str, data: bytes, *, seconds: float | None = None) -> None:
        """Makes or replaces the object, at once and whole."""
        self._wait("writing", key, self._open().write, key, data, seconds=seconds)

    def delete(self, prefix: str, *, seconds: float | None = None) -> None:
        """Deletes every object whose key begins with `prefix`, in no order."""
        self._wait("deleting", prefix, self._open().delete_range, _range(prefix), seconds=seconds)

    def _open(self) -> Any:
        if self._kvstore is None:
            import tensorstore as ts

            context = ts.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})
            self._kvstore = self._wait("opening", "", ts.KvStore.open, _spec(self.url), context=context)
        return self._kvstore

    def _wait(self, doing: str, key: str, start: Any, *args: Any, seconds: float | None = None, **options: Any) -> Any:
        seconds = seconds or SECONDS
        try:
            return start(*args, **options).result(timeout=seconds)
        except (ValueError, TimeoutError) as error:  # TensorStore reports everything as ValueError
            said = str(error) or f"no answer in {seconds:g} s"
            for patterns, problem, fix in _CAUSES:
                if any(pattern in said for pattern in patterns):
                    raise CheckpointError(f"{problem} while {doing} {self.url}{key}: {fix}") from error
            first = said.splitlines()[0][:200]
            raise CheckpointError(f"the object store does not answer while {doing} {self.url}{key} ({first}): what is "
                                  "saved stays; run the same command again when it does") from error


def _spec(url: str) -> Any:
    """What TensorStore opens. An S3-compatible store is where AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL says, as for
    AWS's own tools; TensorStore's URLs cannot say it."""
    parts = urllib.parse.urlsplit(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if parts.scheme != "s3" or not endpoint:
        return url
    path = urllib.parse.unquote(parts.path).lstrip("/")
    return {"driver": "s3", "bucket": parts.netloc, "path": path, "endpoint": endpoint}


def _range(prefix: str) -> Any:
    import tensorstore as ts

    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else ts.KvStore.KeyRange()
