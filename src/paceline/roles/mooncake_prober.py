"""The process that looks at a Mooncake master for a command: it writes into its own terminal, not the user's.

The question is the run file's section, and the name of a store: whether a producer of it lives is answered.
Without a name: what a small object's way into the store and back shows.
"""

from __future__ import annotations

import json
import sys

from paceline.features.settings import MooncakeSection
from paceline.features.stores.mooncake.link import is_seen
from paceline.features.stores.mooncake.requirements import examined
from paceline.roles.question import answer


def look(question: str) -> str:
    asked = json.loads(question)
    section = MooncakeSection.parse(asked["features"])
    if asked["store"]:
        return json.dumps({"seen": is_seen(section, asked["store"])})
    return json.dumps(examined(section))


if __name__ == "__main__":
    sys.exit(answer(look))
