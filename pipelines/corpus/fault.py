"""Why a file could not be fetched, and whose fault that is: the file's, a passing one, or an outage's."""

import errno
import os
import socket
from typing import Any

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

from pipelines.errors import JobFailedError
from pipelines.images.decode import Reject

PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 531)})
REFUSALS = frozenset({401, 403})
PASSING_ERRORS = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE,
    }
)  # fmt: skip
CREDENTIALS = frozenset(
    {
        "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidSecurity",
        "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired",
    }
)  # fmt: skip
"""Codes of S3 that say that nobody's object is at fault, but the credentials (or the clock) of this machine."""


OUTAGE = "outage: "  # begins the error of a unit that failed because nothing answers
NOT_SHARED = "output: "  # because the worker does not see the driver's output; no other unit would fare better


class FetchFault(OSError):  # noqa: N818 - an outcome, not an error of the program
    """A file that could not be fetched. The text holds nothing of the address and nothing of what was read.

    Args:
        detail: for people.
        passing: whether a later try may succeed.
        answered: whether a server told anything about this very file.
        refused: whether the server refuses who asks: it may do so for this file, or for all.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(
        self,
        detail: str,
        *,
        passing: bool = False,
        answered: bool = True,
        refused: bool = False,
        retry_after: float | None = None,
    ):
        super().__init__(detail)
        self.detail, self.passing, self.answered, self.retry_after = detail, passing, answered, retry_after
        self.refused = refused

    @property
    def may_be_outage(self) -> bool:
        """Whether the file need not be to blame: it is an outage if nothing but such faults comes of any file."""
        return self.passing or self.refused or not self.answered

    def reject(self) -> Reject:
        """The row of quarantine, if nobody waits any longer."""
        return Reject("unavailable" if self.passing else "fetch", self.detail)


class OutageError(JobFailedError):
    """Nothing answers: no network, no store, or no valid credentials. No image is to blame."""


def fault_of(error: BaseException) -> FetchFault:
    """The fault behind an exception of a store (`Store.fs`)."""
    if isinstance(error, FetchFault):
        return error
    cause = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(cause, ClientError):
        return _of_s3(cause)
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return FetchFault(_shown(error))
    if isinstance(error, PermissionError):
        return FetchFault(_shown(error), refused=True)
    if isinstance(error, TimeoutError):
        return FetchFault("TimeoutError", passing=True, answered=False)
    if isinstance(error, ParamValidationError):  # such as no name of a bucket
        return FetchFault("not a valid address")
    if isinstance(error, ConnectionError | socket.gaierror | BotoCoreError | aiohttp.ClientError):
        return FetchFault(_shown(error), passing=True, answered=False)
    if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
        return FetchFault(_shown(error), passing=True, answered=False)
    return FetchFault(_shown(error))


def _of_s3(error: ClientError) -> FetchFault:
    response: Any = error.response
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    detail = f"S3 error {code}" + (f", HTTP status {status}" if status and str(status) != code else "")
    if code in CREDENTIALS:
        return FetchFault(detail, passing=True, answered=False)
    if status in PASSING_STATUSES or code in ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable"):
        return FetchFault(detail, passing=True)
    return FetchFault(detail, answered=code != "NoSuchBucket", refused=status in REFUSALS)


def _shown(error: BaseException) -> str:
    """The type of an error with the system's own words. The error's text may hold the address, with its passwords."""
    number = getattr(error, "errno", None)
    words = os.strerror(number) if isinstance(number, int) and number > 0 else ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
