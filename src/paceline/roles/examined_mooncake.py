"""What `paceline doctor` says of a Mooncake master. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator

from paceline.config.run import RunConfig
from paceline.features.settings import MooncakeSection
from paceline.roles.examined import Examined
from paceline.roles.question import ask

WATERMARK = 0.9  # mooncake_master --eviction_high_watermark_ratio


def the_mooncake_master_works(config: RunConfig | None) -> Iterator[Examined]:
    """Send a pinned object there and back, from a process of its own."""
    section = None if config is None else config.features
    if config is None or not isinstance(section, MooncakeSection):
        return
    question = json.dumps({"features": section.model_dump(mode="json"), "store": ""})
    told = json.loads(
        ask("paceline.roles.mooncake_prober", question, "look at the Mooncake master", threads=1)
    )
    yield Examined(
        topic="features",
        state="good",
        what=f"mooncake {told['version']}: 1 MiB takes {told['put_ms']} ms to {section.master} and "
        f"{told['get_ms']} ms back; others reach this host as {told['address']}",
    )
    yield Examined(
        topic="features",
        state="note",
        what="Mooncake's clients listen on every address of their host, without a password",
        mend="Let a firewall or a network of its own keep others away (SECURITY.md).",
    )
    given = section.given_mib * config.machine.producers
    if section.given_mib and given * WATERMARK < section.budget_mib:
        yield Examined(
            topic="features",
            state="note",
            what=f"the producers give {given} MiB, and features.budget_mib is {section.budget_mib}: puts may "
            "find no room",
            mend=f"Raise features.segment_mib to {int(section.budget_mib / WATERMARK) + 1}, or let "
            "`mooncake_client` processes give memory.",
        )
