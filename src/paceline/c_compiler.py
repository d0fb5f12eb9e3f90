"""The C compiler that Triton asks for before its first kernel on a GPU, and Python's header files. No torch.

Triton (runtime/build.py of 3.2 to 3.9) takes the program that CC names, else gcc, else clang. It builds a
small C file that includes Python.h, for this Python, and keeps the result in its folder of compiled files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

COMPILERS = ("gcc", "clang")  # in the order in which Triton looks for them
TRIAL = "#include <stdlib.h>\n#include <Python.h>\nint trial(void) { return PY_MAJOR_VERSION; }\n"
PATIENCE_S = 30.0
SAID_MAX = 160  # characters of the compiler's own error
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
        looked = f"CC is {named}" if named else " or ".join(COMPILERS)
        what = f"There is no C compiler ({looked})" + ("." if there else ", and no Python.h.")
        return Missing(what, _mend(OF_GCC if there else f"{OF_GCC} {OF_PYTHON}", is_named=bool(named)))
    if not there:
        return Missing(f"There is no {headers / 'Python.h'}.", _mend(OF_PYTHON))
    said = _tried(compiler, headers)
    return Missing(f"{compiler} cannot compile a small C file ({said}).", _mend(OF_GCC)) if said else None


def c_compiler() -> str | None:
    """The program that Triton, and what else compiles kernels, would take."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, COMPILERS)), None)


def has_compiled_before() -> bool:
    """Whether a folder where Triton keeps what it has compiled holds such a file already."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{gettempdir()}/torchinductor_{_user()}"
    folders = [home / ".triton" / "cache", *Path(kept).glob("triton/*")]
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
    """The compiler's error; "" if there is none."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "trial.c"
        source.write_text(TRIAL)
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{folder}/trial.so", f"-I{headers}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)[:SAID_MAX]
    lines = done.stderr.splitlines()
    said = next((line for line in lines if "error" in line), f"it ended with {done.returncode}")
    return said.strip()[-SAID_MAX:] if done.returncode else ""
