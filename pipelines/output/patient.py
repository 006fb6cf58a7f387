"""An output that is waited for, within bounds, while its store does not answer, refuses, or has no room.

Nobody's image is at fault then, and what was computed is dear, so whoever writes or lists waits: sinks and the driver,
each process for itself. Once patience is over, further calls of that process fail at once, until one succeeds: a run
that ends waits once, not once for each file of its report.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from botocore.exceptions import ParamValidationError
from pyarrow import ArrowException

from pipelines.corpus.fault import fault_of
from pipelines.corpus.patience import Patience
from pipelines.errors import JobFailedError, UserError
from pipelines.store import Store

Out = TypeVar("Out")

NOT_PASSING = (
    *(UserError, JobFailedError, ParamValidationError, ArrowException),
    *(TypeError, AttributeError, LookupError, NameError, AssertionError),
    *(IsADirectoryError, NotADirectoryError, FileExistsError),
)
"""Errors of a program, of an address, or of content. All others are the store's: each library has types of its own."""

_waits: dict[tuple[str, float], Patience] = {}  # of the outages that this process is in


@dataclass(frozen=True, slots=True)
class PatientStore(Store):
    """A store that is out of order for up to `patience` seconds before its methods raise OutageError."""

    patience: float = 0.0

    def outlast(self, call: Callable[[], Out], *, writes: bool = False) -> Out:
        """`call()`, repeated while the store is out of order.

        Raises:
            OutageError: if patience is over.
            FileNotFoundError: unless `writes`.
        """
        key = (self.path, self.patience)
        while True:
            try:
                result = call()
            except NOT_PASSING:
                raise
            except Exception as error:
                if isinstance(error, FileNotFoundError) and not writes:
                    raise
                patience = _waits.setdefault(key, Patience(self.patience, f"output.path {self.path}"))
                patience.wait(fault_of(error))
                self.forget()
            else:
                _waits.pop(key, None)
                return result


def with_patience(store: Store, seconds: float) -> PatientStore:
    """The store, which waits up to `seconds` in an outage."""
    return PatientStore(**_fields(store), patience=seconds)


def without_patience(store: Store) -> Store:
    """The store, which waits for nothing."""
    return Store(**_fields(store))


def _fields(store: Store) -> dict[str, Any]:
    """What every store has."""
    return {field.name: getattr(store, field.name) for field in fields(Store)}
