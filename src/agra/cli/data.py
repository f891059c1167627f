"""`agra collect`, `doctor`, `view`, `convert` and `prepare`: datasets and their frozen features."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from agra.cli.arguments import recipe_arguments, with_data

if TYPE_CHECKING:
    from agra.data.features.preparation import Preparation
    from agra.evaluation.collect import Collected


def collect(
    simulator: Annotated[str, tyro.conf.Positional],
    output: Path,
    episodes: int | None = None,
    per_task: int | None = None,
    tasks: tuple[str, ...] | None = None,
    noise: dict[str, float] | None = None,
    noise_correlation: float = 0.8,
    seed: int = 0,
    workers: int = 2,
    shard: str | None = None,
) -> None:
    """Record demonstrations of the scripted expert as a LeRobot v3.0 dataset. Resumes after an interruption.

    Args:
        simulator: a registered simulator, e.g. tabletop.
        output: folder of the new dataset. If it already holds these demonstrations, nothing happens.
        episodes: number of demonstrations of any tasks. By default 200, unless --per-task is set.
        per_task: number of demonstrations of each task.
        tasks: tasks of --per-task. By default all tasks of the simulator.
        noise: standard deviation of the noise on executed actions, by pattern over their names, e.g. 'hand_d*' 0.25.
            The dataset keeps the expert's own actions. By default the simulator's usual noise.
        noise_correlation: correlation of the noise of --noise between neighbouring rows.
        seed: seed of scenes and noise. The result does not depend on the number of workers.
        workers: number of processes that record episodes.
        shard: I/N plays part I, from 0, of N and keeps it beside the output. `agra merge` writes the dataset.
    """
    from agra.evaluation.collect import ActionNoise
    from agra.evaluation.collect import collect as run
    from agra.evaluation.protocols import parse_shard

    result = run(
        simulator,
        output,
        episodes=200 if episodes is None and per_task is None else episodes,
        per_task=per_task,
        tasks=tasks,
        seed=seed,
        workers=workers,
        noise=None if noise is None else ActionNoise(std=noise, correlation=noise_correlation),
        shard=None if shard is None else parse_shard(shard),
    )
    print_collected(result)


def print_collected(result: "Collected") -> None:
    """Print the path and size of a collection or of a shard."""
    if result.already_there:
        print(f"{result.path}: complete, nothing to record")
    else:
        failed = f" ({result.failed} without success)" if result.failed else ""
        size = f"{result.episodes} demonstrations, {result.frames} rows, {result.attempts} attempts"
        print(f"{result.path}: {size}{failed}")


def doctor(
    dataset: Annotated[str, tyro.conf.Positional],
    camera: str | None = None,
    every_frame: bool = False,
    seal: bool = False,
    json: Path | None = None,
) -> None:
    """Check a dataset for problems that would silently spoil training. The exit code is 1 where it finds an error.

    Args:
        dataset: a LeRobot dataset of version 2.0, 2.1 or 3.0, a folder or a hub id.
        camera: check this camera only. By default all cameras.
        every_frame: decode every episode instead of three.
        seal: write checksums of all files in their present state. Readers then detect any damage.
        json: write the findings to this JSON file.
    """
    from agra.data.config import EGO_VIEW
    from agra.data.doctor.doctor import check_dataset
    from agra.data.lerobot.checksums import seal as write_checksums
    from agra.files import write_text
    from agra.hub import dataset_folder

    if seal:
        print(write_checksums(dataset_folder(dataset)))
    report = check_dataset(dataset, camera=camera, every_frame=every_frame)
    report.print()
    if json is not None:
        write_text(json, report.to_json() + "\n")
    if not report.healthy:
        raise SystemExit(1)
    chosen = camera or (report.cameras[0] if len(report.cameras) > 1 and EGO_VIEW not in report.cameras else None)
    flag = f" --data.camera {chosen}" if chosen else ""
    print(f"to train on it: agra train tiny --data.path {dataset}{flag} --output outputs/{Path(dataset).name}")


def view(
    dataset: Annotated[str, tyro.conf.Positional],
    output: Path | None = None,
    episodes: tuple[int, ...] | None = None,
) -> None:
    """Write episodes of a dataset as a recording for the Rerun viewer: cameras, states, actions and instructions.

    Args:
        dataset: a LeRobot dataset of version 2.0, 2.1 or 3.0, a folder or a hub id.
        output: the .rrd file. By default NAME.rrd in the working directory.
        episodes: numbers of the episodes. By default the first three.
    """
    from agra.data.view import write_recording

    path = write_recording(dataset, output or Path(f"{Path(dataset).name}.rrd"), episodes=episodes)
    print(f"to look at it: rerun {path}")


def convert(
    source: Annotated[str, tyro.conf.Positional],
    output: Path,
    kind: Literal["lerobot", "egodex", "libero", "robomimic"] = "lerobot",
    version: Literal["v2.0", "v2.1", "v3.0", "groot"] = "v3.0",
    limit: int | None = None,
    instruction: str | None = None,
    fps: int | None = None,
) -> None:
    """Write a dataset in another format: LeRobot of any version, from LeRobot, EgoDex, or LIBERO's or robomimic's HDF5.

    Args:
        source: the dataset, a folder or a hub id. For HDF5 a file or a folder of files.
        output: folder of the new dataset.
        kind: the source's format.
        version: LeRobot version to write, for a LeRobot source. `groot` is v2.1 as GR00T's fine-tuning reads it. Other
            sources become v3.0.
        limit: convert only this many EgoDex trajectories.
        instruction: the instruction of HDF5 demonstrations, where the files have none.
        fps: control rate of HDF5 demonstrations, where the files have none.
    """
    if kind != "lerobot" and version != "v3.0":
        raise ValueError(f"--version {version}: {kind} is converted to v3.0 alone; convert the result again")
    if version == "groot":
        from agra.data.importers.groot_flavour import convert_to_groot

        convert_to_groot(source, output)
    elif kind == "lerobot":
        from agra.data.importers.lerobot_versions import convert as run

        run(source, output, version)
    elif kind == "egodex":
        from agra.data.importers.egodex import convert_egodex

        convert_egodex(Path(source), output, limit=limit)
    else:
        from agra.data.importers.robomimic import convert_hdf5

        path = Path(source)
        files = sorted(path.glob("*.hdf5")) if path.is_dir() else [path]
        convert_hdf5(files, output, kind=kind, instruction=instruction, fps=fps)
    print(output)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of `agra prepare`."""

    device: str = "cpu"
    """cpu or cuda. Under torchrun each process takes the GPU of its local rank."""
    mixture: Path | None = None
    """JSON list of the datasets to mix, as for `agra train`."""
    estimate: bool = False
    """Compute nothing. Print the episodes to compute, their size and time, and the cost of encoding while training
    instead."""
    rank: int = int(os.environ.get("RANK", 0))
    """Rank of this process among several, which divide the episodes between them. By default torchrun's."""
    world_size: int = int(os.environ.get("WORLD_SIZE", 1))
    """Number of processes. By default torchrun's."""
    shard: str | None = None
    """I/N computes part I, from 0, of N, as --rank I --world-size N does. All parts fill the same cache."""


