"""Datasets written by hand in the documented layouts, with json, pyarrow and av alone, without `agra`.

Layouts: LeRobot's `datasets/utils.py` and `convert_dataset_v21_to_v30.py`; GR00T's `LeRobot_compatible_data_schema.md`;
EgoDex (arXiv 2505.11709); robomimic's and LIBERO's HDF5. Every layout holds the same `EPISODES`, so that read values
can be compared number by number.
"""

import io
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS, LENGTHS = 10, (7, 5, 9)
TASKS = ("unlocked_waist: pick the apple", "unlocked_waist: nimm den Apfel — 苹果")
CAMERAS = ("observation.images.front", "observation.images.wrist")
SIZES = {CAMERAS[0]: (32, 48), CAMERAS[1]: (16, 24)}
STATE_DIM, ACTION_DIM = 6, 5


@dataclass(frozen=True)
class StoredEpisode:
    """The values of one episode."""

    states: np.ndarray  # (N, 6)
    actions: np.ndarray  # (N, 5)
    task: int
    frames: dict[str, np.ndarray]  # camera -> (N, H, W, 3)


def make_episode(index: int, length: int) -> StoredEpisode:
    """Return random numbers, and images of one shade by episode and camera, with a bar that moves two pixels each step."""
    rng = np.random.default_rng(index)
    frames = {}
    for which, (camera, (height, width)) in enumerate(SIZES.items()):
        frames[camera] = np.full((length, height, width, 3), 50 + 40 * index + 10 * which, np.uint8)
        for step in range(length):
            frames[camera][step, :, 2 * step : 2 * step + 2] = 230
    states, actions = rng.normal(size=(length, STATE_DIM)), rng.normal(size=(length, ACTION_DIM))
    return StoredEpisode(states.astype(np.float32), actions.astype(np.float32), index % 2, frames)


EPISODES = [make_episode(i, n) for i, n in enumerate(LENGTHS)]


def encode(frames: np.ndarray, *, fps: int = FPS, options: dict | None = None) -> bytes:
    """An mp4 with libx264's own choices: B-frames, and key frames where it likes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options or {"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def join(videos: list[bytes], path: Path) -> list[float]:
    """ffmpeg's concat: packets one after the other. Returns the seconds at which each begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    starts, frames = [], 0
    with av.open(str(path), "w", format="mp4") as target:
        stream = None
        for video in videos:
            with av.open(io.BytesIO(video)) as source:
                first = source.streams.video[0]
                stream = stream or target.add_stream_from_template(first)
                offset = round(Fraction(frames, FPS) / first.time_base)
                starts.append(frames / FPS)
                for packet in source.demux(first):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                        target.mux(packet)
                frames += first.frames
    return starts


