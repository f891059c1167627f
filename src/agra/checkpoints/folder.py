"""Checkpoint folders: places, names, checksums and simple files. No torch.

    step_000500/
      config.json               the RunConfig
      <part>.safetensors        a part of the method: video_dit, bridge, action_dit, projectors ...
      lora.safetensors          adapters, where there are any (agra.lora)
      optimizer.safetensors     AdamW's moments, by parameter name
      codec.safetensors         a codec fit on the data, where there is one
      instructions.safetensors  tokens of the training instructions
      norm_stats.json           statistics that undo the normalisation
      recorded_sizes.json       sizes of the frames that are cropped, where they are
      trainer.json              the number of finished steps
      manifest.json             sha256 of every file above

Several processes write their shards into a folder `sharded` instead of the parts, the adapters and the moments. Readers
accept both. Tensors are named `<part>.<name in the part>`, and moments `<moment>/<part>.<name>`.

All random numbers of training are a pure function of seed, step and sample, so no random state is stored.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from agra import files

BUNDLED = Path(__file__).parent.parent / "assets"
"""The folder of the bundled policies, which are exports by name."""
ADAPTERS, OPTIMIZER = "lora.safetensors", "optimizer.safetensors"
BEST = "best.json"
"""File of a run's folder with the best checkpoint by `stage.keep_best`."""
READ = ("*.safetensors", "sharded/*.safetensors", "norm_stats.json", "recorded_sizes.json", "trainer.json")
"""Patterns of the files that readers open. The manifest must list these files."""
REMEDY = "take it from its source again"
STEP = re.compile(r"step_(\d{6,})")
"""Name of a finished checkpoint in a run's folder."""


def newest(run: Path) -> Path | None:
    """Return the checkpoint of the highest step in a run's folder.

    Unfinished ones have other names and do not count.
    """
    steps = [(int(match[1]), path) for path in run.glob("step_*") if (match := STEP.fullmatch(path.name))]
    return max(steps)[1] if steps else None


def best(run: Path) -> tuple[Path, float] | None:
    """Return the best checkpoint by `stage.keep_best` and its figure, or None where the run has none."""
    path = run / BEST
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    return run / f"step_{record['step']:06d}", record["value"]


def note_best(run: Path, step: int, value: float) -> None:
    """Record that a saved checkpoint is the best so far."""
    files.write_text(run / BEST, json.dumps({"step": step, "value": value}) + "\n")


def find(name: str | Path) -> Path:
    """Find a folder by its path or, where there is none, as RUN/best or by the name of a bundled policy.

    RUN/best is the best checkpoint of a run with `stage.keep_best`.
    """
    path, bundled = Path(name), BUNDLED / name
    if path.exists():
        return path
    if path.name == "best" and (record := best(path.parent)) is not None:
        return record[0]
    return bundled if bundled.is_dir() else path


def resolve(name: str | Path) -> Path:
    """Find a checkpoint folder by its own path, by its run's path, as RUN/best, or by the name of a bundled policy.

    Raises FileNotFoundError naming the path.
    """
    path = find(name)
    if (path / "manifest.json").is_file():
        return path
    last = newest(path) if path.is_dir() else None
    if last is None:
        bundled = ", ".join(sorted(p.name for p in BUNDLED.glob("*/")))
        raise FileNotFoundError(
            f"{path}: no checkpoint here; expected a folder with manifest.json or step_*/ folders, or a bundled policy "
            f"({bundled})"
        )
    return last


def artifact_dir(name: str | Path) -> Path:
    """Return the folder for a policy's evaluation and diagnosis results: its run's folder, or the export itself.

    For a bundled policy, which is read-only, it is outputs/NAME in the working directory.
    """
    path = find(name)
    if path.parent == BUNDLED:
        return Path("outputs") / path.name
    return path.parent if STEP.fullmatch(path.name) else path


def verify(
    checkpoint: Path, *, part: int = 0, parts: int = 1, without: Sequence[str] = (), only: Sequence[str] | None = None
) -> None:
    """Compare files with the manifest.

    Process `part` of `parts` checks every `parts`-th file. `without` leaves files out, `only` selects files.

    Raises ValueError naming the first file that is corrupt, missing, or not listed though it would be read.
    """
    for name, expected in [*_manifest(checkpoint).items()][part::parts]:
        if name in without or (only is not None and name not in only):
            continue
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, though manifest.json lists it; {REMEDY}")
        if files.sha256(path) != expected:
            raise ValueError(f"{path}: checksum differs from manifest.json; the file is damaged, {REMEDY}")


def keeps_optimizer(checkpoint: Path) -> bool:
    """Check whether a checkpoint holds the optimiser's state, with the averaged weights. An export does not."""
    return any(name == OPTIMIZER or name.startswith("sharded/") for name in _manifest(checkpoint))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError naming the file for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {content!r:.40}; {REMEDY}")
    return content


def _manifest(checkpoint: Path) -> dict[str, str]:
    """Read the manifest: name to checksum of all files that readers open. Raises ValueError for any other content."""
    path = checkpoint / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, so {checkpoint} is not a complete checkpoint")
    listed = read_object(path)
    for name, digest in listed.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not isinstance(digest, str):
            raise ValueError(
                f"{path}: expected names inside the checkpoint and their checksums, got {name!r}: {digest!r}"
            )
    there = {file.relative_to(checkpoint).as_posix() for pattern in READ for file in checkpoint.glob(pattern)}
    if unlisted := sorted({"config.json", *there} - listed.keys()):
        raise ValueError(f"{path}: does not list {unlisted[0]}, so that file cannot be verified; {REMEDY}")
    return listed
