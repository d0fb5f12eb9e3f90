"""Every error Paceline raises on purpose.

    PacelineError
    ├── ConfigError          the run file, the prompt file or the machine does not fit  (ValueError) 2
    │   └── LedgerMissingError     there is no ledger where one is looked at
    ├── RunBusyError         another live process already holds this role of the run                  3
    ├── EngineError          the target model cannot be loaded or run                                 4
    │   ├── CaptureMismatchError   captured states do not reproduce the model's own argmax
    │   └── ServerUnavailableError the engine's server does not answer; no prompt is to blame
    ├── StoreError           the feature store (data plane)                                           5
    │   ├── FeatureMissingError    no sealed bytes under that key                         (KeyError)
    │   │   └── FeatureStoreElsewhereError   the ref names another store than the one here
    │   ├── FeatureCorruptError    sealed bytes do not match their digest
    │   └── StoreFullError         no room for another sample                             (OSError)
    ├── LedgerError          the metadata store (control plane)                                       6
    │   ├── FencedError            a newer process took over this role                              11
    │   ├── IllegalTransitionError the protocol forbids this change of state
    │   ├── IntentRevokedError     the byte intents of this commit were revoked; write the bytes again
    │   ├── UnknownResultError     it is unknown whether the change was made; repeat it
    │   ├── LedgerRegressedError   the ledger has lost changes that this process knows of
    │   └── SchemaError            this version cannot open the database
    ├── CheckpointError      no valid checkpoint where one is needed                                  7
    │   └── CheckpointDamagedError it is missing, or not as it was written
    ├── TrainingError        the optimizer step itself failed (loss is not a number)                  8
    ├── ExportError          an exported folder does not draft as the checkpoint does                  10
    ├── RanksError           a rank of the training died, is late, or contradicts another one         12
    └── UnforeseenError      any other exception, reported in the same three parts                    1

The numbers are exit codes. A message has three parts: what happened, with ids and values; why it matters;
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
    exit_code = 2


class LedgerMissingError(ConfigError):
    pass


class RunBusyError(PacelineError):
    exit_code = 3


class EngineError(PacelineError):
    exit_code = 4


class CaptureMismatchError(EngineError):
    pass


class ServerUnavailableError(EngineError):
    pass


class StoreError(PacelineError):
    exit_code = 5


class FeatureMissingError(StoreError, KeyError):
    pass


class FeatureStoreElsewhereError(FeatureMissingError):
    pass


class FeatureCorruptError(StoreError):
    pass


class StoreFullError(StoreError, OSError):
    pass


class LedgerError(PacelineError):
    exit_code = 6


class FencedError(LedgerError):
    exit_code = 11


class IllegalTransitionError(LedgerError):
    pass


class IntentRevokedError(LedgerError):
    pass


class UnknownResultError(LedgerError):
    pass


class LedgerRegressedError(LedgerError):
    pass


class SchemaError(LedgerError):
    pass


class CheckpointError(PacelineError):
    exit_code = 7


class CheckpointDamagedError(CheckpointError):
    pass


class TrainingError(PacelineError):
    exit_code = 8


class ExportError(PacelineError):
    exit_code = 10


class RanksError(PacelineError):
    exit_code = 12


class UnforeseenError(PacelineError):
    pass


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


SAID_MAX = 1000  # characters of an unknown error's own text


def is_want_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, torch on the CPU and torch on a GPU raise different types for it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    told = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(
        words in text for words in (*told, "alloc_failed")
    )
