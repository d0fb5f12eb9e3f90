"""Start vLLM's server on processors: serve.py MODEL [arguments of `vllm serve`]. Run by the venv of vLLM.

The package for processors has another name than the command `vllm` looks for, so its module is started
instead. The two modules beside this file mend what that package cannot do yet; vLLM finds them by name.
"""

import os
import sys
from pathlib import Path

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the caller binds the process
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    model, *arguments = sys.argv[1:]
    here = str(Path(__file__).resolve().parent)
    environment = {**SETTINGS, **os.environ, "PYTHONPATH": here}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606 (no shell)


if __name__ == "__main__":
    main()
