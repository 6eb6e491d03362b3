"""Training: exact resumes, faults that leave a usable checkpoint, gradients of parts that are those of the whole."""

import dataclasses
import gc
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import small_model
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import ALONE, CLASSES, assert_same_gradients, batch_of, frozen_trainer, gradients, options
from typer.testing import CliRunner

import fastdeeplab as fdl
from fastdeeplab import cli
from fastdeeplab.data import Augmentation, Augmented, Shapes, open_dataset
from fastdeeplab.evaluate import Evaluation, evaluate
from fastdeeplab.train import TrainingError, TrainingResult, train
from fastdeeplab.training.display import TrainingDisplay
from fastdeeplab.training.interrupts import StopRequest
from fastdeeplab.training.options import OPTIONS, TrainingOptions, as_dict, read_toml, write_toml
from fastdeeplab.training.pictures import augmentation_of, check_pictures, open_pictures, reading
from fastdeeplab.training.processes import Processes
from fastdeeplab.training.run_folder import RunFolder
from fastdeeplab.training.schedule import PictureOrder, learning_rate_factor
from fastdeeplab.training.trainer import Trainer

PARTS = ("backbone", "head", "aux")


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "last.safetensors")


def assert_same(actual: Any, expected: Any, name: str = "") -> None:
    """Bit by bit, and structure by structure."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected), name
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_same(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), name
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{name}[{i}]")
    else:
        assert actual == expected, name


def assert_same_run(actual: Path, expected: Path) -> None:
    for name in ("last", "best"):
        assert_same(load_file(actual / f"{name}.safetensors"), load_file(expected / f"{name}.safetensors"), name)
    states = [torch.load(run / "last.pt", weights_only=True) for run in (actual, expected)]
    assert_same(*states)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Trainer], object]) -> None:
    """Do something before the step of this number, counted from 1."""
    train_step = Trainer.train_step

    def wrapped(self: Trainer, batches: Any) -> float:
        if self.step == step - 1:
            action(self)
        return train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", wrapped)


def at_validated_picture(monkeypatch: pytest.MonkeyPatch, picture: int, action: Callable[[], object]) -> list[int]:
    """Do something after the picture of this number in all validations, counted from 1; return those that were done."""
    done: list[int] = []

    def wrapped(*arguments: Any, progress: Callable[[int], None], **named: Any) -> Evaluation:
        def act(count: int) -> None:
            done.append(count)
            if len(done) == picture:
                action()
            progress(count)

        return evaluate(*arguments, progress=act, **named)

    monkeypatch.setattr("fastdeeplab.training.trainer.evaluate", wrapped)
    return done


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


# The schedule


@pytest.mark.parametrize("pictures", [1, 7, 8, 12, 13])
def test_a_step_has_the_same_pictures_however_it_is_divided(pictures: int) -> None:
    whole = PictureOrder(pictures, 4, 1, seed=3)
    accumulated = PictureOrder(pictures, 2, 2, seed=3)
    shared = [PictureOrder(pictures, 2, 1, 3, rank, 2) for rank in range(2)]
    assert whole.steps_per_epoch == accumulated.steps_per_epoch == shared[0].steps_per_epoch == math.ceil(pictures / 4)
    for step in range(3 * whole.steps_per_epoch):
        expected = {picture for batch in whole.batches(step) for picture in batch}
        assert {p for batch in accumulated.batches(step) for p in batch} == expected
        assert {p for order in shared for batch in order.batches(step) for p in batch} >= expected
        assert len({tuple(map(len, order.batches(step))) for order in shared}) == 1, "every process has as much to do"


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("pictures", [2, 12, 17])
def test_an_epoch_has_every_picture(pictures: int, processes: int) -> None:
    for epoch in range(2):
        seen = []
        for rank in range(processes):
            order = PictureOrder(pictures, 2, 2, 0, rank, processes)
            first = epoch * order.steps_per_epoch
            seen += [p for step in range(first, first + order.steps_per_epoch) for b in order.batches(step) for p in b]
        assert {index for _, index in seen} == set(range(pictures))
        assert {e for e, _ in seen} == {epoch}
        assert len(seen) == pictures + -pictures % processes


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    def first(seed: int, step: int) -> list[int]:
        return [index for _, index in PictureOrder(50, 50, 1, seed).batches(step)[0]]

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_poly_schedule_with_warm_up() -> None:
    assert learning_rate_factor(0, 100) == 1
    assert learning_rate_factor(50, 100, power=0.9) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(99, 100, power=2) == pytest.approx(0.01**2)
    assert learning_rate_factor(0, 100, warmup_steps=4) == pytest.approx(0.2)
    assert learning_rate_factor(2, 100, power=0, warmup_steps=4) == pytest.approx(0.6)
    assert learning_rate_factor(4, 100, power=0, warmup_steps=4) == 1


# The options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.0),
        ("epochs", True),
        ("batch_size", "8"),
        ("lr", 0.0),
        ("lr", math.nan),
        ("backbone_lr", -0.1),
        ("momentum", 1.0),
        ("label_smoothing", 1.5),
        ("class_weights", (1.0, -1.0)),
        ("class_weights", ()),
        ("class_weights", (0.0, 0.0)),
        ("classes", ("a", "")),
        ("classes", 0),
        ("layers", (1, 2, 3)),
        ("amp", "fp8"),
        ("depth", 34),
        ("data", "coco"),
        ("loss_kernel", "cuda"),
        ("freeze_bn", 1),
        ("out", ""),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_wrong_options(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        TrainingOptions(**{name: value})  # type: ignore[arg-type]


def test_scales_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="scale_min must not be above scale_max"):
        TrainingOptions(scale_min=2, scale_max=1)


def test_options_through_a_toml_file(tmp_path: Path) -> None:
    written = TrainingOptions(lr=1, class_weights=(1.0, 2.5), classes=("a", "b"), layers=(1, 2, 3, 4), compile=True)
    write_toml(tmp_path / "run.toml", written)
    assert TrainingOptions(**read_toml(tmp_path / "run.toml")) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", "there is no option 'batchsize'; the nearest is 'batch_size'"),
        ("learning_rate = 3", "there is no option 'learning_rate'; the nearest is 'lr'"),
        ("[training]\nepochs = 3", "there is no option 'training'"),
        ("epochs = ", "is no TOML file"),
    ],
)
def test_a_wrong_toml_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_toml(tmp_path / "run.toml")


# A run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    result = train(options(out, accumulate=2, checkpoint_every=1))
    assert result == TrainingResult(out, 4, 4, result.miou, result.best_miou, finished=True)
    return out


def resumed(alone: Path, out: Path) -> TrainingOptions:
    return dataclasses.replace(RunFolder(alone).options(), out=str(out))


def test_a_run_leaves_its_options_and_weights_that_load(alone: Path) -> None:
    assert {file.name for file in alone.iterdir()} == {"config.toml", "last.pt", "last.safetensors", "best.safetensors"}
    assert tomllib.loads((alone / "config.toml").read_text())["accumulate"] == 2
    model = fdl.ResNetModel.load(alone / "last.safetensors")
    assert model.config["num_classes"] == len(CLASSES)
    with safe_open(alone / "best.safetensors", "pt") as file:
        origin = json.loads(file.metadata()["training"])
    assert origin["options"]["seed"] == 0
    assert origin["classes"] == list(CLASSES)
    assert origin["command"]
    assert origin["miou"] == torch.load(alone / "last.pt", weights_only=True)["best_miou"]


def test_two_runs_are_the_same_bit_by_bit_with_and_without_workers(alone: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(resumed(alone, tmp_path / "again"), workers=2))
    assert_same_run(tmp_path / "again", alone)


def test_learning(tmp_path: Path) -> None:
    """Four pictures by heart, with class weights and label smoothing."""
    losses: list[float] = []
    trainer = Trainer(options(tmp_path, lr=0.05, class_weights=[1.0] * 6, label_smoothing=0.02), CLASSES, ALONE, 40)
    batch = batch_of(4)
    for _ in range(25):
        trainer.set_learning_rates()
        losses.append(trainer.train_step([batch]))
    assert losses[-1] < 0.5 * losses[0]


def test_learning_rates_of_backbone_head_and_aux(tmp_path: Path) -> None:
    def rates(**changed: object) -> dict[str, float]:
        trainer = Trainer(options(tmp_path, lr=0.1, power=1, **changed), CLASSES, ALONE, 10)
        trainer.step = 5
        return trainer.set_learning_rates()

    assert rates() == pytest.approx(dict(zip(PARTS, (0.05, 0.05, 0.05), strict=True)))
    assert rates(backbone_lr=0.02, aux_lr=0.4) == pytest.approx(dict(zip(PARTS, (0.01, 0.05, 0.2), strict=True)))
    assert rates(warmup_steps=11)["head"] == pytest.approx(0.025), "half of the rise"
    small_model(num_classes=6).save(tmp_path / "start.safetensors")
    assert rates(pretrained=str(tmp_path / "start.safetensors"))["backbone"] == pytest.approx(0.005)


def test_events_of_steps_that_are_done_again_are_purged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run ended before its first checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = options(tmp_path / "run", tensorboard=True)
    with monkeypatch.context() as patch:
        at_step(patch, 3, spoil)
        with pytest.raises(TrainingError):
            train(chosen)
    train(chosen, resume=True)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_settings_of_cudnn_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its benchmark mode, while the run goes on."""
    found: list[Any] = []
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        at_step(
            monkeypatch,
            1,
            lambda _: found.extend([torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision]),
        )
        train(options(tmp_path / "run", epochs=1))
        assert found == [True, "ieee"]
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_tensorboard_and_the_console(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    console = Console(force_terminal=True, record=True, width=200, file=(tmp_path / "log").open("w"))
    train(options(tmp_path / "run", tensorboard=True), console=console)
    text = console.export_text()
    assert "epoch 1/2: loss " in text
    assert "images/s, mIoU " in text
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/miou")] == [3, 6]
    assert {f"learning_rate/{name}" for name in PARTS} <= set(events.Tags()["scalars"])


def test_the_progress_bar_of_slow_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loss, images per second and the time left, where each step takes a minute."""
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("fastdeeplab.training.display.time", clock)
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO(), get_time=clock.perf_counter)
    display = TrainingDisplay(
        RunFolder(tmp_path), steps=10, start=0, resumed=False, shown=True, tensorboard=False, console=console
    )
    for step in range(1, 4):
        now += 60
        display.step(step, 1, 0.5 / step, 240, {})
    assert display.progress is not None
    console.print(display.progress)
    assert re.search(r"epoch 1 .* 3/10 steps, loss 0\.1667, 4\.0 images/s, 0:07:00 left", console.export_text())


# What a step computes


@pytest.mark.parametrize("changed", [{}, {"class_weights": (1.0, 2.0, 0.5, 1.0, 0.0, 3.0), "label_smoothing": 0.1}])
def test_accumulated_batches_give_the_gradients_of_one_batch(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Also where one of them has far more ignored pixels."""
    images, targets = batch_of(4, ignored=2)
    trainer = frozen_trainer(tmp_path, **changed)
    loss, whole = gradients(trainer, [(images, targets)])
    parts_loss, parts = gradients(trainer, list(zip(images.split(2), targets.split(2), strict=True)))
    torch.testing.assert_close(parts_loss, loss)
    assert whole.keys() == dict(trainer.model.named_parameters()).keys()
    assert_same_gradients(parts, whole)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradients_are_those_of_the_public_loss(tmp_path: Path, smoothing: float) -> None:
    images, targets = batch_of(3, ignored=1)
    trainer = frozen_trainer(tmp_path, label_smoothing=smoothing)
    loss, actual = gradients(trainer, [(images, targets)])
    trainer.model.zero_grad()
    expected = fdl.SegmentationLoss(0.4, label_smoothing=smoothing)(trainer.model(images, upsample=False), targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad)


@pytest.mark.parametrize(
    ("value", "changed"),
    [(255, {}), (4, {"class_weights": (1.0, 2.0, 0.5, 1.0, 0.0, 3.0), "label_smoothing": 0.1})],
    ids=["ignored", "of a class of weight 0"],
)
def test_fault_14_a_batch_without_valid_pixels_changes_no_weight_by_its_loss(
    tmp_path: Path, value: int, changed: dict[str, Any]
) -> None:
    """Though with label smoothing the sum over pixels of a class of weight 0 is not 0."""
    images, targets = batch_of(2)
    trainer = frozen_trainer(tmp_path, **changed)
    loss, found = gradients(trainer, [(images, torch.full_like(targets, value))])
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())


