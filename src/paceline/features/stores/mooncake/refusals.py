"""The errors of the store on Mooncake."""

from __future__ import annotations

from paceline.errors import ConfigError, FeatureForgottenError, StoreError, StoreFullError
from paceline.types import SampleRef

PACKAGE = "mooncake-transfer-engine-non-cuda"
LIBRARIES = "libibverbs1 librdmacm1 ibverbs-providers libnuma1"


def no_package(error: ImportError) -> ConfigError:
    """`error`: what the import of mooncake.store raised."""
    if ".so" in str(error):
        return ConfigError(
            f"Mooncake is installed, and a library of the system that it needs is not ({error}).",
            why="features.store is mooncake.",
            next=f"`sudo apt-get install {LIBRARIES}` (Debian, Ubuntu), then run the same command again.",
        )
    return ConfigError(
        f"Mooncake is not installed ({error}).",
        why="features.store is mooncake.",
        next=f"pip install 'paceline[mooncake]' (with CUDA: mooncake-transfer-engine instead of {PACKAGE}); "
        f"on Debian also `apt-get install {LIBRARIES}`.",
    )


def too_old(version: str) -> ConfigError:
    return ConfigError(
        f"Mooncake {version} cannot pin objects.",
        why="It would evict samples that were not trained yet, again and again.",
        next=f"pip install --upgrade '{PACKAGE}>=0.3.13'",
    )


def away(master: str, reason: str, waited_s: float) -> StoreError:
    return StoreError(
        f"The Mooncake master at {master} did not answer for {waited_s:.0f} s ({reason}).",
        why="The place is at fault, not a sample: none was lost, failed or quarantined for it.",
        next=f"start it again (`mooncake_master --rpc_port={master.rpartition(':')[2]}`) or correct "
        "features.master, and run the same command again. What it had forgotten is captured again.",
    )


def no_client(master: str, host: str, segment_mib: int, code: int) -> StoreError:
    return StoreError(
        f"No Mooncake client can be set up as {host} with {segment_mib} MiB at the master {master} "
        f"(code {code}).",
        why="Something else answers at that port, or this host has not so much memory, or no such device.",
        next="check that a `mooncake_master` of the same version listens there, features.segment_mib, "
        "features.host and features.devices; `paceline doctor RUN.yaml` looks at them.",
    )


def no_segment_has_room(master: str, key: str, size: int, waited_s: float) -> StoreFullError:
    return StoreFullError(
        f"No memory at the Mooncake master {master} had room for {size} bytes ({key}) for {waited_s:.0f} s.",
        why="The segments that live clients give are smaller than features.budget_mib, or others fill them. "
        "Nothing of the sample was stored, and no sample is to blame.",
        next="raise features.segment_mib, start another producer or `mooncake_client`, or lower "
        "features.budget_mib, and run the same command again.",
    )


def refuses(master: str, verb: str, key: str, code: int) -> StoreError:
    return StoreError(
        f"Mooncake at {master} cannot {verb} {key} (code {code}).",
        why="The place is at fault, not a sample: none was lost, failed or quarantined for it.",
        next="look the code up in Mooncake's include/types.h and into the master's log, then run the same "
        "command again.",
    )


def not_this_master(master: str, sample_id: str, tries: int) -> StoreError:
    return StoreError(
        f"The features of {sample_id!r} were captured {tries} times and are not at the Mooncake master "
        f"{master}, which knows no producer of this run either.",
        why="The producers store them at another master, so each sample would be lost again and again. "
        "Nothing was trained on it.",
        next="give all roles of the run the same features.master, and run the same command again.",
    )


def forgotten(ref: SampleRef, key: str, code: int) -> FeatureForgottenError:
    return FeatureForgottenError(
        f"There are no features of {ref.sample_id!r} in {ref.feature_store_uri}: Mooncake has no object "
        f"{key} that can be read (code {code}).",
        why="The master was started again, the producer that held it has ended, or it was freed.",
        next="report it lost; `paceline produce RUN.yaml` captures it again.",
    )


def closed(master: str) -> StoreError:
    return StoreError(
        f"The feature store at the Mooncake master {master} was closed by this process.",
        why="Its memory is no longer part of the store.",
        next="open it again.",
    )
