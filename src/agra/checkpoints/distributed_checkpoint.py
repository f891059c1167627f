"""Checkpoints of several processes: torch DCP in safetensors, written in the background, committed in one rename.

Every process writes its own shards and their checksums. When DCP has heard from all processes, the main process adds
the manifest and renames the folder (`agra.checkpoints.write.commit`). Until then earlier checkpoints stay as they are.
"""

import shutil
from collections.abc import Mapping
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
from agra.checkpoints.write import Writers, commit, remove_unfinished, unfinished, unwritten


class Writer(HuggingFaceStorageWriter):
    """DCP's safetensors writer with our folder, manifest and commit. DCP passes an error of one process to all."""

    def __init__(self, run: Path, step: int, writers: Writers, *, keep: int) -> None:
        self.run, self.step, self.writers, self.keep = run, step, writers, keep
        self.folder = unfinished(run, step)
        super().__init__(str(self.folder / "sharded"), save_distributed=True)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remove the unfinished folders of killed runs, on the main process. The other processes make no folder."""
        if is_coordinator:
            remove_unfinished(self.run)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan. The superclass would make the folder, which is the main process's task."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder and write the small files, on the main process, before any process writes shards."""
        Path(self.path).mkdir(parents=True)
        for name, write in self.writers.items():
            write(self.folder / name)
            files.sync(self.folder / name)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Write this process's shards, and a checksum beside each file."""
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.value()}:
            path = Path(self.path) / name
            files.write_text(path.with_suffix(".sha256"), files.sha256(path))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and rename the folder, on the main process, after all processes have written."""
        manifest = {name: files.sha256(self.folder / name) for name in sorted(self.writers)}
        for path in sorted(Path(self.path).glob("*.sha256")):
            manifest[f"sharded/{path.stem}.safetensors"] = path.read_text()
            path.unlink()
        files.sync(Path(self.path))
        commit(self.folder, self.run, self.step, manifest, keep=self.keep)


class PendingSave:
    """A checkpoint that is being written in the background."""

    def __init__(self, writer: Writer, future: Future) -> None:
        self.writer, self.future = writer, future

    def wait(self) -> None:
        """Wait until it is committed. Raises OSError in every process where one of them could not write."""
        try:
            self.future.result()
        except CheckpointException as error:
            shutil.rmtree(self.writer.folder, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0]
            raise unwritten(self.writer.run, self.writer.step, cause) from error


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], writers: Writers, *, keep: int, group: dist.ProcessGroup
) -> PendingSave:
    """Copy every process's `tensors` and write them in the background. Training may change them meanwhile.

    `group` needs a backend for the CPU and has no other use. At most one save may run at a time.
    """
    writer = Writer(run, step, writers, keep=keep)
    future = async_save(dict(tensors), storage_writer=writer, process_group=group)
    return PendingSave(writer, cast(Future, future))
