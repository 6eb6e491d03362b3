"""CUDA graphs: their books, and what is recorded and replayed, on simulated graphs; the real ones on a GPU."""

import copy
import gc
import importlib
import io
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import randomise_batch_norm, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdeeplab as fdl
from fastdeeplab import graphs, kernels
from fastdeeplab.graphs import WARM_UP_RUNS, Graphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [(1, 3, 33, 17), (2, 3, 16, 24), (1, 3, 40, 40)]


def make_fast(device: torch.device = CPU, dtype: torch.dtype = torch.float32, **arguments: Any) -> fdl.AcceleratedModel:
    model = small_model(**arguments)
    randomise_batch_norm(model)
    return fdl.accelerate(model.to(device), dtype=dtype, kernels="torch" if device == CPU else "auto")


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: the operators that run inside, and their results, which ``replay`` computes again."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" not in str(func):
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.log.append("replay")
        for func, args, kwargs, result in self.calls:
            for kept, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                kept.copy_(new)


class FakeCuda:
    """What ``fastdeeplab.graphs`` uses of ``torch.cuda``, with a log of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captures: list[dict[str, Any]] = []
        self.capturing = False
        self.current = SimpleNamespace(name="caller", wait_event=lambda event: self.log.append("wait"))

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def graph_pool_handle(self) -> object:
        return object()

    def Stream(self, device: torch.device) -> object:  # noqa: N802
        return SimpleNamespace(name="side")

    def Event(self) -> object:  # noqa: N802
        return SimpleNamespace(record=lambda stream: self.log.append(f"record on {stream.name}"))

    def CUDAGraph(self) -> Tape:  # noqa: N802
        return Tape(self.log)

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def current_stream(self) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before = self.current
        self.current = stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, tape: Tape, *, stream: Any, **arguments: Any) -> Iterator[None]:
        """As the real one it leaves its stream current where ending the capture fails."""
        self.captures.append({"stream": stream, **arguments})
        before = self.current
        self.current = stream
        with tape:
            yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Captures and replays on the CPU: the same code as on a GPU, between the fakes."""
    fake = FakeCuda()

    class Torch:
        cuda = fake

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(graphs, "torch", Torch())
    monkeypatch.setattr("fastdeeplab.packed.can_run", lambda _: False)  # no GPU has a CPU's packed weights
    check = graphs.check_device
    monkeypatch.setattr(importlib.import_module("fastdeeplab.accelerate"), "check_device", lambda _: check(CUDA))
    return fake


def replays(fake: FakeCuda) -> int:
    return fake.log.count("replay")


def captured(fast: fdl.AcceleratedModel) -> tuple[tuple[int, ...], ...]:
    return () if fast._graphs is None else fast._graphs.shapes


# What is right or wrong to ask for.


@pytest.mark.parametrize(
    "shapes",
    [
        (1, 3, 32, 32),
        torch.Size((1, 3, 32, 32)),
        [(3, 32, 32)],
        [(1, 4, 32, 32)],
        [(0, 3, 32, 32)],
        [(1, 3, 32, 0)],
        [(1, 3, -8, 32)],
        [(1, 3, 32, 32.0)],
        [(True, 3, 32, 32)],
        [SHAPES[0], (1, 1, 32, 32)],
        ["1333"],
        "1333",
        None,
        torch.zeros(1, 3, 32, 32),
    ],
)
def test_bad_shapes(shapes: Any, cuda: FakeCuda) -> None:
    fast = make_fast()
    with pytest.raises(ValueError, match="shapes must"):
        fast.capture(shapes)
    assert not cuda.captures
    assert fast._graphs is None


@pytest.mark.parametrize("lazy", [-1, 1.0, True, None])
def test_bad_lazy(lazy: Any) -> None:
    with pytest.raises(ValueError, match="lazy must be an integer from 0 up"):
        make_fast().capture([], lazy=lazy)