def test_weights_decay_where_nothing_is_learned(tmp_path: Path) -> None:
    images, targets = batch_of(1)
    trainer = frozen_trainer(tmp_path, lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train_step([(images, torch.full_like(targets, 255))])
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.95 * before[name])


def test_the_augmentation_is_that_of_the_options(tmp_path: Path) -> None:
    chosen = options(tmp_path, crop_size=48, scale_min=0.7, scale_max=1.5, flip=0.25, jitter=0.12)
    assert augmentation_of(chosen) == Augmentation(
        crop_size=48, scale=(0.7, 1.5), flip=0.25, brightness=0.12, contrast=0.12, saturation=0.12, hue=0.02
    )


def test_fault_15_batches_of_one(tmp_path: Path) -> None:
    trainer = Trainer(options(tmp_path), CLASSES, ALONE, 10)
    for _ in range(2):
        assert math.isfinite(trainer.train_step([batch_of(1)]))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_frozen_batch_norms_keep_their_statistics_and_learn_their_scale(tmp_path: Path) -> None:
    trainer = frozen_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train_step([batch_of(2)])
    after = trainer.model.state_dict()
    assert torch.equal(after["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])
    assert torch.equal(after["backbone.bn1.num_batches_tracked"], before["backbone.bn1.num_batches_tracked"])
    assert not torch.equal(after["backbone.bn1.weight"], before["backbone.bn1.weight"])


def test_without_an_auxiliary_loss_there_is_no_auxiliary_head(tmp_path: Path) -> None:
    trainer = Trainer(options(tmp_path, aux_weight=0), CLASSES, ALONE, 10)
    assert trainer.model.aux_classifier is None
    assert trainer.set_learning_rates().keys() == {"backbone", "head"}
    trainer.train_step([batch_of(2)])


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(tmp_path: Path, channels_last: bool) -> None:
    trainer = Trainer(options(tmp_path, channels_last=channels_last), CLASSES, ALONE, 10)
    weight = trainer.model.classifier[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    trainer.train_step([batch_of(2)])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(tmp_path: Path, amp: str) -> None:
    images, targets = batch_of(2)
    exact, _ = gradients(frozen_trainer(tmp_path), [(images, targets)])
    trainer = frozen_trainer(tmp_path, amp=amp)
    seen: list[torch.dtype] = []
    trainer.model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs["out"].dtype))
    loss = trainer.train_step([(images, targets)])
    assert seen == [torch.bfloat16 if amp == "bf16" else torch.float16]
    assert loss == pytest.approx(exact.item(), rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_an_overflow_under_fp16_leaves_a_step_out_and_is_no_nan_loss(tmp_path: Path) -> None:
    trainer = frozen_trainer(tmp_path, amp="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert math.isfinite(trainer.train_step([batch_of(2)]))
    assert_same(dict(trainer.model.state_dict()), before)
    assert trainer.scaler.get_scale() == 2.0**99
    assert trainer.step == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_training(tmp_path: Path) -> None:
    images, targets = batch_of(2)
    exact, _ = gradients(frozen_trainer(tmp_path), [(images, targets)])
    torch.compiler.reset()
    trainer = frozen_trainer(tmp_path, compile=True)
    assert trainer.train_step([(images, targets)]) == pytest.approx(exact.item(), rel=1e-4)
    assert not any("_orig_mod" in key for key in trainer.state()["model"])
    evaluation = trainer.validate(Shapes("val", size=32, limit=1), StopRequest())
    assert evaluation is not None
    assert evaluation.pictures == 1


# Interrupted and resumed

KILLED = """
import os, signal, sys
from fastdeeplab.training.run_folder import RunFolder
from fastdeeplab.train import train
from fastdeeplab.training.trainer import Trainer
train_step, kill_at = Trainer.train_step, int(sys.argv[2])
def wrapped(self, batches):
    if self.step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, batches)
Trainer.train_step = wrapped
run = RunFolder(sys.argv[1])
options = run.options()
run.config.unlink()
train(options)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_fault_21_killed_at_a_random_step_and_resumed(alone: Path, tmp_path: Path) -> None:
    """The same weights, optimizer and random states, bit by bit, as the run left alone."""
    run = tmp_path / "run"
    run.mkdir()
    chosen = resumed(alone, run)
    write_toml(run / "config.toml", chosen)
    kill_at = random.SystemRandom().randrange(4)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(run), str(kill_at)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (run / "last.pt").exists() == (kill_at > 0)
    assert train(chosen, resume=True).finished
    assert_same_run(run, alone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_ends_the_run_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    """As a terminal, a service manager or a batch system sends it: to the workers, too."""
    arguments = [f"--{name.replace('_', '-')}" for name in ("out", "size", "width", "layers", "epochs", "batch_size")]
    values = [str(tmp_path / "run"), "32", "0.125", "1,1,1,1", "500", "2"]
    pairs = [text for pair in zip(arguments, values, strict=True) for text in pair]
    command = [sys.executable, "-m", "fastdeeplab.cli", "train", *pairs, "--checkpoint-every", "1", "--workers", "2"]
    with subprocess.Popen(
        [*command, "--no-tensorboard", "--limit", "64"], start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 600
        while not (tmp_path / "run/last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "interrupted after step" in said
    assert "go on with: fastdeeplab train --resume" in said


def test_an_interrupt_while_the_pictures_are_read(
    tmp_path: Path, folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastdeeplab.data.opening._why_unusable", lambda dataset, index: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        train(of_folders(tmp_path / "run", folders))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_a_resume_goes_on(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """In the middle of an epoch, where no checkpoint was due."""
    chosen = dataclasses.replace(resumed(alone, tmp_path / "run"), checkpoint_every=0)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), number))
        result = train(chosen)
    assert (result.step, result.finished) == (3, False)
    assert signal.getsignal(number) == before
    assert train(chosen, resume=True).finished
    assert_same_run(tmp_path / "run", alone)


def test_a_signal_amid_a_validation_ends_the_run_after_the_picture_and_a_resume_validates(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here amid the last validation, when every step is done."""
    chosen = dataclasses.replace(resumed(alone, tmp_path / "run"), checkpoint_every=0)
    with monkeypatch.context() as patch:
        done = at_validated_picture(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(chosen)
    assert (result.step, result.steps, result.finished) == (4, 4, False)
    assert done == [1, 2, 3, 1]
    console = Console(file=io.StringIO(), record=True)
    assert train(chosen, resume=True, console=console).finished
    assert "epoch 2/2: mIoU 0" in console.export_text(), "without a loss: no step was trained"
    assert_same_run(tmp_path / "run", alone)


def test_fp16_resumes_with_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(name: str) -> TrainingOptions:
        return options(tmp_path / name, amp="fp16", limit=4, batch_size=2)

    train(chosen("alone"))
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        train(chosen("run"))
    train(chosen("run"), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_a_finished_run_resumed_stays_as_it_is(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    assert train(resumed(alone, tmp_path / "run"), resume=True).finished
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_resuming_with_other_options(alone: Path) -> None:
    changed = dataclasses.replace(RunFolder(alone).options(), lr=0.5, epochs=9, workers=2)
    with pytest.raises(
        ValueError, match=r"epochs \(2 in the run, 9 now\), lr \(0.01 in the run, 0.5 now\)\. Leave"
    ) as e:
        train(changed, resume=True)
    assert "workers" not in str(e.value)


def test_resuming_with_another_number_of_processes(alone: Path) -> None:
    with pytest.raises(fdl.CheckpointError, match="of a run with 1 processes, here are 2"):
        RunFolder(alone).load(processes=2)


@pytest.mark.parametrize("new_name", [None, "another.png"], ids=["one less", "one renamed"])
def test_resuming_with_other_pictures(tmp_path: Path, folders: dict[str, Any], new_name: str | None) -> None:
    chosen = of_folders(tmp_path / "run", folders)
    train(chosen)
    name = Path(open_dataset(**opened(folders)).name(0)).name
    for folder in ("images", "masks"):
        path = tmp_path / folder / name
        path.rename(path.with_name(new_name)) if new_name else path.unlink()
    with pytest.raises(ValueError, match=r"trained on other pictures .*last\.safetensors"):
        train(chosen, resume=True)


def test_a_run_goes_on_from_another_folder_and_with_pictures_that_have_moved(
    tmp_path: Path, folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths were relative."""
    small_model(num_classes=3).save(tmp_path / "start.safetensors")
    relative = folders | {"images": "images", "masks": "masks", "pretrained": "start.safetensors"}
    monkeypatch.chdir(tmp_path)
    train(of_folders(Path("run"), relative, limit=2))
    monkeypatch.chdir("run")
    assert train(RunFolder("../run").options(), resume=True).finished
    for name in ("images", "masks"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    moved = ("--images", "../moved images", "--masks", "../moved masks", "--pretrained", "../start.safetensors")
    ended = run_command("--resume", "--out", ".", *moved)
    assert ended.exit_code == 0, ended.output
    assert train(RunFolder(tmp_path / "run").options(), resume=True).finished, "the new place is kept"


def test_what_a_kill_left_half_written_goes_with_the_resume(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run/.0123.partial").write_bytes(b"half")
    train(resumed(alone, tmp_path / "run"), resume=True)
    assert not (tmp_path / "run/.0123.partial").exists()


def test_resuming_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(options(tmp_path), resume=True)


def test_a_new_run_in_a_folder_that_holds_one(alone: Path) -> None:
    before = {file: file.read_bytes() for file in alone.iterdir()}
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(RunFolder(alone).options())
    assert {file: file.read_bytes() for file in alone.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_fault_16_a_damaged_checkpoint(alone: Path, tmp_path: Path, content: bytes | None) -> None:
    shutil.copytree(alone, tmp_path / "run")
    whole = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "run/last.pt").write_bytes(whole[:-1000] if content is None else content)
    with pytest.raises(fdl.CheckpointError, match="is damaged or not a checkpoint of a run"):
        train(resumed(alone, tmp_path / "run"), resume=True)


# Faults in the middle of a run


def spoil(trainer: Trainer) -> None:
    nn.init.constant_(trainer.model.backbone.conv1.weight, math.nan)


def test_a_nan_loss_ends_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, bytes] = {}

    def keep_and_spoil(trainer: Trainer) -> None:
        kept.update({file.name: file.read_bytes() for file in tmp_path.glob("run/*")})
        spoil(trainer)

    at_step(monkeypatch, 5, keep_and_spoil)
    with pytest.raises(
        TrainingError, match=r"The loss is nan at step 5: .* The checkpoint after step 3 in .* is whole"
    ):
        train(options(tmp_path / "run"))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("run/*")} == kept
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values() if value.is_floating_point())


def test_gradients_that_are_not_finite_are_not_applied(tmp_path: Path) -> None:
    trainer = frozen_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.classifier[4].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="The gradients are not finite"):
        trainer.train_step([batch_of(2)])
    assert_same(dict(trainer.model.state_dict()), before)


def test_a_nan_loss_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, 1, spoil)
        with pytest.raises(TrainingError, match="No checkpoint has been written"):
            train(chosen)
    assert train(dataclasses.replace(chosen, lr=0.001)).finished, "a folder without weights holds no run"


WORKER_KILLED = """
import os, signal, sys
from fastdeeplab import cli
from fastdeeplab.data import Augmented
parent, get = os.getpid(), Augmented.__getitem__
def fatal(self, key):
    if key[0] == 1 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return get(self, key)
Augmented.__getitem__ = fatal
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the worker is a fork of its process")
def test_a_killed_data_worker(tmp_path: Path) -> None:
    """In a process of its own: PyTorch raises its end within whatever runs then, a collector's callback too.

    Where that lets no exception out, the reading of the next batch notices it, in other words.
    """
    chosen = options(tmp_path / "run", workers=1, checkpoint_every=1)
    write_toml(tmp_path / "options.toml", chosen)
    command = [sys.executable, "-c", WORKER_KILLED, "train", "--config", str(tmp_path / "options.toml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    said = " ".join(ended.stderr.split())
    assert re.search(r"pictures ended at step \d: DataLoader worker \(pid.* (killed|exited unexpectedly)", said), said
    assert "is whole: a resume goes on from it" in said
    assert train(chosen, resume=True).finished


def test_a_data_worker_whose_end_is_noticed_amid_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises it in whatever the process does when the signal comes."""

    def noticed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", noticed)
    with pytest.raises(TrainingError, match=r"reads pictures ended at step \d: DataLoader worker \(pid 5\) is killed"):
        train(options(tmp_path / "run"))


def test_the_processes_that_read_end_although_their_batches_are_kept() -> None:
    """As the traceback of an error keeps them. Python would wait for them for ever at its own end."""
    samples = Augmented(Shapes(size=32, limit=9), Augmentation(crop_size=32), seed=0)
    others = set(multiprocessing.active_children())
    with reading(samples, PictureOrder(9, 4, 1, seed=0), range(3), workers=2, pin_memory=False) as batches:
        next(batches)
        readers = set(multiprocessing.active_children()) - others
    assert len(readers) == 2
    for reader in readers:
        reader.join(60)
    assert not any(reader.is_alive() for reader in readers)
    del batches  # kept until here


def test_the_processes_that_read_begin_before_the_displays_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    others, enter = set(multiprocessing.active_children()), TrainingDisplay.__enter__

    def counted(self: TrainingDisplay) -> TrainingDisplay:
        begun.append(len(set(multiprocessing.active_children()) - others))
        return enter(self)

    monkeypatch.setattr(TrainingDisplay, "__enter__", counted)
    train(options(tmp_path / "run", workers=2, epochs=1))
    assert begun == [2]


def test_an_error_that_is_kept_keeps_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook keeps the last one: a smaller batch must find the memory free."""
    trainers: list[weakref.ref[Trainer]] = []

    def fail(trainer: Trainer) -> None:
        trainers.append(weakref.ref(trainer))
        raise torch.OutOfMemoryError("CUDA out of memory")

    at_step(monkeypatch, 2, fail)
    with pytest.raises(TrainingError) as kept:
        train(options(tmp_path / "run", workers=1))
    gc.collect()
    assert trainers[0]() is None
    assert kept.value.__cause__ is not None


def test_what_a_data_worker_raises_is_named_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch puts the worker before it."""

    def raised(*_: object) -> None:
        raise OSError("Caught OSError in DataLoader worker process 0.\nToo many open files")

    monkeypatch.setattr(Trainer, "train_step", raised)
    with pytest.raises(TrainingError, match="A file could not be written or read at step 1: Caught OSError"):
        train(options(tmp_path / "run"))


@pytest.mark.parametrize("file", ["last.safetensors", "last.pt"])
def test_fault_21_a_full_disk(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """At the first of a checkpoint's files, and at the second, when the first is new already."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    chosen = resumed(alone, tmp_path / "run")
    most = (alone / file).stat().st_size - 1000
    try:
        with monkeypatch.context() as patch:  # as a full disk, but for this process alone
            at_step(patch, 3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1])))
            with pytest.raises(TrainingError, match=rf"{file}.* The checkpoint after step 2 in .* is whole"):
                train(chosen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("run/.*.partial"))
    assert train(chosen, resume=True).finished
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "Out of memory at step 2: a smaller batch_size with accumulate"),
        (MemoryError(), r"out of memory at step 2: fewer workers take less \(MemoryError\)\. No checkpoint"),
    ],
)
def test_fault_19_out_of_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    at_step(monkeypatch, 2, failing(error))
    with pytest.raises(TrainingError, match=message):
        train(options(tmp_path / "run"))


def test_fault_19_out_of_memory_in_a_validation_loses_no_epoch(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = dataclasses.replace(resumed(alone, tmp_path / "run"), checkpoint_every=0)
    with monkeypatch.context() as patch:
        at_validated_picture(patch, 2, failing(torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(
            TrainingError,
            match=r"Out of memory in the validation after step 2: it takes .* after step 2 in .* is whole",
        ):
            train(chosen)
    assert train(chosen, resume=True).finished
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(("right", "best"), [((3, 1), 1), ((1, 3), 2), ((0, 0), 2), ((0, 1), 2), ((1, 0), 1)])
def test_the_best_weights_are_those_of_the_highest_miou(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: tuple[int, int], best: int
) -> None:
    """Where no pixel counts there is none, which is said; the last weights are kept until there is one."""
    found = []
    for pixels in right:  # so many of the first class, and one that should have been
        confusion = torch.zeros(6, 6, dtype=torch.int64)
        confusion[0, :2] = torch.tensor([pixels, min(pixels, 1)])
        found.append(Evaluation(CLASSES, confusion, 1))
    evaluations = iter(found)
    monkeypatch.setattr(Trainer, "validate", lambda *_: next(evaluations))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = train(options(tmp_path / "run", limit=1))
    assert sum("No pixel counted" in str(warning.message) for warning in warned) == right.count(0)
    assert result.best_miou == (found[best - 1].miou if any(right) else None)
    assert result.miou == (found[1].miou if right[1] else None)
    with safe_open(tmp_path / "run/best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["epoch"] == best


# Data


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    """Twenty pictures and masks of three classes."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    dataset = Shapes(size=32, limit=20)
    for i in range(20):
        image, target = dataset[i]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{i:02}.png")
        Image.fromarray((target % 3).numpy()).save(masks / f"{i:02}.png")
    return {"data": "folder", "images": str(images), "masks": str(masks), "classes": 3, "size": None, "crop_size": 32}


def of_folders(out: Path, folders: dict[str, Any], **changed: object) -> TrainingOptions:
    return options(out, **(folders | {"limit": None, "val_limit": None, "epochs": 1} | changed))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_fault_17_corrupt_pictures_are_found_before_the_first_step(tmp_path: Path, folders: dict[str, Any]) -> None:
    truncate(tmp_path / "images/07.png")
    truncate(tmp_path / "masks/11.png")
    with pytest.raises(
        ValueError,
        match=r"^2 of 20 pictures can't be used:\n.*(07|11)\.png.*\n.*(07|11)\.png.*\nMend .* without check_data$",
    ):
        train(of_folders(tmp_path / "run", folders))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mask", "classes", "message"),
    [
        (lambda target: (target > 0) * 255, ("ground", "thing"), "thing; some masks have 255, which is no class"),
        (lambda target: target % 3, 9, "class 3, class 4, class 5, class 6, class 7 and 1 more$"),
    ],
    ids=["255 for a class", "fewer classes"],
)
def test_classes_that_no_mask_has_are_named(
    tmp_path: Path, folders: dict[str, Any], mask: Callable[[Tensor], Tensor], classes: Any, message: str
) -> None:
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(mask(Shapes(size=32)[int(path.stem)][1]).to(torch.uint8).numpy()).save(path)
    datasets = open_pictures(of_folders(tmp_path / "run", folders, classes=classes))
    with pytest.warns(RuntimeWarning, match=f"^No mask to train on has these classes: {message}"):
        check_pictures(datasets, ALONE, lambda _: None)


def test_fault_17_training_goes_on_without_corrupt_pictures(tmp_path: Path, folders: dict[str, Any]) -> None:
    names = [Path(open_dataset(split=split, **opened(folders)).name(0)) for split in ("train", "val")]
    for name in names:
        truncate(name)
    with pytest.warns(RuntimeWarning, match="is left out") as warned:
        assert train(of_folders(tmp_path / "run", folders, check_data=False)).finished
    messages = " ".join(str(warning.message) for warning in warned)
    assert all(name.name in messages for name in names)


def opened(folders: dict[str, Any]) -> dict[str, Any]:
    return {name: folders[name] for name in ("data", "images", "masks", "classes")}


def test_a_picture_that_goes_bad_while_the_run_goes_on(
    tmp_path: Path, folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 2, lambda _: [truncate(path) for path in (tmp_path / "images").iterdir()])
    nothing_counts = pytest.warns(RuntimeWarning, match="No pixel counted in the validation of epoch 1")
    with nothing_counts, pytest.warns(RuntimeWarning, match="is left out"):
        result = train(of_folders(tmp_path / "run", folders))
    assert result.finished
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_one_epoch_of_fine_tuning_from_torchvision_s_keys_with_other_classes(
    tmp_path: Path, folders: dict[str, Any]
) -> None:
    start = small_model(num_classes=21)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    chosen = of_folders(tmp_path / "run", folders, pretrained=str(tmp_path / "start.pth"), lr=1e-5, weight_decay=0.0)
    assert train(chosen).finished
    tuned, before = weights(tmp_path / "run"), start.state_dict()
    assert tuned["classifier.4.weight"].shape[0] == 3
    assert tuned["aux_classifier.4.bias"].shape[0] == 3
    for key in ("backbone.conv1.weight", "backbone.layer4.0.conv2.weight", "classifier.0.project.0.weight"):
        torch.testing.assert_close(tuned[key], before[key], rtol=0, atol=1e-2 * float(before[key].abs().max()))
        assert not torch.equal(tuned[key], before[key]), "they were trained"


@pytest.mark.parametrize("aux_head", [True, False])
def test_pretrained_weights_with_the_same_classes_keep_their_classifier(tmp_path: Path, aux_head: bool) -> None:
    start = small_model(num_classes=6, aux_head=aux_head)
    start.save(tmp_path / "start.safetensors")
    for aux_weight in (0.4, 0.0):
        chosen = options(tmp_path / "run", pretrained=str(tmp_path / "start.safetensors"), aux_weight=aux_weight)
        model = Trainer(chosen, CLASSES, ALONE, 1).model
        assert torch.equal(model.classifier[4].weight, start.classifier[4].weight)
        assert (model.aux_classifier is not None) == (aux_weight > 0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, ValueError, "class_weights must be 6 numbers, one per class, got 2"),
        ({"sync_bn": True}, ValueError, "sync_bn needs a GPU"),
        ({"device": "cuda:99"}, ValueError, "device cuda:99 can't be used"),
        ({"pretrained": "missing.pth"}, FileNotFoundError, "missing.pth"),
        ({"data": "folder", "size": None}, ValueError, "folder needs images and masks and classes"),
        ({"data": "voc", "size": None, "root": "missing"}, ValueError, "missing: there is no such folder"),
        ({"scale_max": 99.0}, ValueError, "scale must be"),
        ({"loss_kernel": "triton"}, ValueError, "loss_kernel must be another: .* the tensors are on a CPU"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr("fastdeeplab.kernels.choice.why_not", lambda *_: "the tensors are on a CPU")
    with pytest.raises(error, match=message):
        train(options(tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("package", "tensorboard"), [("tomli_w", False), ("tensorboard", True), ("kornia", False)])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, tensorboard: bool
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fastdeeplab\[training\]'"):
        train(options(tmp_path / "run", tensorboard=tensorboard))
    assert not (tmp_path / "run/config.toml").exists()


# The command


def run_command(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)])


def as_arguments(chosen: TrainingOptions) -> list[str]:
    """Those options that are not the default."""
    found = []
    for name, value in as_dict(chosen).items():
        flag = "--" + name.replace("_", "-")
        if value == getattr(TrainingOptions, name, None) or value is None:
            continue
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return found


def test_the_command_trains_and_resumes_with_the_run_s_own_options(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "run", as_arguments(resumed(alone, tmp_path / "run"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
        interrupted = run_command(*arguments)
    assert interrupted.exit_code == 130, interrupted.output
    assert "interrupted after step 3 of 4, mIoU 0" in interrupted.output
    assert f"go on with: fastdeeplab train --resume --out {out}" in interrupted.output
    refused = run_command("--resume", "--out", out, "--lr", 0.7)
    assert refused.exit_code == 2
    assert "lr (0.01 in the run, 0.7 now)" in refused.output
    finished = run_command("--resume", "--out", out, "--workers", 1)
    assert finished.exit_code == 0, finished.output
    assert "going on after step 3 of 4" in finished.output
    assert "finished, mIoU 0" in finished.output
    assert_same_run(out, alone)


def test_the_command_reads_a_toml_file_and_its_options_go_before_it(tmp_path: Path) -> None:
    chosen = options(tmp_path / "run", epochs=7, class_weights=(1.0, 1.0, 1.0, 1.0, 1.0, 2.0))
    write_toml(tmp_path / "chosen.toml", chosen)
    result = run_command("--config", tmp_path / "chosen.toml", "--epochs", 1, "--class-weights", "1,1,1,1,1,3")
    assert result.exit_code == 0, result.output
    expected = dataclasses.replace(chosen, epochs=1, class_weights=(1.0, 1.0, 1.0, 1.0, 1.0, 3.0))
    assert RunFolder(tmp_path / "run").options() == expected


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "go on with: fastdeeplab train"),
        ({"WORLD_SIZE": 2}, "go on with: torchrun --nproc-per-node 2 -m fastdeeplab.cli train"),
        (
            {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4},
            "torchrun --nnodes 2 --nproc-per-node 4 ... -m fastdeeplab.cli train",
        ),
    ],
)
def test_the_command_says_how_as_many_processes_go_on(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, int], command: str
) -> None:
    stopped = TrainingResult(Path("my run"), 3, 4, None, None, finished=False)
    monkeypatch.setattr("fastdeeplab.train.train", lambda *_, **__: stopped)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert f"{command} --resume --out 'my run'\n" in run_command().output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1,two"], "layers must be 4 positive integers, got '1,two'"),
        (["--amp", "fp8"], "amp must be none, bf16 or fp16"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--data", "folder", "--images", "x", "--masks", "y", "--classes", "3"], "x: there is no such folder"),
        (["--resume"], "no run to resume"),
    ],
)
def test_the_command_with_wrong_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_command("--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_every_option_is_on_the_command_line() -> None:
    parameters = {p.name for p in cli.typer.main.get_command(cli.app).commands["train"].params}  # type: ignore[attr-defined]
    assert parameters == {*OPTIONS, "config", "resume"}


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_learning_on_a_gpu(tmp_path: Path, amp: str) -> None:
    """By the Triton loss."""
    losses: list[float] = []
    chosen = options(tmp_path, amp=amp, device="cuda", loss_kernel="triton", lr=0.05)
    trainer = Trainer(chosen, CLASSES, Processes(0, 1, torch.device("cuda", 0)), 40)
    batch = batch_of(4)
    for _ in range(25):
        trainer.set_learning_rates()
        losses.append(trainer.train_step([batch]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_on_a_gpu(tmp_path: Path, amp: str) -> None:
    """And the weights load."""
    pytest.importorskip("tomli_w")
    chosen = options(tmp_path / "run", amp=amp, device="cuda", loss_kernel="triton", workers=2, jitter=0.0)
    assert train(chosen).finished
    fdl.ResNetModel.load(tmp_path / "run/last.safetensors")
