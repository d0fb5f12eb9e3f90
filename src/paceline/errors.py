"""Every error Paceline raises on purpose: one tree, and docs/errors.md is written from it and its texts.

A message has three parts: what happened, with ids and values; why it matters;
the next command to type. They are separate arguments so that every error comes with advice.
"""

from __future__ import annotations

import errno

DEBUG_VARIABLE = "PACELINE_DEBUG"  # of the environment: where it is set, errors show their tracebacks


class PacelineError(Exception):
    """Base of all errors: `what` happened, `why` it matters, what to do `next`."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", next: str = "") -> None:
        self.what, self.why, self.next = what, why, next
        super().__init__(" ".join(part for part in (what, why, next and f"Next: {next}") if part))

    def __str__(self) -> str:
        # KeyError quotes its argument; the message must read the same on every branch.
        return str(self.args[0])


class ConfigError(PacelineError, ValueError):
    """The run file, the data, an option or the machine does not fit."""

    exit_code = 2


class LedgerMissingError(ConfigError):
    """There is no ledger where one is looked at."""


class RunBusyError(PacelineError):
    """Another live process holds this role of the run."""

    exit_code = 3


class EngineError(PacelineError):
    """The target cannot be loaded or run."""

    exit_code = 4


class CaptureMismatchError(EngineError):
    """Captured states do not reproduce what the model itself computes."""


class ServerUnavailableError(EngineError):
    """The engine's server does not answer; no prompt is to blame."""


class StoreError(PacelineError):
    """The feature store, which holds the tensors, fails."""

    exit_code = 5


class FeatureMissingError(StoreError, KeyError):
    """No sealed bytes lie under that key."""


class FeatureStoreElsewhereError(FeatureMissingError):
    """The features lie in another store than the one here."""


class FeatureForgottenError(FeatureMissingError):
    """The store, which is a cache, has lost sealed bytes; no sample is to blame."""


class FeatureCorruptError(StoreError):
    """Sealed bytes do not match their digest."""


class StoreFullError(StoreError, OSError):
    """There is no room for another sample."""


class LedgerError(PacelineError):
    """The ledger, which holds the metadata, fails or does not fit the run."""

    exit_code = 6


class FencedError(LedgerError):
    """A newer process has taken over this role."""

    exit_code = 11


class IllegalTransitionError(LedgerError):
    """The protocol forbids this change of state."""


class IntentRevokedError(LedgerError):
    """The right to write these bytes was revoked; they are to be written again."""


class UnknownResultError(LedgerError):
    """It is unknown whether the change was made; it may be repeated."""


class LedgerRegressedError(LedgerError):
    """The ledger has lost changes that this process knows of."""


class SchemaError(LedgerError):
    """This version cannot open the database, or it is damaged."""


class CheckpointError(PacelineError):
    """There is no valid checkpoint where one is needed."""

    exit_code = 7


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is missing, or not as it was written."""


class TrainingError(PacelineError):
    """The optimizer step itself failed, as by a loss that is not a number."""

    exit_code = 8


class ExportError(PacelineError):
    """An exported folder does not draft as the checkpoint does."""

    exit_code = 10


class RanksError(PacelineError):
    """A rank of the training died, is late, or contradicts another one."""

    exit_code = 12


class UnforeseenError(PacelineError):
    """Any other exception, told in the same three parts."""


_OF_THE_SYSTEM = {
    errno.ENOSPC: "free space on that disk, then run the same command again.",
    errno.EDQUOT: "free space within your quota, then run the same command again.",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 1024`) and run the same command again.",
    errno.EFBIG: "check that file, and the limit of file sizes (`ulimit -f`).",
    errno.EACCES: "run it as a user with the needed permissions, or change them.",
    errno.EPERM: "run it as a user with the needed permissions, or change them.",
    errno.EROFS: "make that filesystem writable, then run the same command again.",
    errno.ENAMETOOLONG: "choose a shorter path.",
    errno.ELOOP: "a link leads to itself: remove it.",
}


def explained(error: Exception) -> PacelineError:
    """The error as a PacelineError with advice, without a traceback; a PacelineError stays as it is."""
    if isinstance(error, PacelineError):
        return error
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename} cannot be used" if error.filename else "The system refused a request"
        return UnforeseenError(
            f"{where} ({error.strerror}).",
            next=_OF_THE_SYSTEM.get(error.errno or 0, "check that path and its disk, then run it again."),
        )
    if isinstance(error, MemoryError):
        return UnforeseenError("There is not enough memory.", next="free some, and run it again.")
    said = f"{type(error).__name__}: {error}"
    return UnforeseenError(
        f"Paceline met an error that it does not know ({said[:SAID_MAX]}).",
        why="What was recorded before is safe.",
        next="run it again as `paceline --debug ...` and report what it prints, or the end of logs/*.log.",
    )


REASON_MAX = 300


def reason_of(error: BaseException) -> str:
    """A library's error in one line. Its type stands before what says nothing alone, such as a bare key; a
    heading goes with the line below it."""
    first, _, rest = str(error).strip().partition("\n")
    kind = type(error).__name__
    first = first.rstrip()
    if first.endswith(":") and rest:
        first = f"{first} {rest.strip().splitlines()[0].strip()}"
    if isinstance(error, _SAY_LITTLE) and first:
        first = f"{kind}: {first}"
    return first[:REASON_MAX] or kind


_SAY_LITTLE = (LookupError, AttributeError, TypeError, AssertionError, ArithmeticError)
SAID_MAX = 1000  # characters of an unknown error's own text


def is_want_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, torch on the CPU and torch on a GPU raise different types for it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    told = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(
        words in text for words in (*told, "alloc_failed")
    )