@pytest.mark.parametrize("lazy", [0, 2])
def test_a_model_on_the_cpu_has_no_cuda_graphs(lazy: int) -> None:
    fast = make_fast()
    with pytest.raises(RuntimeError, match=r"need a model on a CUDA device, and this one is on cpu"):
        fast.capture(SHAPES, lazy=lazy)
    assert fast._graphs is None
    fast(torch.randn(SHAPES[0]))


def test_capturing_inside_the_callers_capture(cuda: FakeCuda) -> None:
    fast = make_fast()
    cuda.capturing = True
    with pytest.raises(RuntimeError, match="the current stream is being captured"):
        fast.capture(SHAPES)
    assert "synchronize" not in cuda.log  # which would break the caller's capture
    assert captured(fast) == ()


# Books.


class FakeRecorder:
    """Counts what is captured; a replay takes a while and notices others beside it."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.running = 0
        self.overlapped = False
        self.error: Exception | None = None

    def __call__(self, compute: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        if self.error is not None:
            raise self.error
        self.shapes.append(shape)

        def replay(images: Tensor) -> Tensor:
            self.running += 1
            time.sleep(0.002)
            self.overlapped |= self.running > 1
            self.running -= 1
            return compute(images)

        return replay


def books() -> tuple[Graphs, FakeRecorder]:
    recorder = FakeRecorder()
    return Graphs(CPU, recorder), recorder


def negate(images: Tensor) -> Tensor:
    return -images


def test_only_captured_shapes_are_replayed() -> None:
    found, _ = books()
    found.capture(negate, [(1, 1, 2, 3)], lazy=0)
    images = torch.randn(1, 1, 2, 3)
    replayed = found.replay(negate, images)
    assert replayed is not None
    assert torch.equal(replayed, -images)
    assert found.replay(negate, torch.randn(1, 1, 3, 2)) is None
    assert found.replay(negate, torch.empty(1, 1, 2, 3, device="meta")) is None


def test_large_shapes_are_captured_first_and_each_once() -> None:
    found, recorder = books()
    found.capture(negate, [(1, 1, 2, 3), (2, 1, 2, 3), (1, 1, 2, 3)], lazy=0)
    found.capture(negate, [(1, 1, 2, 3), (1, 1, 9, 9)], lazy=0)
    assert recorder.shapes == [(2, 1, 2, 3), (1, 1, 2, 3), (1, 1, 9, 9)]
    assert found.shapes == tuple(recorder.shapes)


def test_lazy_is_bounded_and_adds_up() -> None:
    found, recorder = books()
    sizes = [torch.randn(1, 1, 2, width) for width in range(1, 6)]

    def served() -> list[bool]:
        return [found.replay(negate, images) is not None for images in sizes]

    found.capture(negate, [(1, 1, 2, 1)], lazy=2)
    assert served() == [True, True, True, False, False]
    assert served() == [True, True, True, False, False]
    found.capture(negate, [], lazy=1)
    found.capture(negate, [], lazy=1)
    assert served() == [True] * 5
    assert served() == [True] * 5
    assert len(recorder.shapes) == 5


def test_an_empty_batch_is_never_captured() -> None:
    found, recorder = books()
    found.capture(negate, [], lazy=1)
    assert found.replay(negate, torch.randn(0, 1, 2, 3)) is None
    assert recorder.shapes == []


def test_without_memory_lazy_captures_end_and_runs_go_on() -> None:
    found, recorder = books()
    found.capture(negate, [(1, 1, 2, 3)], lazy=5)
    recorder.error = torch.OutOfMemoryError("full")
    with pytest.warns(UserWarning, match=r"no memory to capture images of shape \(1, 1, 4, 4\)"):
        assert found.replay(negate, torch.randn(1, 1, 4, 4)) is None
    recorder.error = None
    assert found.replay(negate, torch.randn(1, 1, 4, 4)) is None
    assert found.replay(negate, torch.randn(1, 1, 2, 3)) is not None
    recorder.error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):  # what was asked for by name is not left out
        found.capture(negate, [(1, 1, 4, 4)], lazy=0)


def test_an_error_in_a_lazy_capture_is_raised_and_leaves_the_books_as_they_were() -> None:
    found, recorder = books()
    found.capture(negate, [], lazy=1)
    recorder.error = RuntimeError("a hook copies to the CPU")
    with pytest.raises(RuntimeError, match="a hook"):
        found.replay(negate, torch.randn(1, 1, 4, 4))
    recorder.error = None
    assert found.replay(negate, torch.randn(1, 1, 4, 4)) is not None


def test_threads_take_turns_across_models() -> None:
    found, recorder = books()
    other = Graphs(CPU, recorder)
    found.capture(negate, [], lazy=1)
    other.capture(negate, [], lazy=1)
    inputs = [torch.full((1, 1, 2, 3), float(value)) for value in range(8)]
    results: dict[int, Tensor | None] = {}
    barrier = threading.Barrier(len(inputs))

    def work(index: int) -> None:
        barrier.wait()
        results[index] = (found if index % 2 else other).replay(negate, inputs[index])

    run_in_threads(work, len(inputs))
    assert recorder.shapes == [(1, 1, 2, 3)] * 2  # each model's once, though all threads found it missing
    assert not recorder.overlapped
    for index, images in enumerate(inputs):
        replayed = results[index]
        assert replayed is not None
        assert torch.equal(replayed, -images)


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Fails where one is not done after a minute."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "deadlock"


# A model with simulated graphs.


def test_captured_is_uncaptured(cuda: FakeCuda) -> None:
    """Shapes interleaved, each twice with other images, in any dtype and strides: the same values and strides."""
    fast, plain = (make_fast(num_classes=5) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fast.capture(SHAPES)
    for dtype in (torch.float32, torch.float64, torch.float16):
        for shape in SHAPES * 2:
            images = torch.randn(shape, dtype=dtype)
            for given in (images, images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
                low, expected = fast.logits(given)["out"], plain.logits(given)["out"]
                assert torch.equal(low, expected)
                assert low.stride() == expected.stride()
            assert torch.equal(fast(images)["out"], plain(images)["out"])
            assert torch.equal(fast.predict(images, dtype=torch.uint8), plain.predict(images, dtype=torch.uint8))
    assert replays(cuda) == 3 * 6 * 5


def test_other_shapes_run_as_before(cuda: FakeCuda) -> None:
    fast = make_fast()
    expected = fast(images := torch.randn(1, 3, 20, 20))["out"]
    fast.capture(SHAPES)
    assert torch.equal(fast(images)["out"], expected)
    assert fast(torch.randn(0, 3, 20, 20))["out"].shape[0] == 0
    with pytest.raises(ValueError, match="images must be"):
        fast(torch.randn(1, 4, 33, 17))
    with pytest.raises(ValueError, match="images must be"):
        fast(torch.zeros(SHAPES[0], dtype=torch.uint8))
    assert replays(cuda) == 0


def test_lazily_captured_by_the_model(cuda: FakeCuda) -> None:
    fast = make_fast()
    inputs = [torch.randn(shape) for shape in SHAPES]
    expected = [fast(images)["out"] for images in inputs]
    fast.capture([], lazy=2)
    for images, wanted in list(zip(inputs, expected, strict=True)) * 2:
        assert torch.equal(fast(images)["out"], wanted)
    assert captured(fast) == tuple(SHAPES[:2])
    assert replays(cuda) == 4


def test_results_are_the_callers_own(cuda: FakeCuda) -> None:
    fast = make_fast()
    fast.capture(SHAPES[:1])
    first = fast.logits(torch.randn(SHAPES[0]))["out"]
    kept = first.clone()
    fast.logits(torch.randn(SHAPES[0]))
    assert torch.equal(first, kept)
    images = torch.randn(SHAPES[0])
    before = fast.logits(images)["out"].clone()
    fast.logits(images)["out"].zero_()
    assert torch.equal(fast.logits(images)["out"], before)


def test_a_replay_is_between_the_waiting_and_the_recording(cuda: FakeCuda) -> None:
    """On the caller's stream: wait for the last use, copy in, replay, copy out, record this use."""
    fast = make_fast()
    fast.capture(SHAPES[:1])
    cuda.log.clear()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "copy_" in str(func):
                cuda.log.append("copy")
            return func(*args, **(kwargs or {}))

    Tape.replay, replay = lambda self: self.log.append("replay"), Tape.replay  # type: ignore[method-assign]
    try:
        with Copies():
            fast.logits(torch.randn(SHAPES[0]))
    finally:
        Tape.replay = replay  # type: ignore[method-assign]
    assert cuda.log == ["wait", "copy", "replay", "copy", "record on caller"]