def features(kind: str) -> dict:
    """info.json's features; `kind` is how the cameras are stored."""
    features: dict = {}
    for camera, (height, width) in SIZES.items():
        features[camera] = {"dtype": kind, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        if kind == "video":
            features[camera]["info"] = {"video.fps": float(FPS), "video.codec": "h264", "has_audio": False}
    features["observation.state"] = {"dtype": "float32", "shape": [6], "names": {"motors": [f"s{i}" for i in range(6)]}}
    features["action"] = {"dtype": "float32", "shape": [5], "names": None}
    for name, dtype in {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    for name in ("index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return features


def rows(index: int, stored: StoredEpisode, kind: str) -> pa.Table:
    """The table of an episode: variable lists for vectors, as LeRobot 2 wrote them."""
    count = len(stored.states)
    columns: dict = {}
    if kind == "image":
        for camera in CAMERAS:
            cells = [{"bytes": png(frame), "path": None} for frame in stored.frames[camera]]
            columns[camera] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns["observation.state"] = pa.array(stored.states.tolist(), pa.list_(pa.float32()))
    columns["action"] = pa.array(stored.actions.tolist(), pa.list_(pa.float32()))
    columns["timestamp"] = pa.array(np.arange(count, dtype=np.float32) / np.float32(FPS))
    columns["frame_index"] = pa.array(np.arange(count))
    columns["episode_index"] = pa.array(np.full(count, index))
    columns["index"] = pa.array(np.arange(count) + sum(LENGTHS[:index]))
    columns["task_index"] = pa.array(np.full(count, stored.task))
    return pa.table(columns)


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _lines(path: Path, values: list) -> None:
    _text(path, "".join(json.dumps(value) + "\n" for value in values))


def _statistics(values: np.ndarray) -> dict:
    values = values.astype(np.float64)
    statistics = {name: getattr(values, name)(0).tolist() for name in ("min", "max", "mean", "std")}
    return statistics | {"count": [len(values)]}


def _info(version: str, kind: str) -> dict:
    return {
        "codebase_version": version,
        "robot_type": "bot",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "features": features(kind),
    }


def write_v2(root: Path, version: str = "v2.1", kind: str = "video") -> Path:
    """LeRobot 2.0 or 2.1: a parquet file and mp4 files for each episode."""
    statistics = []
    for index, stored in enumerate(EPISODES):
        path = root / f"data/chunk-000/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows(index, stored, kind), path)
        for camera in CAMERAS if kind == "video" else ():
            path = root / f"videos/chunk-000/{camera}/episode_{index:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(stored.frames[camera]))
        stats = {"observation.state": _statistics(stored.states), "action": _statistics(stored.actions)}
        statistics.append({"episode_index": index, "stats": stats})
    info = _info(version, kind) | {
        "total_videos": len(CAMERAS) * len(LENGTHS) if kind == "video" else 0,
        "total_chunks": 1,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    if kind == "image":
        info["video_path"] = None
    _text(root / "meta/info.json", json.dumps(info, indent=4))
    episodes = [{"episode_index": i, "tasks": [TASKS[t.task]], "length": len(t.states)} for i, t in enumerate(EPISODES)]
    _lines(root / "meta/episodes.jsonl", episodes)
    _lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(TASKS)])
    if version == "v2.1":
        _lines(root / "meta/episodes_stats.jsonl", statistics)
    else:
        _text(root / "meta/stats.json", json.dumps(_all_statistics()))
    return root


def _all_statistics() -> dict:
    states, actions = (np.concatenate([getattr(t, name) for t in EPISODES]) for name in ("states", "actions"))
    return {"observation.state": _statistics(states), "action": _statistics(actions)}


def write_v3(root: Path, kind: str = "video") -> Path:
    """LeRobot 3.0: all episodes in one parquet file (a row group each) and one mp4 a camera; tasks in a pandas index."""
    path = root / "data/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [rows(i, t, kind) for i, t in enumerate(EPISODES)]
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    entries, first = [], 0
    starts = {}
    for camera in CAMERAS if kind == "video" else ():
        starts[camera] = join(
            [encode(t.frames[camera]) for t in EPISODES], root / f"videos/{camera}/chunk-000/file-000.mp4"
        )
    for index, stored in enumerate(EPISODES):
        count = len(stored.states)
        entry = {"episode_index": index, "tasks": [TASKS[stored.task]], "length": count}
        entry |= {"data/chunk_index": 0, "data/file_index": 0}
        entry |= {"dataset_from_index": first, "dataset_to_index": first + count}
        for camera, begins in starts.items():
            entry |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0}
            entry |= {f"videos/{camera}/from_timestamp": begins[index]}
            entry |= {f"videos/{camera}/to_timestamp": begins[index] + count / FPS}
        for name, values in {"observation.state": stored.states, "action": stored.actions}.items():
            entry |= {f"stats/{name}/{key}": value for key, value in _statistics(values).items()}
        entries.append(entry | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        first += count
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(entries), path)
    # What pandas writes for a nameless index of texts.
    tasks = pa.table({"task_index": pa.array([0, 1]), "__index_level_0__": list(TASKS)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    _text(root / "meta/stats.json", json.dumps(_all_statistics()))
    info = _info("v3.0", kind) | {
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    if kind == "image":
        info["video_path"] = None
    _text(root / "meta/info.json", json.dumps(info, indent=4))
    return root


LEROBOT_WRITERS = {
    "v2.0": lambda root: write_v2(root, "v2.0"),
    "v2.1": lambda root: write_v2(root, "v2.1"),
    "v3.0": write_v3,
    "v2.1 images": lambda root: write_v2(root, "v2.1", "image"),
    "v3.0 images": lambda root: write_v3(root, "image"),
}
"""Every version, with video or pictures, by name."""


# --- GR00T's flavour, as the GR1 tabletop sets have it ------------------------------------------------------------------

GR1_PARTS = {
    "left_arm": (0, 7),
    "left_hand": (7, 13),
    "left_leg": (13, 19),
    "neck": (19, 22),
    "right_arm": (22, 29),
    "right_hand": (29, 35),
    "right_leg": (35, 41),
    "waist": (41, 44),
}
GR1_FPS, GR1_LENGTHS = 20, (6, 8, 5)


def gr1_states(episode: int, length: int) -> np.ndarray:
    """Exact values: dimension d of step n of episode e is .01 d + .1 n + e, in radians."""
    return 0.01 * np.arange(44) + 0.1 * np.arange(length)[:, None] + episode


def gr1_frame(step: int, episode: int) -> np.ndarray:
    """256 x 256: black padding above row 43 and from row 213 on, content between them brighter with every step."""
    frame = np.zeros((256, 256, 3), np.uint8)
    frame[43:213] = (60 + 12 * step + 20 * episode) % 256
    return frame


def write_gr1(root: Path, lengths=GR1_LENGTHS) -> Path:
    """LeRobot v2.0 with modality.json and annotations: 44 dimensions in float64, no frame_index, 20 Hz."""
    camera, annotations = "observation.images.ego_view", ["human.action.task_description", "human.validity"]
    texts = ["pick the can from the plate and place it in the pan", "valid", "unlocked_waist: pick the can"]
    first = 0
    for index, length in enumerate(lengths):
        states = gr1_states(index, length)
        columns = {
            "observation.state": pa.array(states.tolist(), pa.list_(pa.float64())),
            "action": pa.array((states + 0.5).tolist(), pa.list_(pa.float64())),
            "timestamp": pa.array(np.arange(length) / GR1_FPS),
            "annotation.human.action.task_description": pa.array(np.full(length, 0)),
            "task_index": pa.array(np.full(length, 0)),
            "annotation.human.validity": pa.array(np.full(length, 1)),
            "annotation.human.coarse_action": pa.array(np.full(length, 2)),
            "episode_index": pa.array(np.full(length, index)),
            "index": pa.array(first + np.arange(length)),
            "next.reward": pa.array(np.zeros(length)),
            "next.done": pa.array(np.arange(length) == length - 1),
        }
        path = root / f"data/chunk-000/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        path = root / f"videos/chunk-000/{camera}/episode_{index:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.stack([gr1_frame(n, index) for n in range(length)]), fps=GR1_FPS))
        first += length
    scalar = {"shape": [1], "names": None}
    joints = {"dtype": "float64", "shape": [44], "names": [f"motor_{i}" for i in range(44)]}
    video = {"dtype": "video", "shape": [256, 256, 3], "names": ["height", "width", "channel"]}
    features: dict = {camera: video | {"video_info": {"video.fps": 20.0, "video.codec": "h264"}}}
    features |= {"observation.state": joints, "action": joints, "timestamp": {"dtype": "float64", **scalar}}
    features |= {f"annotation.{name}": {"dtype": "int64", **scalar} for name in (*annotations, "human.coarse_action")}
    features |= {name: {"dtype": "int64", **scalar} for name in ("task_index", "episode_index", "index")}
    features |= {"next.reward": {"dtype": "float64", **scalar}, "next.done": {"dtype": "bool", **scalar}}
    info = {
        "codebase_version": "v2.0",
        "robot_type": "GR1ArmsAndWaistFourierHands",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 3,
        "total_videos": len(lengths),
        "total_chunks": 1,
        "chunks_size": 1000,
        "fps": float(GR1_FPS),
        "splits": {"train": "0:100"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    _text(root / "meta/info.json", json.dumps(info))
    _lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(texts)])
    episodes = [{"episode_index": i, "tasks": texts[:1], "length": n} for i, n in enumerate(lengths)]
    _lines(root / "meta/episodes.jsonl", episodes)
    parts = {name: {"start": start, "end": end} for name, (start, end) in GR1_PARTS.items()}
    modality = {
        "state": parts,
        "action": parts,
        "video": {"ego_view": {"original_key": camera}},
        "annotation": {**{name: {} for name in annotations}, "human.coarse_action": {}},
    }
    _text(root / "meta/modality.json", json.dumps(modality))
    return root


# --- EgoDex ---------------------------------------------------------------------------------------------------------------

EGODEX_JOINTS = ("camera", "hip", "neck4", "leftForearm", "leftHand", "rightHand", "rightThumbTip")


def egodex_transform(joint: str, step: int, episode: int) -> np.ndarray:
    """Exact poses in ARKit's frame (x right, y up, z back): hands turn about the vertical by .1 a step."""
    angle, side = 0.1 * step + 0.3 * episode, -0.2 if joint.startswith("left") else 0.2
    pose = np.eye(4)
    pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    pose[:3, 3] = [side, 1.0 + 0.01 * step, -0.5 - 0.02 * episode]
    return pose


def write_egodex(root: Path, lengths=(6, 9), *, size=(108, 192), task="basic_pick_place") -> Path:
    """`<task>/<i>.mp4` and `<i>.hdf5`, 30 Hz; the pictures are small, all else as documented."""
    import h5py

    for index, length in enumerate(lengths):
        path = root / task / f"{index}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = np.full((length, *size, 3), 60, np.uint8)
        frames[:, int(size[0] * 0.5) :] = 150
        for step in range(length):
            frames[step, -20:, 4 * step : 4 * step + 8] = 240
        path.with_suffix(".mp4").write_bytes(encode(frames, fps=30))
        with h5py.File(path, "w") as file:
            file["camera/intrinsic"] = np.array([[736.6, 0, 960], [0, 736.6, 540], [0, 0, 1]], np.float32)
            for joint in EGODEX_JOINTS:
                poses = np.stack([egodex_transform(joint, step, index) for step in range(length)])
                file[f"transforms/{joint}"] = poses.astype(np.float32)
                file[f"confidences/{joint}"] = np.ones(length, np.float32)
            file.attrs["llm_description"] = "Put the Cup on the plate."
            file.attrs["llm_description2"] = "Take the Cup off the plate."
            file.attrs["llm_type"] = "reversible"
            file.attrs["which_llm_description"] = str(index % 2 + 1)
            file.attrs["task"] = task
    return root


# --- robomimic and LIBERO -------------------------------------------------------------------------------------------------


def demonstration(index: int, length: int) -> dict[str, np.ndarray]:
    """Numbers of one demonstration; the picture has a bright upper left corner where it is upright."""
    rng = np.random.default_rng(100 + index)
    picture = np.full((length, 32, 48, 3), 60, np.uint8)
    picture[:, :10, :10] = 220
    return {
        "actions": rng.uniform(-1, 1, (length, 7)),
        "position": rng.normal(size=(length, 3)),
        "axis_angle": rng.uniform(-1, 1, (length, 3)),
        "fingers": rng.uniform(0, 0.04, (length, 2)),
        "picture": picture,
    }


def write_hdf5(path: Path, kind: str, lengths=(5, 7)) -> Path:
    """`data/demo_<i>` with actions and observations. Demonstration 10 comes after 2 only if names are read as numbers."""
    import h5py
    from scipy.spatial.transform import Rotation

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        if kind == "libero":
            data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the bowl"})
        for index, (name, length) in enumerate(zip(("demo_2", "demo_10"), lengths, strict=True)):
            stored = demonstration(index, length)
            demo = data.create_group(name)
            demo.attrs["num_samples"] = length
            demo["actions"] = stored["actions"]
            demo["dones"] = np.arange(length) == length - 1
            quaternion = Rotation.from_rotvec(stored["axis_angle"]).as_quat()  # real part last, as robosuite has it
            observations = {
                "libero": {
                    "agentview_rgb": stored["picture"][:, ::-1, ::-1],
                    "eye_in_hand_rgb": stored["picture"][:, ::-1, ::-1],
                    "ee_pos": stored["position"],
                    "ee_ori": stored["axis_angle"],
                    "gripper_states": stored["fingers"],
                },
                "robomimic": {
                    "agentview_image": stored["picture"],
                    "robot0_eef_pos": stored["position"],
                    "robot0_eef_quat": quaternion,
                    "robot0_gripper_qpos": stored["fingers"],
                },
            }[kind]
            for key, values in observations.items():
                demo[f"obs/{key}"] = values
    return path
