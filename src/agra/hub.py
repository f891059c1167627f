"""The only module that talks to the model hub: models and datasets by hub id or folder, uploads, model cards.

Imports no torch. Errors of the hub and of the file system become one line with the remedy.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from agra.files import sha256

_NETWORK_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all errors of the hub's HTTP library, which depends on the version of huggingface_hub."""
_DATASET_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(/(?P<folder>[\w./-]+))?")


def package_folder(package: str, what: str) -> Path:
    """Return the folder of an installed package, whose weights are read, without importing the package.

    Raises ImportError with the remedy if the package is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ImportError(f'{what} needs the package "{name}": pip install {name}, or all of the extra demo')
    return Path(spec.submodule_search_locations[0])


def check_digest(path: Path, expected: str, what: str) -> None:
    """Raise ValueError unless a packaged file has the SHA-256 that this version of agra expects."""
    if sha256(path) != expected:
        raise ValueError(
            f"{what}: {path} is not the expected file, its SHA-256 differs from {expected}; reinstall the package, and "
            "do not use the file if that does not help"
        )


def model_folder(what: str, *, source: str, revision: str | None, subfolder: str = "") -> Path:
    """Return the folder of one part of a model, inside a local folder or downloaded from the hub, that part alone.

    The hub's client resumes interrupted downloads. Raises FileNotFoundError with the remedy.
    """
    with loading(what, source=source, revision=revision, subfolder=subfolder):
        root = Path(source)
        if not root.is_dir():
            patterns = f"{subfolder}/*" if subfolder else None
            root = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        if not (root / subfolder).is_dir():
            raise FileNotFoundError(f"it has no folder {subfolder}")
    return root / subfolder


def dataset_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder `path`, or the local copy of the dataset with that hub id, OWNER/NAME or OWNER/NAME/FOLDER.

    A path that is not a folder but has the form of a hub id is requested from the hub. Raises FileNotFoundError if
    neither exists.
    """
    if Path(path).is_dir() or not (match := _DATASET_ID.fullmatch(path)):
        return Path(path)
    repository, folder = match["repository"], match["folder"]
    try:
        patterns = None if folder is None else [f"{folder}/**"]
        root = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (
        OSError,
        _NETWORK_ERROR,
        EntryNotFoundError,
        RepositoryNotFoundError,
        HFValidationError,
        OfflineModeIsEnabled,
    ) as error:
        raise FileNotFoundError(
            f"{path}: no such folder, and no dataset of that id on the hub ({_first_line(error)}); collect a dataset "
            f"with agra collect, or download it from https://huggingface.co/datasets/{repository}"
        ) from error
    return Path(root) / (folder or "")


def upload_model(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder to the hub as the model `name` (owner/model). Returns its address.

    Raises ValueError for an invalid name, OSError with the remedy if the upload fails.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Checkpoint of agra")
    except HFValidationError as error:
        raise ValueError(f"{name}: not a valid hub id; expected owner/model") from error
    except (_NETWORK_ERROR, OSError) as error:
        raise OSError(
            f"{name}: upload failed ({' '.join(str(error).split())}); run `hf auth login` with a token that has write "
            "access"
        ) from error
    return address


def download_model(name: str, output: Path, *, revision: str | None = None) -> None:
    """Download a model from the hub into a folder. Raises FileNotFoundError with the remedy."""
    with loading("policy", source=name, revision=revision):
        snapshot_download(name, revision=revision, local_dir=output)


def model_card_text(text: str, *, license: str, tags: list[str]) -> str:
    """Return a model card with the hub's header."""
    return f"---\n{ModelCardData(library_name='agra', license=license, tags=tags).to_yaml()}\n---\n\n{text}"


def weight_files(folder: Path) -> list[Path]:
    """List a folder's safetensors files.

    Raises FileNotFoundError if there are none or a file of the index is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected the published weights as .safetensors files, found none")
    for index in folder.glob("*.safetensors.index.json"):
        listed = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(listed - {file.name for file in files}):
            raise FileNotFoundError(
                f"{folder / missing[0]}: missing, though {index.name} lists it; an interrupted download may be the "
                "cause, download it again"
            )
    return files


@contextmanager
def loading(what: str, *, source: str, revision: str | None, subfolder: str = "") -> Iterator[None]:
    """Turn errors of the hub and of the file system inside the block into one line with the remedy.

    Raises FileNotFoundError if something is missing, gated or unreachable, ValueError if a file is damaged.
    """
    local = Path(source).is_dir()
    address = f"{source}/{subfolder}".rstrip("/") + (f" (revision {revision})" if revision and not local else "")
    try:
        yield
    except (OSError, _NETWORK_ERROR, EntryNotFoundError, HFValidationError) as error:
        if local:
            remedy = f"the folder must hold {subfolder or 'the model'} as saved by save_pretrained"
        elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            remedy = (
                f"accept its terms, if it has any, at https://huggingface.co/{source} and run `hf auth login`, "
                "or download it to a folder and give that folder as the source"
            )
        else:
            remedy = f"{source} is neither a folder nor a hub id of the form owner/name"
        raise FileNotFoundError(f"{what}: cannot load {address}: {_first_line(error)}; {remedy}") from error
    except SafetensorError as error:
        raise ValueError(
            f"{what}: the weights of {address} are damaged ({_first_line(error)}); download them again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
