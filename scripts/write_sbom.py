"""Write a software bill of materials: write_sbom.py OUT.json

What this environment has of the packages that a run needs, with versions and licences, as CycloneDX JSON. The
tool of the CycloneDX project reads the environment; what only developers need is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
from paceline import __version__  # noqa: E402 (of this folder)

MAIN = "root-component"  # the tool's name for the package itself


def environment() -> dict[str, Any]:
    """The tool's document of all that is installed beside this Python."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), sys.executable]
    document: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return document


def needed() -> set[str]:
    """The names of the packages that a run needs, directly or not, without extras of this package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    left, found = [Requirement(text) for text in project["dependencies"]], set()
    while left:
        requirement = left.pop()
        extras = requirement.extras or {""}
        if (key := (canonicalize_name(requirement.name), *sorted(extras))) in found:
            continue
        found.add(key)
        further = [Requirement(text) for text in requires(requirement.name) or []]
        left += [
            one for one in further if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras)
        ]
    return {key[0] for key in found}


def bill() -> dict[str, Any]:
    """The document, of what a run needs alone. Raises PackageNotFoundError if something of it is missing."""
    document, names = environment(), needed()
    document["components"] = [
        part for part in document["components"] if canonicalize_name(part["name"]) in names
    ]
    refs = {part["bom-ref"] for part in document["components"]} | {MAIN}
    document["dependencies"] = [
        {**entry, "dependsOn": [ref for ref in entry.get("dependsOn", []) if ref in refs]}
        for entry in document["dependencies"]
        if entry["ref"] in refs
    ]
    document["metadata"]["component"]["version"] = __version__
    return document


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bill(), indent=1) + "\n")
