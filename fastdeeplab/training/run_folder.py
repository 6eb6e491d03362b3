"""The folder of a training run: its options, its checkpoints, and a model file of the last and of the best weights.

Each file is written under a temporary name and renamed when it is complete, so a run that is killed, or finds the disk
full, leaves the checkpoint before as it was.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fastdeeplab
from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.convert import CheckpointError
from fastdeeplab.model import ResNetModel
from fastdeeplab.training.options import (
    TrainingOptions,
    as_dict,
    differences,
    read_toml,
    with_absolute_paths,
    write_toml,
)
from fastdeeplab.weights_file import write_safetensors

FORMAT = 2  # of last.pt


class RunFolder:
    """``config.toml``, ``last.pt`` (all that a resume needs), ``last.safetensors`` and ``best.safetensors``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config, self.checkpoint = self.path / "config.toml", self.path / "last.pt"
        self.last, self.best = self.path / "last.safetensors", self.path / "best.safetensors"
        self.saved_step: int | None = None

    def check_new(self) -> None:
        """Raise a FileExistsError if weights of a run are here already; options alone are of one that never began."""
        for file in (self.checkpoint, self.last, self.best):
            if file.exists():
                raise FileExistsError(
                    f"{self.path} holds a run already ({file.name}): resume it, or choose another folder with out"
                )

    def create(self, options: TrainingOptions) -> None:
        """Make the folder and write the options into it."""
        self.check_new()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_options(options)

    def write_options(self, options: TrainingOptions) -> None:
        """With absolute paths, so that a resume may begin in any folder."""
        write_toml(self.config, with_absolute_paths(options))

    def options(self) -> TrainingOptions:
        """Those that the run was started with, or resumed with the last time.

        Raises:
            FileNotFoundError: there is no run here.
            ValueError: the file is damaged, or of another version.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"there is no run to resume in {self.path}: {self.config.name} is missing")
        return TrainingOptions(**read_toml(self.config))

    def check_same(self, options: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the options, by name, in which the run differs from ``options``."""
        if different := differences(options, self.options()):
            raise ValueError(
                f"{self.path} can't be resumed with other options: {', '.join(different)}. Leave them out, or start "
                "a new run in another folder; its pretrained may be the last.safetensors of this one"
            )

    def load(self, processes: int) -> dict[str, Any] | None:
        """The checkpoint, on the CPU; None if the run ended before the first.

        Raises:
            CheckpointError: it can't be read, is of another version, or of a run with another number of processes.
        """
        for partial in self.path.glob(".*.partial"):  # of a run that was killed while it wrote
            partial.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises errors of many kinds on a damaged file
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.checkpoint} is damaged or not a checkpoint of a run ({reason})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"{self.checkpoint} is not a checkpoint that this version of fastdeeplab resumes")
        if state["processes"] != processes:
            raise CheckpointError(
                f"{self.checkpoint} is of a run with {state['processes']} processes, here are {processes}: "
                "the run can only go on with as many"
            )
        self.saved_step = state["step"]
        return state

    def save(self, state: Mapping[str, Any], model: ResNetModel, facts: Mapping[str, Any]) -> None:
        """Replace the checkpoint and the last weights.

        Raises:
            OSError: they can't be written; what was there before stays.
        """
        self.save_model(self.last, model, facts)  # before the checkpoint: a run that ends in between does it again
        with replace_when_complete(self.checkpoint) as partial:
            try:
                torch.save({"format": FORMAT, **state}, partial)
            except RuntimeError as error:  # what torch says of a full disk
                raise OSError(f"{self.checkpoint} could not be written: {str(error).partition(chr(10))[0]}") from error

    def save_model(self, path: Path, model: ResNetModel, facts: Mapping[str, Any]) -> None:
        """Write a file that ``ResNetModel.load`` takes; its metadata say where the weights come from."""
        program = Path(sys.argv[0]).name
        called = ["python", "-m", "fastdeeplab.cli"] if program == "__main__.py" else [program]
        origin = {
            "command": shlex.join([*called, *sys.argv[1:]]),
            "options": as_dict(self.options()),
            "versions": {
                "fastdeeplab": fastdeeplab.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            **facts,
        }
        write_safetensors(path, model.state_dict(), model.config, {"training": json.dumps(origin)})

    def what_is_kept(self) -> str:
        """For the end of an error message: what of the run can still be used."""
        if self.saved_step is None:
            return f"No checkpoint has been written to {self.path} yet"
        return (
            f"The checkpoint after step {self.saved_step} in {self.path} is whole: a resume goes on from it, and a run "
            f"with other options can start from its weights, with pretrained={self.last}"
        )
