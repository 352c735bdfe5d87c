"""Commit of a Hub model: which state of a repository a run reads."""

from functools import cache

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


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

    try:
        # An HfApi of our own, since transformers' wrapper returns the revision unresolved where it fails.
        found = HfApi().resolve_revision(path, revision=revision, local_files_only=constants.HF_HUB_OFFLINE)
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"Cannot find the commit of model {path!r}, revision {revision or constants.DEFAULT_REVISION!r}: "
            f"{reason}. Check model.path and model.revision, connect to the Hub (a private model needs "
            "`hf auth login`), or give model.path a local folder."
        ) from error
    return str(found.resolved)
