"""A kernel that cannot be compiled ends training with advice, and costs no sample."""

from __future__ import annotations

import subprocess

import pytest
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported

from paceline.c_compiler import Missing
from paceline.errors import ConfigError
from paceline.training import compilation as module
from paceline.training.compilation import failed_compilations_told


def of_torch(text: str) -> Exception:
    """As torch's compiler tells the error inside, whose class stands before its text."""
    kind, _, rest = text.partition(": ")
    return BackendCompilerFailed(None, type(kind, (Exception,), {})(rest), None)


NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable."
TOO_LARGE = (
    "RuntimeError: No valid triton configs.\n"
    "OutOfMemoryError: out of resource: triton_tem_fused Required: 114688 Hardware limit:101376"
)


def raised(error: Exception) -> Exception:
    with pytest.raises(Exception) as caught, failed_compilations_told():  # noqa: PT011 (which one is asked)
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        of_torch(f"RuntimeError: {NO_COMPILER}"),
        RuntimeError(NO_COMPILER),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of torch, Triton and the C compiler raised; the cause stays attached."""
    missing = Missing("There is no Python.h.", "Install it (`apt-get install python3-dev`).")
    monkeypatch.setattr(module, "missing_for_triton", lambda: missing)
    told = raised(error)
    assert isinstance(told, ConfigError)
    assert "There is no Python.h." in told.what
    assert told.next.startswith("install it (`apt-get install python3-dev`), or set method.attention: tiles")
    assert told.__cause__ is error


def test_a_kernel_that_is_too_large_for_the_gpu_has_tiles_to_go_to() -> None:
    """GPUs of 24 GB have half the shared memory of those in data centres."""
    told = raised(of_torch(TOO_LARGE))
    assert isinstance(told, ConfigError)
    assert "Required: 114688 Hardware limit:101376" in told.what
    assert told.next.startswith("set method.attention: tiles")


def test_another_failure_of_a_compiler_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "missing_for_triton", lambda: None)
    told = raised(of_torch("AssertionError: unsupported PTX"))
    assert isinstance(told, ConfigError)
    assert "unsupported PTX" in told.what
    assert "paceline doctor" in told.next


@pytest.mark.parametrize("kind", [FailOnRecompileLimitHit, Unsupported])
def test_a_kernel_in_too_many_forms_blames_no_sample(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises these, and no error of a backend, where it would compute without the kernel."""
    monkeypatch.setattr(module, "missing_for_triton", lambda: None)
    told = raised(kind("recompile_limit reached with fullgraph=True"))
    assert isinstance(told, ConfigError)
    assert "recompile_limit reached" in told.what


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        of_torch("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=["of a sample", "of memory"],
)
def test_errors_of_samples_and_of_memory_pass(error: Exception) -> None:
    """Isolation knows what to do with these."""
    assert raised(error) is error