def test_how_a_shape_is_captured(cuda: FakeCuda) -> None:
    """After runs on another stream, in one pool and on one stream for all of a model, other threads left alone."""
    fast, runs = make_fast(), []
    fast.backbone.layer1.register_forward_hook(lambda *_: runs.append(cuda.current_stream().name))
    fast.capture(SHAPES)
    assert runs == ["side"] * (WARM_UP_RUNS + 1) * len(SHAPES)
    assert cuda.log.count("synchronize") == len(SHAPES)
    assert len({id(capture["pool"]) for capture in cuda.captures}) == 1
    assert len({id(capture["stream"]) for capture in cuda.captures}) == 1
    assert {capture["capture_error_mode"] for capture in cuda.captures} == {"thread_local"}
    recorder = fast._graphs._record  # type: ignore[union-attr]
    assert cuda.captures[0]["stream"] is not recorder._warm_up_stream  # type: ignore[attr-defined]
    other = make_fast()
    other.capture(SHAPES[:1])
    assert cuda.captures[-1]["pool"] is not cuda.captures[0]["pool"]
    assert cuda.captures[-1]["stream"] is not cuda.captures[0]["stream"]


@pytest.mark.parametrize("lazy", [False, True])
def test_captured_in_inference_mode_and_replayed_outside(lazy: bool, cuda: FakeCuda) -> None:
    """And the other way round; autocast and gradients of the caller's change nothing either."""
    fast, images = make_fast(), torch.randn(SHAPES[0])
    expected = fast(images)["out"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fast.capture([] if lazy else SHAPES[:1], lazy=int(lazy))
        inside = fast(images)["out"]
    with torch.enable_grad():
        outside = fast(images)["out"]
    assert torch.equal(inside, expected)
    assert torch.equal(outside, expected)
    assert not outside.requires_grad
    assert replays(cuda) == 2


def test_a_capture_that_fails_leaves_the_callers_stream_and_earlier_captures(cuda: FakeCuda) -> None:
    fast, images = make_fast(), torch.randn(SHAPES[0])
    expected = fast(images)["out"]
    fast.capture(SHAPES[:1])

    def fail(*_: object) -> None:
        if len(cuda.captures) == 2:
            raise ValueError("only while captured")

    handle = fast.backbone.layer2.register_forward_hook(fail)
    with pytest.raises(ValueError, match="only while captured"):
        fast.capture(SHAPES)
    assert cuda.current.name == "caller"
    assert captured(fast) == (SHAPES[0],)
    assert torch.equal(fast(images)["out"], expected)
    handle.remove()
    fast.capture(SHAPES)
    assert torch.equal(fast(images)["out"], expected)
    assert sorted(captured(fast)) == sorted(SHAPES)


# Hooks that run a captured model while another one, or the same, is captured.


@pytest.mark.parametrize("same", [False, True], ids=["another model", "the same model"])
@pytest.mark.parametrize("lazy", [False, True], ids=["asked for", "lazy"])
def test_a_hook_runs_a_captured_model_during_a_capture(same: bool, lazy: bool, cuda: FakeCuda) -> None:
    """No deadlock: what the hook runs is part of the capture, and nothing of it is replayed or captured by itself."""
    fast, images, inner = make_fast(), torch.randn(SHAPES[1]), torch.randn(SHAPES[0])
    expected = fast(images)["out"]
    called = fast if same else make_fast()
    wanted = called(inner)["out"]
    called.capture(SHAPES[:1], lazy=1)
    found: list[Tensor] = []
    hooked = SimpleNamespace(running=False)

    def run(*_: object) -> None:
        if not hooked.running:
            hooked.running = True
            found.append(called(inner)["out"])
            called(torch.randn(SHAPES[2]))  # which may be captured lazily, but not now
            hooked.running = False

    fast.backbone.layer2.register_forward_hook(run)

    def work(_: int) -> None:
        fast.capture([] if lazy else SHAPES[1:2], lazy=int(lazy))
        assert torch.equal(fast(images)["out"], expected)

    run_in_threads(work, 1)
    assert len(found) == WARM_UP_RUNS + 1
    assert all(torch.equal(each, wanted) for each in found)
    assert replays(cuda) == 1
    assert SHAPES[2] not in captured(called)


def test_a_hook_that_captures_during_a_capture_is_an_error(cuda: FakeCuda) -> None:
    fast, other = make_fast(), make_fast()
    handle = fast.backbone.layer2.register_forward_hook(lambda *_: other.capture(SHAPES[:1]))

    def work(_: int) -> None:
        with pytest.raises(RuntimeError, match="is being captured by this very thread"):
            fast.capture(SHAPES[:1])
        handle.remove()
        for model in (fast, other):  # and the turn is given back
            model.capture(SHAPES[:1])
            model(torch.randn(SHAPES[0]))

    run_in_threads(work, 1)
    assert replays(cuda) == 2


# Weights, copies, and what drops the graphs.


def test_weights_written_in_place_are_seen(cuda: FakeCuda) -> None:
    fast, other, images = make_fast(), make_fast(), torch.randn(SHAPES[0])
    fast.capture(SHAPES[:1])
    before = fast(images)["out"]
    fast.load_state_dict(other.state_dict())
    assert torch.equal(fast(images)["out"], other(images)["out"])
    assert not torch.equal(fast(images)["out"], before)
    assert replays(cuda) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda fast: fast.to("cpu"),
        lambda fast: fast.double(),
        lambda fast: fast.load_state_dict(fast.state_dict(), assign=True),
        lambda fast: fast.drop_captures(),
    ],
    ids=["to", "double", "assign", "drop"],
)
def test_moved_weights_drop_the_graphs(change: Callable[[fdl.AcceleratedModel], object], cuda: FakeCuda) -> None:
    fast, images = make_fast(), torch.randn(SHAPES[0])
    fast.capture(SHAPES, lazy=3)
    fast(images)
    change(fast)
    assert captured(fast) == ()
    fast(images)
    assert replays(cuda) == 1
    assert len(cuda.captures) == len(SHAPES)
    fast.capture(SHAPES[:1])
    fast(images)
    assert captured(fast) == (SHAPES[0],)
    assert replays(cuda) == 2


