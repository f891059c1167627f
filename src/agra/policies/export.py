"""Exports: one folder of whole safetensors with a model card, to the hub and back (C.3)."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from agra import files
from agra.checkpoints.folder import resolve, verify
from agra.checkpoints.lineage import carry, describe, lineage
from agra.checkpoints.read import part_tensors, read_config
from agra.checkpoints.recorded_sizes import FILE as RECORDED_SIZES
from agra.config import RunConfig
from agra.hub import download_model, model_card_text, upload_model
from agra.lora import LoRAConfig
from agra.methods.method import Method
from agra.policies.instructions import FILE as INSTRUCTIONS
from agra.policies.load import acts_on_average, load_method
from agra.wam.codec import CodecConfig
from agra.wam.text import TextConfig
from agra.weights import write_tensors

LICENSE = "apache-2.0"
"""Licence of the weights, which is that of the code. Change the card to state another one."""
MADE_OF = "export.json"
"""The file that records the checkpoint and the options of an export."""
_COPIED = ("norm_stats.json", "trainer.json", "codec.safetensors", INSTRUCTIONS, RECORDED_SIZES)


def export(source: str | Path, output: Path, *, ema: bool = False, half: bool = False) -> Path:
    """Write a policy's newest checkpoint, whole or sharded, as a self-contained folder without optimiser state.

    The folder includes the settings and logs of all stages. Adapters are merged. With `ema` the averaged weights
    replace the trained ones, as they always do for a method that acts on them. With `half` weights are rounded to
    float16. An `output` that already holds this export is left as it is.

    Raises FileNotFoundError where there is no checkpoint. Raises ValueError for a damaged checkpoint, for one without
    averages or with values beyond float16's range, and where `output` is not empty.
    """
    folder = resolve(source)
    verify(folder)
    made_of = {"source": files.sha256(folder / "manifest.json"), "ema": ema, "half": half}
    if output.exists() and any(output.iterdir()):
        earlier = output / MADE_OF
        if not earlier.is_file() or json.loads(earlier.read_text()) != made_of:
            raise ValueError(f"{output}: not empty; choose a new folder")
        verify(output)
        return output
    with files.replacing(output) as temporary:
        temporary.mkdir()
        files.write_text(temporary / MADE_OF, json.dumps(made_of) + "\n")
        _write(folder, temporary, ema=ema, half=half)
        if output.exists():
            output.rmdir()
    return output


def push(source: str | Path, name: str, *, private: bool = True, ema: bool = False) -> str:
    """Export a policy and upload it to the hub as `name` (owner/model). Returns its address.

    Raises ValueError for an invalid name, and OSError with the remedy where the hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        return upload_model(export(source, Path(folder) / "model", ema=ema), name, private=private)


def pull(name: str, output: Path, *, revision: str | None = None) -> Path:
    """Download a policy into a new folder and check every file of it.

    The hub's client continues an interrupted download. Raises FileNotFoundError with the remedy, and ValueError for a
    damaged file.
    """
    download_model(name, output, revision=revision)
    verify(output)
    return output


def _write(checkpoint: Path, folder: Path, *, ema: bool, half: bool) -> None:
    config = read_config(checkpoint)
    for name in _COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    ema = ema or acts_on_average(checkpoint, config)
    method = load_method(checkpoint, config, averaged=ema)
    parts = method.parts()
    whole = replace(config, stage=replace(config.stage, lora=LoRAConfig()))  # the history has the adapters' settings
    files.write_text(folder / "config.json", whole.to_json())
    for part, module in parts.items():
        weights: Mapping[str, Tensor] = part_tensors({part: module})
        if half:
            weights = {name: _halved(name, value) for name, value in weights.items()}
        write_tensors(folder / f"{part}.safetensors", weights)
    stages = lineage(checkpoint)
    carry(stages, folder)
    steps = json.loads((checkpoint / "trainer.json").read_text())["step"]
    card = model_card(config, describe(stages), steps=steps, method=method, ema=ema)
    files.write_text(folder / "README.md", card)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = {name: files.sha256(folder / name) for name in names}
    files.write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _halved(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    rounded = value.half()
    if not rounded.isfinite().all():
        raise ValueError(f"{name}: holds values beyond float16's range; export it without half")
    return rounded


def model_card(config: RunConfig, description: str, *, steps: int, method: Method, ema: bool) -> str:
    """Write the model card of a checkpoint. `description` states its method and stages."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.parts().items()}
    stage, shapes = config.stage, config.method.shapes
    rows = "\n".join(f"| `{name}` | {count:,} |" for name, count in counts.items())
    frozen = [_frozen_part(part) for part in (config.method.codec, config.method.text) if part is not None]
    strides = " or ".join(dict.fromkeys(str(source.frame_stride) for source in config.data.sources))
    listed = f"{' and '.join(frozen)}, under their own licences" if frozen else "none"
    return model_card_text(
        f"# {config.method.describe().partition(':')[0]}\n\n"
        f"{description}. Trained with `agra`. Weights after step {steps:,} of the {stage.name} stage, batch "
        f"{stage.batch_size}{', averaged weights' if ema else ''}.\n\n"
        f"| part | parameters |\n|---|---|\n{rows}\n\n"
        f"- Embodiments: {', '.join(config.data.embodiments)}. {shapes.horizon} actions per chunk, a frame "
        f"every {strides} control steps, {shapes.frame_size[0]} x {shapes.frame_size[1]} pixels.\n"
        f"- Frozen parts: {listed}. Weights: Apache-2.0.\n"
        "- Success rates are not part of this card. Measure them with `agra evaluate`.\n\n"
        "```python\nimport agra\n\npolicy = agra.load_policy(FOLDER)  # agra pull NAME FOLDER\n```\n",
        license=LICENSE,
        tags=["robotics", config.method.kind.replace("_", "-")],
    )


def _frozen_part(part: CodecConfig | TextConfig) -> str:
    """Name a frozen part, with its source unless it comes with agra."""
    return {"patch_pca": "the patch PCA in codec.safetensors", "minilm": "the packaged MiniLM"}.get(
        part.kind, f"{part.kind} ({part.source})"
    )
