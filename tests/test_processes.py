"""Several processes that train one model: the gradients of the whole batch in each, and a run under torchrun."""

import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, distributed
from training_runs import ALONE, CLASSES, SMALL, assert_same_gradients, batch_of, frozen_trainer, gradients, options

from fastdeeplab.data import Shapes
from fastdeeplab.evaluate import Evaluation
from fastdeeplab.model import ResNetModel
from fastdeeplab.training.interrupts import StopRequest
from fastdeeplab.training.pictures import Share
from fastdeeplab.training.processes import Processes, join
from fastdeeplab.training.run_folder import RunFolder
from fastdeeplab.training.trainer import Trainer

WEIGHTED: dict[str, Any] = {"class_weights": (1.0, 2.0, 0.5, 1.0, 0.0, 3.0), "label_smoothing": 0.1}


def start(rank: int, count: int, folder: Path, backend: str) -> None:
    importlib.import_module("torch.distributed.nn.functional")  # see fastdeeplab.training.processes.join
    distributed.init_process_group(
        backend, f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(minutes=5)
    )


def end() -> None:
    gc.collect()
    distributed.destroy_process_group()


def share_of(processes: Processes, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, targets = batch
    return images.chunk(processes.count)[processes.rank], targets.chunk(processes.count)[processes.rank]


def test_alone_there_is_nobody_to_ask() -> None:
    with join("cpu") as processes:
        assert processes == ALONE
        assert processes.is_first
        assert processes.sum(torch.tensor(3.0)) == 3
        assert [processes.any(True), processes.any(False)] == [True, False]
        assert processes.gather("a") == ["a"]
        processes.wait()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_can_not_be_used(device: str) -> None:
    with pytest.raises(ValueError, match=f"device {device} can't be used"), join(device):
        pass


def _ask_the_others(rank: int, folder: Path) -> None:
    start(rank, 2, folder, "gloo")
    with join("cpu") as processes:
        assert (processes.rank, processes.count, processes.is_first) == (rank, 2, rank == 0)
        assert processes.sum(torch.tensor(rank + 1.0)) == 3
        assert processes.any(rank == 1)
        assert not processes.any(False)
        assert processes.gather(f"of {rank}") == ["of 0", "of 1"]
        values = torch.full((2,), float(rank))
        processes.copy_from_first([values])
        assert not values.any()
    assert distributed.is_initialized(), "who joined before stays"
    end()


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    mp.spawn(_ask_the_others, (tmp_path,), nprocs=2)


def _counted(model: ResNetModel, dataset: Share, *, progress: Callable[[int], None], **_: object) -> Evaluation:
    """In place of an evaluation: how many pictures there are, in the first place of the matrix."""
    for done in range(1, len(dataset) + 1):
        progress(done)
    confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    confusion[0, 0] = len(dataset)
    return Evaluation(CLASSES, confusion, len(dataset))


def _validate(trainer: Trainer) -> None:
    """Three pictures: two for the first process, one for the second."""
    pictures = Shapes("val", size=32, limit=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdeeplab.training.trainer.evaluate", _counted)
        found = trainer.validate(pictures, StopRequest())
        assert found is not None
        assert (found.confusion.sum(), found.confusion[0, 0], found.pictures) == (3, 3, 3), "the sum of both"
        for asked in range(2):
            stop = StopRequest(trainer.processes.rank == asked)
            assert trainer.validate(pictures, stop) is None, "whichever process was asked"


def _gradients_of_a_share(rank: int, folder: Path) -> None:
    start(rank, 2, folder, "gloo")
    torch.set_num_threads(1)
    with join("cpu") as processes:
        for name, changed in (("plain", {}), ("weighted", WEIGHTED)):
            trainer = frozen_trainer(folder, processes, **changed)
            images, targets = share_of(processes, batch_of(4, ignored=2))
            one = gradients(trainer, [(images, targets)])
            accumulated = gradients(trainer, list(zip(images.split(1), targets.split(1), strict=True)))
            torch.save([one, accumulated], folder / f"{name}{rank}.pt")
            _validate(trainer)
            del trainer
    end()


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    """With one batch each and with two accumulated ones. All that is ignored is in the first process's pictures.

    They validate all pictures together, too, and stop together.
    """
    mp.spawn(_gradients_of_a_share, (tmp_path,), nprocs=2)
    for name, changed in (("plain", {}), ("weighted", WEIGHTED)):
        expected_loss, expected = gradients(frozen_trainer(tmp_path, **changed), [batch_of(4, ignored=2)])
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        for (loss, found), (other_loss, other) in zip(first, second, strict=True):
            torch.testing.assert_close(loss, expected_loss)
            assert_same_gradients(found, expected)
            assert torch.equal(loss, other_loss)
            assert all(torch.equal(found[key], other[key]) for key in expected), "on every rank"


def test_a_mean_over_each_process_would_be_wrong() -> None:
    """What the test above has to tell apart: the mean of the processes' means weighs few valid pixels as many."""
    batch = batch_of(4, ignored=2)
    trainer = frozen_trainer(Path("unused"))
    _, whole = gradients(trainer, [batch])
    shares = [gradients(trainer, [share_of(Processes(rank, 2, ALONE.device), batch)])[1] for rank in (0, 1)]
    mean = {name: (shares[0][name] + shares[1][name]) / 2 for name in whole}
    with pytest.raises(AssertionError):
        assert_same_gradients(mean, whole)


# Under torchrun


def torchrun(*arguments: object, processes: int = 2, code: str = "") -> subprocess.CompletedProcess[str]:
    program: tuple[object, ...] = ("-m", "fastdeeplab.cli", "train")
    if code:
        program = (code,)
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *program)
    return subprocess.run(
        list(map(str, (*command, *arguments))),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def arguments_of(out: Path, **changed: object) -> list[str]:
    found = ["--out", str(out)]
    for name, value in (SMALL | changed).items():
        if value is None:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return found


THREADS = """
import atexit, os, time
def name(thread):
    try:
        return open(f"/proc/self/task/{thread}/comm").read()
    except OSError:  # it has just ended
        return ""
def show():
    for _ in range(50):  # one that has been waited for may be listed for a moment
        left = [found for found in map(name, os.listdir("/proc/self/task")) if "gloo" in found]
        if not left:
            break
        time.sleep(0.02)
    os.write(1, f"left at the end: {left}\\n".encode())  # in one piece: two processes share the pipe
atexit.register(show)
"""
RUN = """
from fastdeeplab import cli
cli.main()
"""
CYCLE = """
import torch
from fastdeeplab.training.processes import join
def work():
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    network(torch.ones(1, 2)).sum().backward()
    held = [network]
    held.append(held)
with join("cpu"):
    work()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
@pytest.mark.parametrize("program", [RUN, CYCLE], ids=["a run", "what only the collector finds"])
def test_no_thread_of_the_processes_group_is_left_when_python_ends(program: str, tmp_path: Path) -> None:
    """One that then frees a tensor would abort a run that has succeeded."""
    (tmp_path / "threads.py").write_text(THREADS + program)
    ended = torchrun("train", *arguments_of(tmp_path / "run", epochs=1), code=str(tmp_path / "threads.py"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("left at the end: []\n") == 2, ended.stdout


def test_torchrun_trains_what_one_process_trains_with_the_whole_batch(tmp_path: Path) -> None:
    """And an interrupted run of two processes goes on with the random states of both."""
    from fastdeeplab.train import train

    chosen = {"freeze_bn": True, "dropout": 0.0, "limit": 8, "lr": 1e-3, "checkpoint_every": 1}
    ended = torchrun(*arguments_of(tmp_path / "two", batch_size=2, **chosen))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("mIoU") == 3, "the first process alone shows anything: each epoch, and the end"
    train(options(tmp_path / "one", batch_size=4, **chosen))
    start_of_both = Trainer(options(tmp_path, **chosen), CLASSES, ALONE, 1).model.state_dict()
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        moved = float((value.double() - start_of_both[key].double()).norm())
        assert float((two[key].double() - value.double()).norm()) <= 1e-3 * moved + 1e-9, key


STOPPED = """
import os, signal, sys
from fastdeeplab import cli
from fastdeeplab.training.trainer import Trainer
train_step, rank, at, number = Trainer.train_step, *map(int, sys.argv[1:4])
def wrapped(self, batches):
    if self.step == at and self.processes.rank == rank:
        os.kill(os.getpid(), number)
    return train_step(self, batches)
Trainer.train_step = wrapped
sys.argv[1:] = sys.argv[4:]
cli.main()
"""


def test_an_interrupted_run_of_two_processes_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """The signal reaches the second process alone; both end after the same step."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    assert torchrun(*arguments_of(tmp_path / "alone")).returncode == 0
    arguments = ("train", *arguments_of(tmp_path / "run"))
    ended = torchrun(1, 2, int(signal.SIGTERM), *arguments, code=str(tmp_path / "stopped.py"))
    assert ended.returncode != 0
    state = RunFolder(tmp_path / "run").load(processes=2)
    assert state is not None
    assert state["step"] == 3
    assert torchrun("--resume", "--out", tmp_path / "run").returncode == 0
    for name in ("last.safetensors", "best.safetensors"):
        one, two = (load_file(tmp_path / run / name) for run in ("alone", "run"))
        assert all(torch.equal(two[key], value) for key, value in one.items()), name


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path, killed: int) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    arguments = ("train", *arguments_of(tmp_path / "run", checkpoint_every=1))
    ended = torchrun(killed, 2, int(signal.SIGKILL), *arguments, code=str(tmp_path / "stopped.py"))
    assert ended.returncode != 0
    if "error:" in ended.stderr:  # of the other one, if torchrun lets it speak
        assert "error: Another process of the run ended at step 3, and may have said why" in ended.stderr
        assert "The checkpoint after step 2 in" in ended.stderr
    state = RunFolder(tmp_path / "run").load(processes=2)
    assert state is not None
    assert state["step"] == 2
    if killed:
        resumed = torchrun("--resume", "--out", tmp_path / "run")
        assert resumed.returncode == 0, resumed.stderr
        assert "going on after step 2 of 4" in resumed.stdout


def test_pictures_that_can_not_be_used_are_named_by_every_process(tmp_path: Path) -> None:
    """Each reads its share; none waits for one that has ended."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for index in range(12):
            picture = Image.new("RGB" if folder == "images" else "L", (16, 16))
            picture.save(tmp_path / folder / f"{index:02}.png")
    for index in (3, 8):
        (tmp_path / f"masks/{index:02}.png").write_bytes(b"damaged")
    data = {"data": "folder", "images": tmp_path / "images", "masks": tmp_path / "masks", "classes": 3}
    arguments = arguments_of(tmp_path / "run", **data, limit=None, val_limit=None, size=None)
    ended = torchrun(*arguments)
    assert ended.returncode != 0
    assert "2 of 12 pictures can't be used" in ended.stderr
    for index in (3, 8):
        assert f"masks/{index:02}.png" in ended.stderr
    assert not (tmp_path / "run").exists()


# Batch statistics over all processes


def _synchronised_gradients(rank: int, count: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    start(rank, count, folder, "nccl")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with join(f"cuda:{rank}") as processes:
        trainer = Trainer(options(folder, sync_bn=True, dropout=0.0), CLASSES, processes, 10)
        found = gradients(trainer, [share_of(processes, batch_of(4, ignored=2))])
        buffers = {name: value.cpu() for name, value in trainer.model.named_buffers()}
        torch.save([found, buffers], folder / f"{rank}.pt")
        del trainer
    end()


@pytest.mark.gpu
def test_synchronised_batch_norms_have_the_statistics_of_the_whole_batch(tmp_path: Path) -> None:
    count = 2
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    mp.spawn(_synchronised_gradients, (count, tmp_path), nprocs=count)
    trainer = Trainer(options(tmp_path, dropout=0.0), CLASSES, ALONE, 10)
    expected_loss, expected = gradients(trainer, [batch_of(4, ignored=2)])
    for rank in range(count):
        (loss, found), buffers = torch.load(tmp_path / f"{rank}.pt", map_location="cpu")
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm()) <= 1e-2 * float(gradient.norm()) + 1e-7, name
        for name, value in trainer.model.named_buffers():
            torch.testing.assert_close(buffers[name], value, rtol=1e-3, atol=1e-5)
