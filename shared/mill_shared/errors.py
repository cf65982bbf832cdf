"""Everything that can go wrong, drawn once.

MillError
├── ConfigError        wrong for every worker, for ever: schema, missing weights, no such bucket, no permission
│   └── PlanMismatch   the run exists with another identity
├── OutsideError       something outside the images is unavailable now: timeouts, 5xx, a lost model server
│   └── DeviceLostError  the device is unusable until the process ends
├── StalledError       no image finished for too long
├── CoverageError      too few records, or too many failed ones, to finalize
├── InvariantError     a bundle would be wrong
└── CorruptError       stored data does not match its digest, or is missing

ImageError lies in one image. It becomes a `failed` record and never leaves the label loop.
DeviceMemoryError asks the label loop to work the chunk again with half the batch.
KeyMissing and AlreadyExists are a store's answers: no such object; a create-once write that came second.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process says when it ends. Kubernetes manifests are generated from this list.

    Ours lie in 70-89. INTERRUPTED is the system's own code for SIGTERM: no handler runs, so nothing can be half done.
    Usage errors on the command line are click's 2.
    """

    OK = 0
    INTERNAL = 70
    """A defect of Labelmill itself; the traceback is in the log."""
    OUTSIDE = 75
    """Something outside was unavailable for too long. Trying again may help."""
    STALLED = 76
    """No image finished for too long. Trying again may help."""
    CONFIG = 78
    """Wrong for every worker, for ever. Trying again cannot help."""
    COVERAGE = 80
    """Too few records, or too many failed ones, to finalize."""
    INVARIANT = 81
    """The bundle would break a rule that the trainer depends on."""
    CORRUPT = 82
    """Stored data is missing or does not match its digest."""
    PENDING = 83
    """Pods of a run could not start for too long. Only `millctl` says it; what the pods wait for is in its message."""
    INTERRUPTED = 143
    """SIGTERM. Never counts as a failure."""


class MillError(Exception):
    """Root of all errors that end a command. The message is one line: what, which value, what to do."""

    exit_code = ExitCode.INTERNAL


class ConfigError(MillError):
    """The configuration, the weights or the permissions are wrong for every worker, for ever."""

    exit_code = ExitCode.CONFIG


class PlanMismatch(ConfigError):
    """The run exists already with another identity; the message names the fields that differ."""


class OutsideError(MillError):
    """Something outside the images is unavailable now; never becomes a record."""

    exit_code = ExitCode.OUTSIDE


class DeviceLostError(OutsideError):
    """The device is unusable for the rest of this process (a sticky CUDA error); waiting cannot help."""


class StalledError(MillError):
    """No image finished within the watchdog's limit."""

    exit_code = ExitCode.STALLED


class CoverageError(MillError):
    """Too few images have a record, or too many records are `failed`."""

    exit_code = ExitCode.COVERAGE


class InvariantError(MillError):
    """A bundle would break a rule that the trainer depends on."""

    exit_code = ExitCode.INVARIANT


class CorruptError(MillError):
    """A stored object is missing or does not match its digest."""

    exit_code = ExitCode.CORRUPT


class ImageError(Exception):
    """The fault lies in one image; `reason` is a short key, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class AlreadyExists(Exception):
    """A create-once write found another object under its key."""


class KeyMissing(Exception):
    """A store that answers has no object under this key."""


class DeviceMemoryError(Exception):
    """The device ran out of memory; the same work in smaller batches may fit."""
