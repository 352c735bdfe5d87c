"""The Hugging Face Hub: whether it can be reached, and the commit and files of a repository that a run reads."""

import logging
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from gradpruner.checks import guess
from gradpruner.models.contents import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, check_names, read_json
from gradpruner.waiting import say_if_waiting

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0


def unreachable_reason(seconds: float | None = None) -> str | None:
    """Returns why the Hub cannot be asked, or None if it answers.

    The Hub's own client makes the request, so a proxy or mirror (HF_ENDPOINT) is used as for downloads, and any answer
    counts, even a refusal. A server that accepts the connection but answers late counts as reachable.

    Args:
        seconds: how long to wait for the connection; None: `REACH_SECONDS`.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    seconds = REACH_SECONDS if seconds is None else seconds
    try:
        with say_if_waiting(f"an answer of {constants.ENDPOINT}", seconds):
            get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=False)
    except Exception as error:  # the classes differ with the versions of huggingface_hub and httpx
        if type(error).__name__ == "ReadTimeout":
            return None
        return f"{type(error).__name__}: {error}"
    return None


@cache  # asks once per process
def use_cache_without_hub() -> str | None:
    """Sets offline mode for this process if the Hub cannot be reached, and returns why, or None if it can be.

    Without that, the Hub's client tries 6 times for each file: 23 s where the name of the server cannot be resolved.
    """
    reason = unreachable_reason()
    if reason is not None and not constants.HF_HUB_OFFLINE:
        logger.warning(
            "%s cannot be reached (%s): this process reads the local cache alone, as with HF_HUB_OFFLINE=1",
            constants.ENDPOINT,
            reason,
        )
        constants.HF_HUB_OFFLINE = True
    return reason


@cache  # a process reads one state of a repository, even if it is updated in the meantime
def resolve_commit(path: str, revision: str | None) -> str:
    """Returns the commit that a revision of a Hub model stands for.

    The Hub is asked first. If it cannot be reached, or with HF_HUB_OFFLINE=1, the local cache answers with the commit
    that it last saw there.

    Args:
        path: Hub id.
        revision: branch, tag or commit; None is the default branch.

    Raises:
        OSError: if the Hub does not have the model or the revision, or neither the Hub nor the cache can tell.
    """
    from huggingface_hub.errors import RevisionResolutionError  # new: local models need no such recent version

    unreachable = use_cache_without_hub()
    try:
        # An HfApi of our own, since transformers' wrapper returns the revision unresolved where it fails.
        with say_if_waiting(f"the commit of {path} from {constants.ENDPOINT}"):
            found = HfApi().resolve_revision(path, revision=revision, local_files_only=constants.HF_HUB_OFFLINE)
        if unreachable is not None:  # a revision that is a commit is not looked up
            snapshot_download(path, revision=found.resolved, local_files_only=True)
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError, LocalEntryNotFoundError) as error:
        wanted = f"model {path!r}{_hint(path)}, revision {revision or constants.DEFAULT_REVISION!r}"
        if unreachable is not None and isinstance(error, RevisionResolutionError | LocalEntryNotFoundError):
            reason = f"{constants.ENDPOINT} cannot be reached ({unreachable})"
            raise OSError(
                f"Cannot find the commit of {wanted}: {reason}, and the cache {constants.HF_HUB_CACHE} does not have "
                "it. Check model.path and model.revision. Connect to the network, set HF_ENDPOINT to a mirror or "
                "HTTPS_PROXY to a proxy, or give model.path a local folder."
            ) from ConnectionError(reason)
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"Cannot find the commit of {wanted}: {reason}. Check model.path and model.revision, connect to the Hub (a "
            "private model needs `hf auth login`), or give model.path a local folder."
        ) from error
    return str(found.resolved)


def local_snapshot(path: str, commit: str) -> Path | None:
    """Returns the cache's folder of a commit if it holds the config and all weights, else None."""
    folder = _snapshot(path, commit)
    names = _names(folder)
    if CONFIG_FILE not in names:
        return None
    if WEIGHTS_FILE in names:
        return folder
    shards = read_json(folder / INDEX_FILE).get("weight_map", {}).values() if INDEX_FILE in names else ()
    return folder if shards and names.issuperset(shards) else None


def check_repository(path: str, commit: str) -> None:
    """Refuses a repository without a whole safetensors model, by the names of its files.

    The Hub is asked if the cache does not hold the model. If it cannot be reached, what the cache has must do.

    Raises:
        AssetError: saying what the repository holds instead.
    """
    if local_snapshot(path, commit) is not None:
        return
    names = _names(_snapshot(path, commit))
    if not constants.HF_HUB_OFFLINE:
        try:
            check_names(_listed(path, commit), path)
            return
        except HTTPError:  # of the HTTP library, which raises it where there is no network
            logger.info("The Hub does not list the files of %s, so those in the cache are judged", path)
    if CONFIG_FILE not in names:  # otherwise the weights may just not be there yet
        check_names(names, path)


@cache  # the files of a commit do not change
def _listed(path: str, commit: str) -> list[str]:
    return HfApi().list_repo_files(path, revision=commit)


def _snapshot(path: str, commit: str) -> Path:
    repository = repo_folder_name(repo_id=path, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / repository / "snapshots" / commit


def _names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for pattern in ("*", "*/*") for file in folder.glob(pattern)}


def _hint(path: str) -> str:
    """Returns what the path may have been meant to be, as text to follow it."""
    folder = Path(path)
    if "://" in path:
        return " (an address; its id is the part behind the host, such as meta-llama/Llama-3.2-1B)"
    if folder.parent != Path() and folder.parent.is_dir():
        return f" (no folder of that name in {folder.parent.absolute()} either)"
    cached = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    ids = {file.name.removeprefix("models--").replace("--", "/") for file in cached}
    return guess(path, sorted(ids - {path}))
