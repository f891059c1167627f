"""Checkpoints of several processes: torch DCP in safetensors, written in the background, committed in one rename.

Every process writes its own shards and their checksums; the first one, once DCP has heard from all of them, adds the
manifest and gives the folder its name (`checkpoint.commit`). Until then nothing that was there before is touched.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from agra import files
from agra.training import checkpoint

Writers = Mapping[str, Callable[[Path], object]]


class Writer(HuggingFaceStorageWriter):
    """DCP's safetensors writer with our folder, manifest and commit. DCP hands errors of one process to all."""

    def __init__(self, run: Path, step: int, writers: Writers, *, keep: int) -> None:
        self.run, self.step, self.writers, self.keep = run, step, writers, keep
        self.folder = checkpoint.unfinished(run, step)
        super().__init__(str(self.folder / "sharded"), save_distributed=True)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The first process clears what a killed run left; the others make no folder before they heard from it."""
        if is_coordinator:
            shutil.rmtree(self.folder, ignore_errors=True)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing: the folder is the first process's to make."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first process alone, before any other writes: the folder and the small files."""
        Path(self.path).mkdir(parents=True)
        for name, write in self.writers.items():
            write(self.folder / name)
            files.sync(self.folder / name)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """This process's shards, and the checksum of each file beside it."""
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.value()}:
            path = Path(self.path) / name
            files.write_text(path.with_suffix(".sha256"), files.sha256(path))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first process alone, after all have written: the manifest and the name."""
        manifest = {name: files.sha256(self.folder / name) for name in sorted(self.writers)}
        for path in sorted(Path(self.path).glob("*.sha256")):
            manifest[f"sharded/{path.stem}.safetensors"] = path.read_text()
            path.unlink()
        files.sync(Path(self.path))
        checkpoint.commit(self.folder, self.run, self.step, manifest, keep=self.keep)


class PendingSave:
    """A checkpoint on its way to the disk."""

    def __init__(self, writer: Writer, future: Future) -> None:
        self.writer, self.future = writer, future

    def wait(self) -> None:
        """Until it is committed. Raises OSError, in every process, where one of them could not write."""
        try:
            self.future.result()
        except CheckpointException as error:
            shutil.rmtree(self.writer.folder, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0]
            raise checkpoint.unwritten(self.writer.run, self.writer.step, cause) from error


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], writers: Writers, *, keep: int, group: dist.ProcessGroup
) -> PendingSave:
    """Copy every process's `tensors` and write them in the background; training may go on and change them.

    `group` is used by this alone, with a backend for the CPU. At most one save may be under way.
    """
    writer = Writer(run, step, writers, keep=keep)
    future = async_save(dict(tensors), storage_writer=writer, process_group=group)
    return PendingSave(writer, cast(Future, future))