def test_the_dtype_of_a_later_capture_is_the_models(cuda: FakeCuda) -> None:
    fast, images = make_fast(), torch.randn(SHAPES[0])
    fast.capture(SHAPES[:1])
    fast.double()
    expected = fast(images)["out"]
    fast.capture(SHAPES[:1])
    assert torch.equal(fast(images)["out"], expected)
    assert fast(images)["out"].dtype == torch.float64


def test_a_state_dict_that_does_not_fit_leaves_the_graphs(cuda: FakeCuda) -> None:
    fast = make_fast()
    fast.capture(SHAPES[:1])
    with pytest.raises(fdl.CheckpointError):
        fast.load_state_dict({})
    assert captured(fast) == (SHAPES[0],)


def deep(fast: fdl.AcceleratedModel) -> Any:
    return copy.deepcopy(fast)


def pickled(fast: fdl.AcceleratedModel) -> Any:
    return pickle.loads(pickle.dumps(fast))


def saved(fast: fdl.AcceleratedModel) -> Any:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [deep, pickled, saved])
def test_a_copy_has_no_graphs(duplicate: Callable[[fdl.AcceleratedModel], Any], cuda: FakeCuda) -> None:
    fast, images = make_fast(), torch.randn(SHAPES[0])
    fast.capture(SHAPES, lazy=2)
    twin = duplicate(fast)
    assert captured(twin) == ()
    assert captured(fast) != ()
    assert torch.equal(twin(images)["out"], fast(images)["out"])
    assert replays(cuda) == 1
    twin.capture(SHAPES[:1])
    assert torch.equal(twin(images)["out"], fast(images)["out"])
    with torch.no_grad():
        fast.classifier[4].bias.add_(1)
    assert not torch.equal(twin(images)["out"], fast(images)["out"])


