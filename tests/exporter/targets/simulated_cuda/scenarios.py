"""What is done on the simulated GPU, each in a process of its own: `python scenarios.py NAME JSON` prints a JSON.

ONNX Runtime's CUDA provider is the real one, and so is torch: only the CUDA libraries below them are simulated. Kernels
do nothing there, so numbers are compared for a model of products of matrices.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifact import Artifact, InputContract, Signature, Variant
from exporter.errors import RequestError
from exporter.targets.graph_session import MOST_GRAPHS, GraphSession
from exporter.targets.onnxruntime_cuda import OnnxRuntimeCuda
from exporter.targets.own_thread import OwnThread
from exporter.targets.turns import Turns
from tests.exporter.targets.simulated_cuda.sessions import GPU, MODELS, PATIENCE, Products, open_session

SHAPES = (1, 3, 8, 32)
CLOSE = 1e-4
WORKING, COMING = 4, 3
"""Threads that run the sessions that stay, and those that open others."""
RUNS = 200
"""Of each that works."""


def together(kinds: list[str], turns: bool = True) -> dict[str, Any]:
    """Two sessions from four threads that change shapes, while others are opened, captured, closed or let go."""
    if not turns:
        _no_turns()
    models = {kind: MODELS[kind]() for kind in kinds}

    def opened(number: int) -> tuple[Any, GraphSession]:
        kind = kinds[number % len(kinds)]
        return models[kind], open_session(models[kind], kind)

    sessions = [opened(number) for number in range(2)]
    numbers = np.random.default_rng(0)
    for model, session in sessions:  # bound beside, as latency is measured
        for batch in SHAPES:
            inputs = model.inputs(numbers, batch)
            binding = session.bind(inputs)
            binding.run()
            assert model.error(inputs, binding.host_outputs()) < CLOSE
            del binding
    gc.collect()
    GPU.slow()
    start, done = threading.Barrier(WORKING + COMING), threading.Event()

    def work(number: int) -> float:
        model, session = sessions[number % 2]
        numbers, order = np.random.default_rng(number), random.Random(number)
        start.wait()
        worst = 0.0
        for _ in range(RUNS):
            _pause(order)
            inputs = model.inputs(numbers, order.randint(1, MOST_GRAPHS + 2))
            worst = max(worst, model.error(inputs, session.run(inputs)))
        return worst

    def come_and_go(number: int) -> tuple[float, int]:
        numbers, order = np.random.default_rng(number), random.Random(number)
        start.wait()
        worst, count = 0.0, 0
        while not done.is_set():
            model, session = opened(count)
            for _ in range(PATIENCE + 2):  # the last ones are captured
                _pause(order)
                inputs = model.inputs(numbers, 5)
                worst = max(worst, model.error(inputs, session.run(inputs)))
            bound = session.bind(model.inputs(numbers, 4))
            _pause(order)
            del bound
            _pause(order)
            if count // len(kinds) % 2:
                session.close()
            del session
            count += 1
        return worst, count

    failures: list[str] = []
    errors: list[float] = []
    came_and_went = 0
    with ThreadPoolExecutor(WORKING + COMING) as pool:
        others = [pool.submit(come_and_go, WORKING + number) for number in range(COMING)]
        works = [pool.submit(work, number) for number in range(WORKING)]
        for job in works:
            with _told(failures):
                errors.append(job.result())
        done.set()
        for other in others:
            with _told(failures):
                error, count = other.result()
                errors.append(error)
                came_and_went += count
    return {
        "failures": failures,
        "worst": max(errors, default=None),
        "came_and_went": came_and_went,
        "graphs": [session.graphs() for _, session in sessions],
    }


def disturbed(kind: str) -> dict[str, Any]:
    """Another thread, which knows nothing of turns, allocates all the time."""
    model = MODELS[kind]()
    session = open_session(model, kind)
    GPU.slow()
    numbers, done = np.random.default_rng(0), threading.Event()

    def allocate() -> None:
        pointer = ctypes.c_void_p()
        while not done.is_set():
            if GPU.library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(64)) == 0:
                GPU.library.cudaFree(pointer)

    allocates = threading.Thread(target=allocate)
    allocates.start()
    worst = 0.0
    try:
        for number in range(20):
            inputs = model.inputs(numbers, SHAPES[number % len(SHAPES)])
            binding = session.bind(inputs)
            binding.run()
            worst = max(worst, model.error(inputs, binding.host_outputs()))
            del binding
    finally:
        done.set()
        allocates.join()
    GPU.slow(0, 0, 0)
    for number in range(PATIENCE * 2):
        inputs = model.inputs(numbers, SHAPES[number % 2])
        worst = max(worst, model.error(inputs, session.run(inputs)))
    return {"worst": worst, "graphs": session.graphs()}


def let_go(kind: str) -> dict[str, Any]:
    """Sessions with captured graphs are closed, forgotten, or outlived by what was bound."""
    model = MODELS[kind]()
    numbers = np.random.default_rng(0)
    keep = open_session(model, kind)
    keep.run(model.inputs(numbers, 1))
    before = GPU.held()
    kept = []
    for number in range(6):
        session = open_session(model, kind)
        inputs = model.inputs(numbers, 4)
        for _ in range(PATIENCE + 1):
            session.run(inputs)
        binding = session.bind(inputs)
        binding.run()
        if number % 3 == 2:
            kept.append((binding, inputs))
        if number % 2:
            session.close()
        del session, binding
        gc.collect()
    worst = 0.0
    for binding, inputs in kept:
        binding.run()
        worst = max(worst, model.error(inputs, binding.host_outputs()))
    del binding
    kept.clear()
    gc.collect()
    keep.run(model.inputs(numbers, 1))
    _until(lambda: GPU.counts()["cudaGraphExecDestroy"] >= GPU.counts()["cudaGraphInstantiate"])
    if kind != "onnxruntime":
        import torch

        torch.cuda.empty_cache()
    return {"worst": worst, "grew": GPU.held() - before}


def many_shapes() -> dict[str, Any]:
    """More shapes than a session holds graphs for, in random order."""
    model, order = Products(), random.Random(0)
    session = open_session(model, "onnxruntime")
    numbers, worst = np.random.default_rng(0), 0.0
    for _ in range(2000):
        inputs = model.inputs(numbers, order.randint(1, 12))
        worst = max(worst, model.error(inputs, session.run(inputs)))
    captured = GPU.counts()["cudaStreamBeginCapture"]
    session.close()
    return {"worst": worst, "captured": captured}


def left_open(kinds: list[str]) -> dict[str, Any]:
    """The process ends while sessions are open and used."""
    model = Products()
    for kind in kinds:
        session = open_session(model, kind)
        numbers = np.random.default_rng(0)
        inputs = model.inputs(numbers, 2)
        for _ in range(PATIENCE + 1):
            session.run(inputs)

        def work(session: GraphSession = session, inputs: dict[str, np.ndarray] = inputs) -> None:
            while True:
                session.run(inputs)

        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
    return {}


class Closes:
    """Closes a session when it is collected itself, in a cycle or when the process ends."""

    def __init__(self, session: GraphSession) -> None:
        self.session, self.me = session, self

    def __del__(self) -> None:
        self.session.close()


KEPT: list[Any] = []
"""Until the process ends."""


def closed_in_finalizers(kind: str) -> dict[str, Any]:
    """Sessions are closed by the collector of garbage, at exit and after it; what was bound goes on."""
    model = MODELS[kind]()
    numbers = np.random.default_rng(0)

    def opened() -> tuple[GraphSession, Any, dict[str, np.ndarray]]:
        session, inputs = open_session(model, kind), model.inputs(numbers, 4)
        for _ in range(PATIENCE + 1):
            session.run(inputs)
        return session, session.bind(inputs), inputs

    session, binding, inputs = opened()
    closes = Closes(session)
    del closes, session
    gc.collect()
    others = [opened() for _ in range(2)]  # in the memory that would be free
    binding.run()
    worst = model.error(inputs, binding.host_outputs())
    KEPT.append(Closes(others[0][0]))
    atexit.register(others[1][0].close)
    return {"worst": worst}


def opened_in_vain() -> dict[str, Any]:
    """A file that ONNX Runtime cannot open, again and again, while another session captures."""
    model = Products()
    session = open_session(model, "onnxruntime")
    bad = Products()
    bad.artifact.path.write_bytes(bad.artifact.path.read_bytes().replace(b"w3", b"w9", 1))
    GPU.slow()
    numbers, failed = np.random.default_rng(0), []

    def fail() -> None:
        for _ in range(30):
            try:
                open_session(bad, "onnxruntime")
            except RequestError as error:
                failed.append(str(error))

    fails = threading.Thread(target=fail)
    fails.start()
    while fails.is_alive():
        session.bind(model.inputs(numbers, 4))
    return {"failed": len(failed), "graphs": session.graphs()}


def placed(files: list[str], signature: dict[str, Any], shapes: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Files are opened, captured and run in several shapes: where their nodes are, and what was captured."""
    interface = Signature.from_dict(signature)
    told = {}
    for file in files:
        artifact = Artifact(Path(file), "onnx", interface, InputContract())
        session = OnnxRuntimeCuda().open(artifact, Variant("onnxruntime-cuda", "fp32"), threads=1)
        before = GPU.counts()["cudaGraphInstantiate"]
        for one in shapes:
            inputs = {spec.name: np.ones(one[spec.name], spec.dtype) for spec in interface.inputs}
            session.bind(inputs).run()
        executed = session.executed()
        told[file] = {
            "nodes": executed["nodes"],
            "graphs": executed["cuda_graphs"],
            "captured": GPU.counts()["cudaGraphInstantiate"] - before,
        }
        session.close()
    return {"files": told}


def _no_turns() -> None:
    """Everybody runs and captures when and where he likes, as before there were turns."""
    free = lambda self: contextlib.nullcontext()  # noqa: E731
    Turns.working = Turns.capturing = free  # type: ignore[method-assign,assignment]
    OwnThread.do = lambda self, call: call()  # type: ignore[method-assign,assignment]


def _pause(order: random.Random) -> None:
    """Now and then: else all would be done right behind a run, when nobody captures yet."""
    if order.random() < 0.5:
        time.sleep(0.005 * order.random())


@contextlib.contextmanager
def _told(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failures.append(str(error))


def _until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        together,
        disturbed,
        let_go,
        many_shapes,
        left_open,
        closed_in_finalizers,
        opened_in_vain,
        placed,
    )
}


if __name__ == "__main__":
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    told = SCENARIOS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({**told, "refused": GPU.refused(), "counts": GPU.counts()}), flush=True)
