"""Episodes of a dataset as a recording for the Rerun viewer (`.rrd`): every camera, the state, the actions, the text.

Each episode is an entity tree. The timelines are `step`, the control step, and `time`, in seconds. Needs the extra
`rerun`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agra import files
from agra.data.config import SourceConfig
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.layout import DatasetLayout
from agra.hub import dataset_folder

JPEG_QUALITY = 90


def write_recording(dataset: str | Path, output: Path, *, episodes: Sequence[int] | None = None) -> Path:
    """Write episodes of a LeRobot dataset, a folder or a hub id, into one `.rrd` file. None: the first three.

    Raises ImportError without the Rerun SDK, ValueError for an episode that does not exist, and the errors of
    `LeRobotDataset`.
    """
    try:
        import rerun
    except ImportError as error:
        raise ImportError(
            "agra view: a .rrd file needs the Rerun SDK: pip install '.[rerun]' in a checkout of agra"
        ) from error
    folder = dataset_folder(str(dataset))
    names = DatasetLayout.read(folder).names("video", "image")
    if not names:
        raise ValueError(f"{dataset}: no camera to show")
    views = {name: LeRobotDataset(folder, source=SourceConfig(camera=name)) for name in names}
    first = views[names[0]]
    episodes = range(min(3, first.num_episodes)) if episodes is None else episodes
    unknown = [episode for episode in episodes if not 0 <= episode < first.num_episodes]
    if unknown:
        raise ValueError(f"{dataset}: no episode {unknown[0]}; choose among 0 to {first.num_episodes - 1}")
    recording = rerun.RecordingStream("agra_dataset")
    with files.replacing(output) as temporary:
        recording.save(temporary)
        for episode in episodes:
            _episode(recording, rerun, views, episode)
        recording.flush()
        recording.disconnect()
    return Path(output)


def _episode(recording: Any, rerun: Any, views: dict[str, LeRobotDataset], episode: int) -> None:
    root, first = f"episode_{episode}", next(iter(views.values()))
    curves = {
        "state": (first.states(episode), first.state_names),
        "action": (first.actions(episode), first.action_names),
    }
    for name, (_, dimensions) in curves.items():
        recording.log(f"{root}/{name}", rerun.SeriesLines(names=list(dimensions)), static=True)
    frames = {name.removeprefix("observation.images."): view.frames(episode) for name, view in views.items()}
    for step in range(int(first.lengths[episode])):
        recording.set_time("step", sequence=step)
        recording.set_time("time", duration=step / first.fps)
        recording.log(f"{root}/instruction", rerun.TextDocument(first.instruction(episode, step)))
        for name, pictures in frames.items():
            image = rerun.Image(pictures[step]).compress(jpeg_quality=JPEG_QUALITY)
            recording.log(f"{root}/cameras/{name}", image)
        for name, (values, _) in curves.items():
            recording.log(f"{root}/{name}", rerun.Scalars(values[step]))