def prepare(arguments: list[str]) -> None:
    """Cache the frozen features of a recipe: agra prepare RECIPE --data.path DATASET [--stage adapt]"""
    options, config = recipe_arguments("prepare", arguments, PrepareOptions)
    config = with_data(config, arguments, options.mixture)
    from agra.api import preparation
    from agra.evaluation.protocols import parse_shard
    from agra.training.encoding_cost import encoding_costs

    rank, world_size = options.rank, options.world_size
    if options.shard is not None:
        shard = parse_shard(options.shard)
        rank, world_size = shard.index, shard.count
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank}: expected 0 to {world_size - 1}, given --world-size")
    features = preparation(config, device=options.device)
    if options.estimate:
        for cost in encoding_costs(config, features.sources):
            print(cost, file=sys.stderr)
    if rank == 0:
        print_cost(features)
    if not options.estimate:
        for folder in features.run(rank=rank, world_size=world_size):
            print(folder)
        if rank == 0:
            features.open_uncached()


def prepare_missing(features: "Preparation") -> None:
    """Print the cost of the missing features, then compute them."""
    print_cost(features)
    features.run()


def print_cost(features: "Preparation") -> None:
    """Print the size and time of each source's missing features.

    Raises ValueError where those of all sources together do not fit on the disk.
    """
    estimates = features.estimate()
    for source, expected in estimates:
        print(f"{source.dataset.path}: {expected}", file=sys.stderr)
    needed = sum(expected.bytes for _, expected in estimates)
    free = min((expected.free_bytes for _, expected in estimates), default=needed)
    if needed > free:
        raise ValueError(
            f"{features.data.cache}: the features need about {needed / 2**20:,.1f} MiB, but {free / 2**20:,.1f} MiB are"
            " free; choose another --data.cache"
        )
