"""Finds the folder of the target that a run file names: a local folder, or a model of the Hugging Face hub.

The hub's own client downloads, resumes, checks and caches. Only configuration, tokenizer and safetensors are
fetched, never code. A message of ours holds no text of the hub's answers, and so no token. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from paceline.errors import ConfigError
from paceline.target.settings import TargetSection

DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja"]  # configuration and tokenizer
WANTED = [*DESCRIPTION, "*.safetensors"]
UNWANTED = ["*/*", "consolidated*", "*.lora.safetensors"]  # other formats of the same weights lie in folders
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_of_hub(target: TargetSection) -> bool:
    """Whether the target is a model of the hub, and no local folder."""
    return not target.model.exists() and HUB_NAME.fullmatch(str(target.model)) is not None


def described_target(target: TargetSection) -> TargetSection:
    """As `local_target`, in a folder that may lack the weights: they are not fetched."""
    return local_target(target, DESCRIPTION)


def local_target(target: TargetSection, wanted: Sequence[str] = WANTED) -> TargetSection:
    """The section with `model` as a local folder and `revision` as the commit of a hub's model.

    A folder that exists wins. A model of the hub is downloaded, or taken from the hub's cache where there is
    no network or it is switched off (HF_HUB_OFFLINE). Raises ConfigError.
    """
    name = str(target.model)
    if not is_of_hub(target):
        if target.revision is not None:
            raise ConfigError(
                f"target.revision is {target.revision!r}, and target.model {name} is no model of the hub.",
                why="A local folder has no revisions; the digest of its files binds it to the run.",
                next="remove target.revision, or name the model as organisation/name.",
            )
        return target
    folder = _snapshot(name, target.revision, wanted)
    return target.model_copy(update={"model": folder, "revision": folder.name})


def _snapshot(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{name} at revision {revision}" if revision else name
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=UNWANTED)
        )
    except errors.GatedRepoError:
        reason, advice = "the hub gives it only to users who accepted its terms", _LOG_IN
    except errors.RepositoryNotFoundError:
        reason, advice = f"there is neither a folder {name} nor such a model that you may read", _LOG_IN
    except errors.RevisionNotFoundError:
        reason, advice = "the model has no such revision", "correct target.revision."
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        reason, advice = f"the hub answered {status}", _LOG_IN if status in (401, 403) else _AGAIN
    except errors.HFValidationError:
        reason, advice = "that is no name of a model", "name a folder, or a model as organisation/name."
    except errors.LocalEntryNotFoundError:
        reason, advice = "it is not whole in the hub's local cache, and the hub cannot be reached", _AGAIN
    except Exception as error:  # noqa: BLE001 (the client lets errors of its own libraries through)
        reason, advice = f"the download failed ({type(error).__name__})", _AGAIN
    raise ConfigError(
        f"The target {at} cannot be fetched: {reason}.",
        why="Every role reads the target from one local folder. Nothing was started.",
        next=advice,
    )


_LOG_IN = "check the name; accept the model's terms on its page, and log in with `hf auth login`."
_AGAIN = "run the command again with a network, or set target.model to a local folder of the model."
