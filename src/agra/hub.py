"""Checkpoints that leave the machine: one folder of whole safetensors with a model card, to the hub and back.       C.3"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from agra.config import RunConfig
from agra.pretrained import loading, stored_tensors
from agra.training import checkpoint, lineage
from agra.training.lora import LoRAConfig, merged
from agra.wam.codec import CodecConfig
from agra.wam.model import WAM
from agra.wam.text import TextConfig

_KEPT = ("norm_stats.json", "trainer.json", "codec.safetensors")


def export(source: str | Path, output: Path, *, ema: bool = False, half: bool = False) -> Path:
    """Write a policy's newest checkpoint, whole or sharded, as a folder that needs nothing else; no optimiser state.

    The settings and logs of all stages that made it come with it; adapters are merged. With `ema` the averaged weights stand in for the
    trained ones; with `half` they are rounded to float16. Raises FileNotFoundError where there is no checkpoint,
    ValueError where it is damaged, holds no average or what float16 cannot, or `output` is not empty.
    """
    found = checkpoint.resolve(source)
    checkpoint.verify(found)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: not empty; choose a folder that is not there yet")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write(found, temporary, ema=ema, half=half)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def push(source: str | Path, name: str, *, private: bool = True, ema: bool = False) -> str:
    """Export a policy and upload it to the hub as `name` (owner/model); returns its address.

    Raises ValueError where the name is none, OSError naming the remedy where the hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = export(source, Path(folder) / "model", ema=ema)
        api = HfApi()
        try:
            address = str(api.create_repo(name, private=private, exist_ok=True))
            api.upload_folder(repo_id=name, folder_path=made, commit_message="Checkpoint of agra")
        except HFValidationError as error:
            raise ValueError(f"{name}: no name for the hub; expected owner/model") from error
        except (HfHubHTTPError, OSError) as error:
            raise OSError(
                f"{name}: could not be uploaded ({' '.join(str(error).split())}); run `hf auth login` with a token "
                "that may write there"
            ) from error
    return address


def pull(name: str, output: Path, *, revision: str | None = None) -> Path:
    """Download a policy that `push` uploaded into a new folder and check every file of it.

    The hub's client goes on with an interrupted download. Raises FileNotFoundError with the remedy, ValueError where a
    file is damaged.
    """
    with loading("policy", source=name, revision=revision):
        snapshot_download(name, revision=revision, local_dir=output)
    checkpoint.verify(output)
    return output


def _write(found: Path, folder: Path, *, ema: bool, half: bool) -> None:
    config = checkpoint.read_config(found)
    for name in _KEPT:
        if (found / name).is_file():
            shutil.copyfile(found / name, folder / name)
    with torch.device("meta"):
        model = WAM(config.model)
    model.to_empty(device="cpu")
    with merged(model, config.stage.lora):
        checkpoint.load_weights(model, found)
        if ema:
            _take_average(model, found)
    whole = replace(config, stage=replace(config.stage, lora=LoRAConfig()))  # the history tells of the adapters
    checkpoint.write_text(folder / "config.json", whole.to_json())
    weights = model.state_dict()
    if half:
        weights = {name: _halved(name, value) for name, value in weights.items()}
    checkpoint.write_tensors(folder / "model.safetensors", weights)
    stages = lineage.lineage(found)
    lineage.carry(stages, folder)
    steps = json.loads((found / "trainer.json").read_text())["step"]
    card = model_card(config, lineage.describe(stages), steps=steps, model=model, ema=ema)
    checkpoint.write_text(folder / "README.md", str(card))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = {name: checkpoint.sha256(folder / name) for name in names}
    checkpoint.write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _take_average(model: WAM, found: Path) -> None:
    """Copy the average of every parameter that was trained over its last value."""
    prefix, own = "ema/wam.", model.state_dict()
    if (found / "sharded").is_dir():
        names = checkpoint.stored_names(found / "sharded")
        averaged = {name: own[name.removeprefix(prefix)] for name in names if name.startswith(prefix)}
        checkpoint.read_shards(averaged, found / "sharded")
    else:
        path = found / "optimizer.safetensors"
        with stored_tensors([path], str(path)) as stored, torch.no_grad():
            averaged = {name: value for name, value in stored.items() if name.startswith(prefix)}
            for name, value in averaged.items():
                own[name.removeprefix(prefix)].copy_(value[...])
    if not averaged:
        raise ValueError(f"{found}: holds no averaged weights; train with --stage.ema-decay")


def _halved(name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    rounded = value.half()
    if not rounded.isfinite().all():
        raise ValueError(f"{name}: holds values beyond float16's range; export it without half")
    return rounded


def _frozen(part: CodecConfig | TextConfig) -> str:
    """The name of a frozen part, with where it comes from unless it travels with agra."""
    return {"patch_pca": "the patch PCA in codec.safetensors", "minilm": "the packaged MiniLM"}.get(
        part.kind, f"{part.kind} ({part.source})"
    )


def model_card(config: RunConfig, description: str, *, steps: int, model: WAM, ema: bool) -> ModelCard:
    """What a checkpoint is: `description` says how it was made, the config its parts, data, stage, and how to run it."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    stage = config.stage
    data = ModelCardData(library_name="agra", tags=["robotics", "world-action-model"])
    rows = "\n".join(f"| `{name}` | {count:,} |" for name, count in parts.items())
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        "# World action model\n\n"
        f"{description}. Trained with `agra`; here after step {steps:,} of the {stage.name} stage, batch "
        f"{stage.batch_size}{', averaged weights' if ema else ''}.\n\n"
        f"| part | parameters |\n|---|---|\n{rows}\n\n"
        f"- Embodiments: {', '.join(config.data.embodiments)}; {config.model.action_dit.horizon} actions a chunk, a frame "
        f"every {config.data.frame_stride} control steps, {config.model.frame_size[0]} x {config.model.frame_size[1]} "
        f"pixels.\n"
        f"- Frozen parts: {_frozen(config.model.codec)} and {_frozen(config.model.text)}, under the licences of their own.\n"
        "- Its success rates are not part of this card; measure them with `agra evaluate`.\n\n"
        "```python\nfrom agra.policy import WAMPolicy\n\npolicy = WAMPolicy.load(FOLDER)  # agra pull NAME FOLDER\n```\n"
    )
