"""Datasets by their hub id: OWNER/NAME, or OWNER/NAME/FOLDER for one of several in a repository."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(/(?P<folder>[\w./-]+))?")


def local_folder(path: str, revision: str | None = None) -> Path:
    """The folder `path`, or where the dataset of that hub id lies once downloaded.

    What is not a folder and looks like a hub id is asked of the hub. Raises FileNotFoundError where neither has it.
    """
    if Path(path).is_dir() or not (match := _HUB_ID.fullmatch(path)):
        return Path(path)
    repository, folder = match["repository"], match["folder"]
    try:
        patterns = None if folder is None else [f"{folder}/**"]
        root = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (
        OSError,
        EntryNotFoundError,
        RepositoryNotFoundError,
        HFValidationError,
        OfflineModeIsEnabled,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{path}: no LeRobot dataset in this folder, and the hub does not give one by that id ({reason}); collect one"
            f" with agra collect, or download it from https://huggingface.co/datasets/{repository}"
        ) from error
    return Path(root) / (folder or "")