def test_graphs_do_not_keep_a_model_alive(cuda: FakeCuda) -> None:
    fast = make_fast()
    fast.capture(SHAPES[:1], lazy=1)
    fast(torch.randn(SHAPES[1]))
    gone = weakref.ref(fast)
    gc.disable()  # by reference counts alone: graphs hold the GPU's memory
    try:
        del fast
        assert gone() is None
    finally:
        gc.enable()


# Who must see the run itself.


def test_explain_lists_the_layers_of_a_captured_shape(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, images = make_fast(), torch.randn(SHAPES[0])
    fast.capture(SHAPES[:1], lazy=1)
    fdl.explain(fast, images)
    with kernels.recording():
        fast(images)
        fast(torch.randn(SHAPES[1]))
    assert replays(cuda) == 0
    assert captured(fast) == (SHAPES[0],)
    fast(images)
    assert replays(cuda) == 1


def test_compiled_and_exported_code_passes_the_graphs_by(cuda: FakeCuda) -> None:
    fast, images = make_fast(), torch.randn(SHAPES[0])
    expected = fast(images)["out"]
    fast.capture(SHAPES[:1], lazy=1)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images)["out"], expected)
    exported = torch.export.export(fast, (images,))
    torch.testing.assert_close(exported.module()(images)["out"], expected)
    assert replays(cuda) == 0
    fast(images)
    assert replays(cuda) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traced_code_passes_the_graphs_by(cuda: FakeCuda) -> None:
    """Else the buffers of the capture would be constants of the traced program."""
    fast, images = make_fast(), torch.randn(SHAPES[0])
    expected = fast(2 * images)["out"]
    fast.capture(SHAPES[:1], lazy=1)
    traced = torch.jit.trace(fast, images, strict=False, check_trace=False)
    torch.testing.assert_close(traced(2 * images)["out"], expected)
    assert replays(cuda) == 0
    assert len(cuda.captures) == 1


