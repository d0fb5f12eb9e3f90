"""How a failed compilation of a kernel is told: it is the machine's fault, never a sample's. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from paceline.c_compiler import missing_for_triton
from paceline.errors import ConfigError, is_want_of_memory, reason_of

# Classes of torch's compiler, of Triton, and of the C compiler's process that Triton starts.
_OF_COMPILERS = {
    "BackendCompilerFailed",
    "FailOnRecompileLimitHit",  # more forms of the kernel than KERNEL_FORMS; the next start begins with none
    "Unsupported",
    "TritonMissing",
    "GPUTooOldForTriton",
    "TritonError",
    "OutOfResources",
    "CalledProcessError",
}
_NO_COMPILER = "Failed to find C compiler"
_TOO_LARGE = "out of resource"  # Triton's words for shared memory and registers


@contextmanager
def failed_compilations_told() -> Iterator[None]:
    """Raise ConfigError for what a compiler of kernels raises inside; all else passes."""
    try:
        yield
    except Exception as error:
        if not _is_of_a_compiler(error) or is_want_of_memory(error):
            raise
        raise _told(error) from error


def _is_of_a_compiler(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & _OF_COMPILERS) or _NO_COMPILER in str(error)


def _told(error: Exception) -> ConfigError:
    said = str(error)
    if _TOO_LARGE in said:
        line = next(line for line in said.splitlines() if _TOO_LARGE in line)
        return ConfigError(
            f"The kernel of the draft's attention does not fit this GPU ({line.strip()[:300]}).",
            why="Wide heads need more shared memory than small GPUs have. No sample is to blame.",
            next="set method.attention: tiles, which compiles nothing and is slower, and run the same "
            "command again.",
        )
    missing = missing_for_triton()
    if missing is not None:
        mend = f"{missing.mend[:1].lower()}{missing.mend[1:].rstrip('.')}"
        return ConfigError(
            f"Triton could not compile the kernel of the draft's attention. {missing.what}",
            why="No sample is to blame and none was quarantined; what was captured and trained is kept.",
            next=f"{mend}, or set method.attention: tiles, which compiles nothing and is slower; and run "
            "the same command again.",
        )
    return ConfigError(
        f"Triton could not compile the kernel of the draft's attention ({reason_of(error)}).",
        why="No sample is to blame and none was quarantined; what was captured and trained is kept.",
        next="look at `paceline doctor RUN.yaml`, and at the versions of torch and triton; or set "
        "method.attention: tiles, which compiles nothing and is slower, and run the same command again.",
    )
