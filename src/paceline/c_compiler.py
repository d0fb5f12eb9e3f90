"""The C compiler that Triton asks for before its first kernel on a GPU, and Python's header files. No torch.

Triton (runtime/build.py of 3.2 to 3.9) takes the program that CC names (one without arguments; an empty CC
names none), else gcc, else clang. It builds a small C file that includes Python.h, for this Python, and keeps
the result in its folder of compiled files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

COMPILERS = ("gcc", "clang")  # in the order in which Triton looks for them
TRIAL = "#include <stdlib.h>\n#include <Python.h>\nint trial(void) { return PY_MAJOR_VERSION; }\n"
PATIENCE_S = 30.0
SAID_MAX = 160  # characters of the compiler's own error
ROOM = "Free space in /tmp, or set TMPDIR to a folder that can be written."
_NO_ROOM = ("No space left on device", "Cannot create temporary file")
OF_GCC = "gcc libc6-dev"  # gcc only recommends the second one, so small images have it without
OF_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"


@dataclass(frozen=True)
class Missing:
    """`what` Triton would miss, and the `mend`: a sentence each."""

    what: str
    mend: str


def missing_for_triton() -> Missing | None:
    """None if a small C file can be compiled as Triton does it, which takes some tenths of a second."""
    named, compiler, headers = os.environ.get("CC"), c_compiler(), _headers()
    there = (headers / "Python.h").is_file()
    if compiler is None:
        looked = " or ".join(COMPILERS) if named is None else f"CC is {named}" if named else "CC is empty"
        what = f"There is no C compiler ({looked})" + ("." if there else ", and no Python.h.")
        return Missing(what, _mend(OF_GCC if there else f"{OF_GCC} {OF_PYTHON}", is_named=named is not None))
    if not there:
        return Missing(f"There is no {headers / 'Python.h'}.", _mend(OF_PYTHON))
    try:
        said = _tried(compiler, headers)
    except OSError as error:  # of the folder, before the compiler
        return Missing(f"No temporary file can be written, as compilers must ({error}).", ROOM)
    mend = ROOM if any(words in said for words in _NO_ROOM) else _mend(OF_GCC)
    return Missing(f"{compiler} cannot compile a small C file ({said}).", mend) if said else None


def c_compiler() -> str | None:
    """The program that Triton, and what else compiles kernels, would take."""
    named = os.environ.get("CC")
    found = map(shutil.which, COMPILERS if named is None else (named,))
    return next(filter(None, found), None)


def has_compiled_before() -> bool:
    """Whether a folder where Triton keeps what it has compiled holds such a file already."""
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))  # noqa: PTH111 (never raises)
    folders = [home / ".triton" / "cache"]
    with suppress(OSError):  # of gettempdir, where no folder can be written
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{gettempdir()}/torchinductor_{_user()}"
        folders += Path(kept).glob("triton/*")
    if named := os.environ.get("TRITON_CACHE_DIR"):
        folders = [Path(named)]
    return any(found for folder in folders for found in folder.glob("*/cuda_utils*.so"))


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # of a container that knows no name for its user
        return f"uid_{os.getuid()}"


def _headers() -> Path:
    """Where Triton expects Python.h; Debian's own scheme names another folder."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_paths(scheme=scheme)["include"])


def _mend(packages: str, *, is_named: bool = False) -> str:
    other = ", or correct CC" if is_named else ""
    return f"Install it (Debian and Ubuntu: `apt-get install {packages}`){other}."


def _tried(compiler: str, headers: Path) -> str:
    """The compiler's error, in English; "" if there is none. Raises OSError if no file can be written."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "trial.c"
        source.write_text(TRIAL)
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{folder}/trial.so", f"-I{headers}"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {PATIENCE_S:.0f} s"
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)[:SAID_MAX]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"it ended with {done.returncode}"
    said = next((line for line in lines if "error" in line), last)
    return said.strip()[-SAID_MAX:] if done.returncode else ""
