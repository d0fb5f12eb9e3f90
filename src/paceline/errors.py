"""Every error Paceline raises on purpose.

    PacelineError
    ├── ConfigError          the run file, the prompt file or the machine does not fit  (ValueError) 2
    ├── RunBusyError         another live process already holds this role of the run                  3
    ├── EngineError          the target model cannot be loaded or run                                 4
    │   └── CaptureMismatchError   captured states do not reproduce the model's own argmax
    ├── StoreError           the feature store (data plane)                                           5
    │   ├── FeatureMissingError    no sealed bytes under that key                         (KeyError)
    │   ├── FeatureCorruptError    sealed bytes do not match their digest
    │   └── StoreFullError         no room for another sample                             (OSError)
    ├── LedgerError          the metadata store (control plane)                                       6
    │   ├── FencedError            a newer process took over this role
    │   ├── IllegalTransitionError the protocol forbids this change of state
    │   ├── IntentRevokedError     the bytes of this commit were given up; write them again
    │   ├── UnknownResultError     it is not known whether the change was made; repeat it
    │   └── SchemaError            the database is not one this version can open
    ├── CheckpointError      no valid checkpoint where one is needed                                  7
    │   └── CheckpointDamagedError it is missing, or not as it was written
    └── TrainingError        the optimizer step itself failed (loss is not a number)                  8

The numbers are exit codes. A message has three parts: what happened with which ids or values; why it
matters; the next command to type. They are given apart so that no error is written without advice.
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of all. `what` happened, `why` it matters, what to do `next`."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", next: str = "") -> None:
        self.what, self.why, self.next = what, why, next
        super().__init__(" ".join(part for part in (what, why, next and f"Next: {next}") if part))

    def __str__(self) -> str:
        # KeyError quotes its argument; the message must read the same on every branch.
        return str(self.args[0])


class ConfigError(PacelineError, ValueError):
    exit_code = 2


class RunBusyError(PacelineError):
    exit_code = 3


class EngineError(PacelineError):
    exit_code = 4


class CaptureMismatchError(EngineError):
    pass


class StoreError(PacelineError):
    exit_code = 5


class FeatureMissingError(StoreError, KeyError):
    pass


class FeatureCorruptError(StoreError):
    pass


class StoreFullError(StoreError, OSError):
    pass


class LedgerError(PacelineError):
    exit_code = 6


class FencedError(LedgerError):
    pass


class IllegalTransitionError(LedgerError):
    pass


class IntentRevokedError(LedgerError):
    pass


class UnknownResultError(LedgerError):
    pass


class SchemaError(LedgerError):
    pass


class CheckpointError(PacelineError):
    exit_code = 7


class CheckpointDamagedError(CheckpointError):
    pass


class TrainingError(PacelineError):
    exit_code = 8
