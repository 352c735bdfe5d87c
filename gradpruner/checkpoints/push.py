"""Push a saved checkpoint to the Hugging Face Hub, into a private repository."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gradpruner.checkpoints.adapter import ADAPTER_CONFIG_FILE, ADAPTER_FOLDER
from gradpruner.checkpoints.checkpoint import SHAPE_FILE
from gradpruner.checkpoints.model_card import LOCAL, adapter_card, usage
from gradpruner.files import write_json, write_text
from gradpruner.messages import one_line
from gradpruner.models.contents import CONFIG_FILE
from gradpruner.models.hub import unreachable_reason
from gradpruner.models.origin import CARD

logger = logging.getLogger(__name__)

MESSAGE = "Upload a checkpoint pruned with gradpruner"


class PushError(OSError):
    """A checkpoint could not be pushed; it is unchanged."""


def check_push(repository: str, asks_hub: bool = True) -> None:
    """Refuses what cannot be pushed to, before any work.

    Args:
        repository: `OWNER/NAME`.
        asks_hub: also ask the Hub whether it takes the token. Where it cannot be reached, a warning says so.

    Raises:
        ValueError: if the name is none, or there is no token that the Hub takes.
    """
    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise ValueError(
            f"push_to_hub must name a repository of the Hub, OWNER/NAME, got {repository!r}. Write for example "
            "push_to_hub=my-name/my-model."
        )
    if get_token() is None:
        raise ValueError(
            f"push_to_hub={repository} needs a token of the Hugging Face Hub, got none. Run `hf auth login`, or set "
            "HF_TOKEN."
        )
    if constants.HF_HUB_OFFLINE and asks_hub:
        raise ValueError(
            f"push_to_hub={repository} needs the Hugging Face Hub, got HF_HUB_OFFLINE=1. Unset it, or push_to_hub."
        )
    if asks_hub:
        _check_token(repository)


def _check_token(repository: str) -> None:
    if reason := unreachable_reason():
        logger.warning("%s cannot be reached now (%s); %s is pushed to last", constants.ENDPOINT, reason, repository)
        return
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        raise ValueError(
            f"push_to_hub={repository} needs a token that the Hugging Face Hub takes, got {_without_token(error)}. Run "
            "`hf auth login`, or set HF_TOKEN."
        ) from None  # its traceback may show the request


def push_checkpoint(folder: str | Path, repository: str) -> str:
    """Uploads a checkpoint, in one commit, with cards whose examples load it from the Hub.

    Args:
        folder: what `save_checkpoint` wrote; unchanged.
        repository: `OWNER/NAME`; made if it does not exist, and then private.

    Returns:
        The address of the repository.

    Raises:
        ValueError: see `check_push`; also if `folder` holds no checkpoint.
        PushError: if the upload fails.
    """
    folder = Path(folder).absolute()
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"A checkpoint has a {CONFIG_FILE}, got {folder} without one. Give the folder of a checkpoint."
        )
    check_push(repository)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        _stage(folder, staged, repository)
        try:
            address = HfApi().create_repo(repository, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repository, folder_path=staged, commit_message=MESSAGE)
        except Exception as error:  # of the Hub's client, of its HTTP library, of the disk
            raise PushError(
                f"The push to {repository} failed, got {_without_token(error)}. The checkpoint in {folder} is "
                f"unchanged; push it again with: python -m experiments.push_checkpoint {folder} {repository}"
            ) from None  # its traceback may show the request
    return str(address)


def _stage(folder: Path, staged: Path, repository: str) -> None:
    """Links all files into `staged`, and writes anew those that name the folder on this machine."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        target = staged / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    is_stock, has_adapter = not (folder / SHAPE_FILE).is_file(), (folder / ADAPTER_FOLDER).is_dir()
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8")
        here, there = (usage(where, is_stock, has_adapter) for where in (LOCAL, repository))
        write_text(staged / CARD, text.replace(here, there))
    if has_adapter:
        config: dict[str, Any] = json.loads((folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        write_json(staged / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE, config | {"base_model_name_or_path": repository})
        write_text(staged / ADAPTER_FOLDER / CARD, adapter_card(is_stock, repository))


def _without_token(error: BaseException) -> str:
    """Returns an error on one line; no message of ours may hold the token."""
    text, token = one_line(error), get_token()
    return text.replace(token, "***") if token else text
