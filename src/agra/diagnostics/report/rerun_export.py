"""A diagnosis as a recording for the Rerun viewer (`.rrd`): frames, masks, attention, maps, PCA and metrics.

Each policy is an entity tree. The timeline `sample` steps through the gallery, `latent_frame` through a window. Needs
the extra `rerun`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agra import files
from agra.diagnostics.record import Diagnosis


def write_recording(diagnoses: Sequence[tuple[str, Diagnosis]], output: Path) -> Path:
    """Write the galleries of named diagnoses into one `.rrd` file.

    Raises ImportError without the Rerun SDK, ValueError if no diagnosis has a gallery.
    """
    try:
        import rerun
    except ImportError as error:
        raise ImportError(
            "--rerun: a .rrd file needs the Rerun SDK: pip install '.[rerun]' in a checkout of agra"
        ) from error
    if not any(diagnosis.header["gallery"] for _, diagnosis in diagnoses):
        raise ValueError("rerun: none of the diagnoses has a gallery; diagnose with --gallery above 0")
    recording = rerun.RecordingStream("agra")
    with files.replacing(output) as temporary:
        recording.save(temporary)
        for name, diagnosis in diagnoses:
            for place, row in enumerate(diagnosis.header["gallery"]):
                _sample(recording, rerun, name, diagnosis, place, row)
        recording.flush()
        recording.disconnect()
    return Path(output)


def _sample(recording: Any, rerun: Any, policy: str, diagnosis: Diagnosis, place: int, row: int) -> None:
    arrays, line = diagnosis.arrays, diagnosis.rows[row]
    recording.set_time("sample", sequence=place)
    root = f"{policy.replace('/', '-')}"
    recording.log(
        f"{root}/instruction", rerun.TextDocument(f"{line['instruction']} ({line['trial']}, step {line['step']})")
    )
    for metric in ("in_mask_ratio", "centroid_error", "psnr", "action_error"):
        if line[metric] is not None:
            recording.log(f"{root}/metrics/{metric}", rerun.Scalars(line[metric]))
    for frame, picture in enumerate(arrays["frames"][place]):
        recording.set_time("latent_frame", sequence=frame)
        size = picture.shape[:2]
        recording.log(f"{root}/camera", rerun.Image(picture))
        recording.log(
            f"{root}/camera/mask", rerun.SegmentationImage(arrays["frame_masks"][place, frame].astype(np.uint8))
        )
        for block, heat in enumerate(arrays["attention"][row, :, frame] if "attention" in arrays else ()):
            recording.log(
                f"{root}/attention/block_{block + 1}", rerun.DepthImage(_heat(heat, size), colormap="inferno")
            )
        for array in arrays:
            if array.startswith("sensitivity_"):
                heat = arrays[array][place]
                recording.log(
                    f"{root}/{array.replace('_', '/', 1)}",
                    rerun.DepthImage(_heat(heat if heat.ndim == 2 else heat[frame], size), colormap="inferno"),
                )
            elif array.startswith("pca_"):
                recording.log(
                    f"{root}/pca/{array.removeprefix('pca_')}",
                    rerun.Image(_enlarged(arrays[array][place, frame], size)),
                )


def _heat(heat: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A token grid stretched to [0, 1] and enlarged to the frame's size."""
    low, high = float(heat.min()), float(heat.max())
    scaled = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    picture = Image.fromarray(scaled.astype(np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.NEAREST))


def _enlarged(colours: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A grid of colours at the frame's size."""
    return np.asarray(Image.fromarray(colours).resize((size[1], size[0]), Image.Resampling.NEAREST))