# On a GPU.


@pytest.fixture
def fast(device: torch.device) -> fdl.AcceleratedModel:
    return make_fast(device, torch.float16)


def uncaptured(fast: fdl.AcceleratedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    plain = copy.deepcopy(fast)
    return plain.logits(images)["out"], plain.predict(images)


def outputs(fast: fdl.AcceleratedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    return fast.logits(images)["out"], fast.predict(images)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert [tensor.stride() for tensor in actual] == [tensor.stride() for tensor in expected]
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


GPU_SHAPES = [(1, 3, 65, 97), (2, 3, 128, 96), (3, 3, 224, 160)]


@pytest.mark.gpu
def test_a_hook_runs_a_captured_model_during_a_real_capture(device: torch.device) -> None:
    """What it runs is launched again with each replay, and the model's own results stay as they were."""
    fast, other = (make_fast(device, torch.float16) for _ in range(2))
    images, inner = torch.randn(SHAPES[1], device=device), torch.randn(SHAPES[0], device=device)
    expected, wanted = fast(images)["out"], other.logits(inner)["out"]
    other.capture(SHAPES[:1], lazy=1)
    written = torch.zeros_like(wanted)

    def run_the_other(*_: object) -> None:
        written.copy_(other.logits(inner)["out"])

    handle = fast.backbone.layer2.register_forward_hook(run_the_other)

    def work(_: int) -> None:
        fast.capture(SHAPES[1:2])

    run_in_threads(work, 1)
    handle.remove()
    written.zero_()
    assert torch.equal(fast(images)["out"], expected)
    torch.testing.assert_close(written, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lazy", [False, True])
def test_gpu_captured_is_uncaptured_bit_by_bit(dtype: torch.dtype, lazy: bool, device: torch.device) -> None:
    """A dozen calls of shapes in turn, other memory taken and given back between them."""
    fast = make_fast(device, dtype)
    inputs = [torch.randn(shape, device=device) for shape in GPU_SHAPES * 4]
    expected = [uncaptured(fast, images) for images in inputs]
    fast.capture([] if lazy else GPU_SHAPES, lazy=len(GPU_SHAPES) * lazy)
    held: list[Tensor] = []
    results = []
    for index, images in enumerate(inputs):
        results.append(outputs(fast, images))
        held.append(torch.full((2**20 * (1 + index % 5),), float("nan"), device=device))
        if index % 3 == 2:
            held.clear()
            torch.cuda.empty_cache()
    assert captured(fast) == tuple(GPU_SHAPES if lazy else GPU_SHAPES[::-1])
    for actual, wanted in zip(results, expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.gpu
def test_gpu_fewer_launches(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    """A replay really is one launch, and copies round it."""
    images = torch.randn(GPU_SHAPES[0], device=device)

    def launches() -> int:
        fast.logits(images)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            fast.logits(images)
        return sum(event.name.startswith("fastdeeplab::") for event in profiler.events())

    assert launches() > 10
    fast.capture([images.shape])
    assert launches() == 0


@pytest.mark.gpu
def test_gpu_two_streams(device: torch.device) -> None:
    """The second stream's images arrive while the first's are being computed: each gets its own logits."""
    fast = make_fast(device, torch.float16, width=0.5)
    shape = (4, 3, 512, 512)
    inputs = [torch.randn(shape, device=device) for _ in range(6)]
    expected = [uncaptured(fast, images)[0] for images in inputs]
    fast.capture([shape, (2, 3, 512, 512)])
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize(device)
    results = []
    for index in range(48):
        with torch.cuda.stream(streams[index % 2]):
            if index % 7 == 3:
                torch.cuda._sleep(1_000_000)  # cycles
            results.append(fast.logits(inputs[index % 6])["out"])
            scratch = torch.full_like(inputs[0], float("nan"))  # takes the memory that a freed result would leave
            del scratch
    torch.cuda.synchronize(device)
    for index, actual in enumerate(results):
        assert torch.equal(actual, expected[index % 6]), index


@pytest.mark.gpu
def test_gpu_results_follow_the_callers_stream(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    images = torch.randn(GPU_SHAPES[1], device=device)
    expected = uncaptured(fast, images)
    fast.capture([GPU_SHAPES[1]])
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a replay on another stream would not wait for the copy below
        late = torch.empty_like(images).copy_(images)
        actual = outputs(fast, late)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert_same(actual, expected)


@pytest.mark.gpu
def test_gpu_threads(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    """Each on a stream of its own, two models between them."""
    models = [fast, make_fast(device, torch.bfloat16)]
    inputs = [torch.randn(shape, device=device) for shape in GPU_SHAPES]
    expected = [[uncaptured(model, images)[0] for images in inputs] for model in models]
    for model in models:
        model.capture(GPU_SHAPES)
    torch.cuda.synchronize(device)
    results: dict[tuple[int, int], Tensor] = {}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for turn in range(30):
                results[index, turn] = models[index % 2].logits(inputs[(index + turn) % 3])["out"]
            torch.cuda.current_stream(device).synchronize()

    run_in_threads(work, 4)
    for (index, turn), actual in results.items():
        assert torch.equal(actual, expected[index % 2][(index + turn) % 3]), (index, turn)


@pytest.mark.gpu
def test_gpu_weights_written_in_place_are_seen(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    images = torch.randn(GPU_SHAPES[0], device=device)
    fast.capture([images.shape])
    before = outputs(fast, images)
    fast.load_state_dict(make_fast(device, torch.float16).state_dict())
    after = outputs(fast, images)
    assert not torch.equal(before[0], after[0])
    assert_same(after, uncaptured(fast, images))


@pytest.mark.gpu
def test_gpu_captures_share_memory(device: torch.device) -> None:
    """The second one needs no more than its images and logits, far less than its activations."""
    fast = make_fast(device, torch.float32, width=1.0)

    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)

    before = reserved()
    fast.capture([(4, 3, 512, 512)])
    one = reserved() - before
    fast.capture([(4, 3, 512, 480)])
    two = reserved() - before
    assert one > 2**27
    assert two - one < one / 2
    fast.drop_captures()
    assert reserved() - before < one / 2  # cuBLAS keeps workspaces


@pytest.mark.gpu
def test_gpu_dropped_while_it_runs(device: torch.device) -> None:
    fast = make_fast(device, torch.float16, width=0.5)
    images = torch.randn(4, 3, 512, 512, device=device)
    expected = uncaptured(fast, images)[0]
    for _ in range(3):
        fast.capture([images.shape])
        torch.cuda._sleep(50_000_000)
        actual = fast.logits(images)["out"]
        fast.drop_captures()
        torch.cuda.empty_cache()
        scratch = torch.full((2**28,), float("nan"), device=device)
        assert torch.equal(actual, expected)
        del scratch


@pytest.mark.gpu
def test_gpu_the_callers_own_capture(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    """The caller's graph holds the launches themselves; capturing inside it is refused, and does not break it."""
    images = torch.randn(GPU_SHAPES[0], device=device)
    fast.capture([images.shape], lazy=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        low = fast.logits(images)["out"]
        with pytest.raises(RuntimeError, match="the current stream is being captured"):
            fast.capture([GPU_SHAPES[1]])
    images.copy_(torch.randn_like(images))
    graph.replay()
    torch.cuda.synchronize(device)
    assert torch.equal(low, uncaptured(fast, images)[0])


@pytest.mark.gpu
def test_gpu_inference_mode(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    images = torch.randn(GPU_SHAPES[0], device=device)
    expected = uncaptured(fast, images)
    with torch.inference_mode():
        fast.capture([images.shape])
        inside = outputs(fast, images)
    assert_same(inside, expected)
    assert_same(outputs(fast, images), expected)


@pytest.mark.gpu
def test_gpu_a_capture_that_fails_leaves_the_stream_and_the_model(
    fast: fdl.AcceleratedModel, device: torch.device
) -> None:
    images = torch.randn(GPU_SHAPES[0], device=device)
    expected = uncaptured(fast, images)
    before = torch.cuda.current_stream(device)

    def fail(*_: object) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("only while captured")

    handle = fast.backbone.layer2.register_forward_hook(fail)
    with pytest.raises(ValueError, match="only while captured"):
        fast.capture([images.shape])
    handle.remove()
    assert torch.cuda.current_stream(device) == before
    assert_same(outputs(fast, images), expected)
    fast.capture([images.shape])
    assert_same(outputs(fast, images), expected)


@pytest.mark.gpu
def test_gpu_images_elsewhere_are_refused_as_without_graphs(fast: fdl.AcceleratedModel) -> None:
    fast.capture([GPU_SHAPES[0]])
    with pytest.raises(ValueError, match="must be on cpu"):
        fast(torch.randn(GPU_SHAPES[0]))


@pytest.mark.gpu
def test_gpu_moved_to_the_cpu_and_back(fast: fdl.AcceleratedModel, device: torch.device) -> None:
    images = torch.randn(GPU_SHAPES[0], device=device)
    expected = uncaptured(fast, images)
    fast.capture([images.shape])
    fast.to("cpu").to(device)
    assert captured(fast) == ()
    fast.capture([images.shape])
    assert_same(outputs(fast, images), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_a_device_that_is_not_current(device: torch.device) -> None:
    other = torch.device("cuda", 1)
    fast = make_fast(other, torch.float16)
    images = torch.randn(GPU_SHAPES[0], device=other)
    expected = uncaptured(fast, images)
    fast.capture([images.shape])
    assert torch.cuda.current_device() == 0
    assert_same(outputs(fast, images), expected)
