"""Which forwards get a graph, and what becomes of it."""

import threading
from concurrent.futures import Future
from functools import partial

import pytest
import torch
from fastapi.testclient import TestClient

from server.app import create_app
from server.errors import UnavailableError
from server.models import graphs
from server.models.graphs import IDLE, WINDOW, WORTH, Forward, Graphs
from server.models.loading import load_models
from server.models.registry import Registry
from tests.server.conftest import picture, png
from tests.tocom_models import pictures, small_model
from tocom import TOME, Variant
from tocom.vit import embed, outputs


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Double:
    """An engine whose forwards, and the eager ones, take the time that a test says."""

    def __init__(self, clock, seconds=0.5, reason=None, error=None):
        self.clock, self.seconds, self.reason, self.error = clock, seconds, reason, error
        self.made = []
        self.ran = []

    def unsupported(self, model, method):
        return self.reason

    def Graph(self, model, variant, images, threads, dtype):  # noqa: N802
        if self.error:
            raise self.error
        assert dtype == torch.float32
        self.made.append((variant.rate, images, threads))

        def graph(batch, asked):
            assert len(batch) == images
            assert asked.rate == variant.rate
            self.ran.append((asked.rate, images))
            self.clock.now += self.seconds
            return outputs(model, embed(model, batch), asked)

        return graph


class Changes:
    """Takes note of the rates that became faster or slower."""

    def __init__(self):
        self.rates = []

    def __call__(self, model, ladder, rate):
        self.rates.append(rate)
        return []


def at_once(function):
    done = Future()
    done.set_result(function())
    return done


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    def eager(forward, images):
        clock.now += WORTH
        return outputs(forward.model, embed(forward.model, images), forward.variant)

    monkeypatch.setattr(Forward, "__call__", eager)
    return clock


@pytest.fixture
def model():
    return small_model()


def started(monkeypatch, clock, engine, limit=2, call=at_once, pause=0.0, changed=lambda *of: []):
    monkeypatch.setattr(graphs, "import_module", lambda name: engine)
    monkeypatch.setattr(graphs, "PAUSE", pause)
    made = Graphs(limit, clock, threads=3)
    made.start(call, changed)
    return made


def run(made, model, images, rate=2):
    """Run and let what is being compiled become ready; return the logits."""
    logits = made.run(Forward(model, Variant(rate)), images).logits
    wait_for_compiler()
    return logits


def wait_for_compiler():
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join()


def test_what_runs_often_is_compiled_and_answers_the_same(monkeypatch, clock, model):
    engine, calls = Double(clock), []
    made = started(monkeypatch, clock, engine, changed=lambda *of: [partial(calls.append, of)] * 2)
    images = pictures(model, 6)
    expected = run(Graphs(), model, images)
    for _ in range(3):
        logits = run(made, model, images)
        torch.testing.assert_close(logits, expected)
    # First for fours, then for what is left of six; each is tried before it is used.
    assert engine.made == [(2, 4, 3), (2, 1, 3)]
    assert engine.ran[-3:] == [(2, 4), (2, 1), (2, 1)]
    assert calls == [(model, TOME, 2)] * 4


def test_many_images_are_shared_out_and_get_the_same_answers(monkeypatch, model):
    shares, eagerly = [], Forward.__call__

    def watched(forward, images):
        shares.append((threading.current_thread().name, len(images)))
        return eagerly(forward, images)

    monkeypatch.setattr(Forward, "__call__", watched)
    images = pictures(model, 13)
    logits = run(Graphs(threads=3), model, images)
    assert sorted(size for _, size in shares) == [4, 4, 5]
    assert threading.current_thread().name not in {thread for thread, _ in shares}
    shares.clear()
    torch.testing.assert_close(run(Graphs(threads=1), model, images), logits)
    assert shares == [(threading.current_thread().name, 13)]


def test_what_runs_rarely_is_not_compiled(monkeypatch, clock, model):
    engine = Double(clock)
    made = started(monkeypatch, clock, engine)
    monkeypatch.setattr(graphs, "WORTH", 2.5 * WORTH)
    for _ in range(5):  # more than enough, but long ago
        run(made, model, pictures(model, 1))
        clock.now += 5 * WINDOW
    for _ in range(2):
        run(made, model, pictures(model, 1))
    assert engine.made == []
    run(made, model, pictures(model, 1))
    assert engine.made == [(2, 1, 3)]


@pytest.mark.parametrize(
    "engine",
    [{"seconds": 2 * WORTH}, {"reason": "it is odd"}, {"error": RuntimeError("no memory")}],
)
def test_what_is_not_faster_or_has_no_graph_stays_eager(monkeypatch, clock, model, engine):
    engine = Double(clock, **engine)
    made = started(monkeypatch, clock, engine)
    for _ in range(3):
        run(made, model, pictures(model, 1))
    tried = len(engine.ran)
    run(made, model, pictures(model, 1))
    assert len(engine.made) <= 1  # once is enough
    assert len(engine.ran) == tried


def test_a_graph_that_fails_is_not_asked_again(monkeypatch, clock, model):
    engine, changes = Double(clock), Changes()
    made = started(monkeypatch, clock, engine, changed=changes)
    image = pictures(model, 1)
    expected = run(made, model, image)
    assert changes.rates == [2]
    (cell,) = (cell for cell in made._cells.values() if cell.graph)
    cell.graph = lambda *_: 1 / 0
    for _ in range(2):
        torch.testing.assert_close(run(made, model, image), expected)
    assert cell.graph is None
    assert len(engine.made) == 1
    assert changes.rates == [2, 2]


def test_who_has_not_run_for_long_gives_way(monkeypatch, clock, model):
    engine, changes = Double(clock), Changes()
    made = started(monkeypatch, clock, engine, limit=1, changed=changes)
    image = pictures(model, 1)
    run(made, model, image, rate=1)
    run(made, model, image, rate=2)
    assert [rate for rate, *_ in engine.made] == [1]  # there is no room
    clock.now += IDLE
    run(made, model, image, rate=2)
    assert [rate for rate, *_ in engine.made] == [1, 2]
    run(made, model, image, rate=1)
    assert [rate for rate, *_ in engine.made] == [1, 2]  # now the other one is in use
    assert changes.rates == [1, 1, 2]


def test_a_server_that_ends_is_not_disturbed(monkeypatch, clock, model, caplog):
    def ended(function):
        raise UnavailableError("the engine is not running")

    engine = Double(clock)
    made = started(monkeypatch, clock, engine, call=ended)
    run(made, model, pictures(model, 1))
    assert len(engine.made) == 1
    assert caplog.records == []


def test_without_openvino_all_runs_eagerly(monkeypatch, clock, model, caplog):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(graphs, "import_module", missing)
    made = Graphs(2, clock)
    with caplog.at_level("INFO"):
        made.start(at_once, Changes())
    assert "pip install 'tocom-serve[openvino]'" in caplog.text
    for _ in range(2):
        assert run(made, model, pictures(model, 1)).shape == (1, 10)


@pytest.fixture
def eager_is_slow(monkeypatch):
    """Every graph is made at once and counts as faster."""
    monkeypatch.setattr(graphs, "WORTH", 0.0)
    monkeypatch.setattr(graphs, "PAUSE", 0.0)
    monkeypatch.setattr(Graphs, "_compare", lambda *_: (0.0, 1.0))


def test_after_a_graph_there_is_a_pause(monkeypatch, clock, model):
    engine = Double(clock)
    made = started(monkeypatch, clock, engine, pause=10.0)
    image = pictures(model, 1)
    run(made, model, image, rate=1)
    run(made, model, image, rate=2)
    assert [rate for rate, *_ in engine.made] == [1]
    clock.now += 10 * graphs.TRIES * (engine.seconds + WORTH)
    run(made, model, image, rate=2)
    assert [rate for rate, *_ in engine.made] == [1, 2]


def test_one_graph_is_made_at_a_time_and_tried_in_single_runs(monkeypatch, clock, model):
    engine, calls = Double(clock), []

    def later(function):
        calls.append((function, Future()))
        return calls[-1][1]

    made = started(monkeypatch, clock, engine, call=later)
    image = pictures(model, 1)
    for rate in (1, 2):
        made.run(Forward(model, Variant(rate)), image)
    answered = 0
    while any(thread.name == "compile" for thread in threading.enumerate()):
        if len(calls) > answered:
            before = len(engine.ran)
            function, future = calls[answered]
            future.set_result(function())
            assert len(engine.ran) - before <= 1
            answered += 1
    assert [rate for rate, *_ in engine.made] == [1]
    assert len(engine.ran) == graphs.TRIES


def test_models_that_became_faster_are_measured_again(monkeypatch, eager_is_slow, settings):
    tiny, bare = load_models(settings.model_copy(update={"max_graphs": 9}))
    assert tiny.graphs is bare.graphs
    engine = Double(Clock())
    monkeypatch.setattr(graphs, "import_module", lambda name: engine)
    tiny.graphs.start(at_once, Registry([tiny, bare]).measure_again)
    measured = []
    for model, sizes in ((tiny, (2, 16)), (bare, (4,))):
        times = model.controller.times
        times.measured(4, 2, 1.0)
        for size in sizes:
            times.measured(3, size, 1.0)
        note = partial(lambda name, *cell: measured.append((name, *cell[:2])), model.name)
        monkeypatch.setattr(times, "measured", note)
    with torch.inference_mode():
        tiny.at(3, compensate=True)(torch.zeros(1, *tiny.input_size))
    wait_for_compiler()
    assert measured == [("tiny", 3, 2), ("tiny", 3, 16), ("bare", 3, 4)]
    for model in (tiny, bare):
        assert list(model.controller.times._table.cells) == [(4, 2)]


def test_a_server_answers_by_graphs_what_it_answers_eagerly(eager_is_slow, settings):
    """With OpenVINO itself, five images at once: in which batches they run is not said."""
    files = [("file", (f"{seed}.png", png(picture(seed)))) for seed in range(5)]
    answers = []
    for limit, wanted in ((0, set()), (99, {(TOME, 3, True, None, 1)})):
        app = create_app(settings.model_copy(update={"max_graphs": limit}))
        with TestClient(app) as client:
            cells = app.state.serving.models.get(None).graphs._cells
            for _ in range(50):  # one graph is made at a time, for what the batches were
                client.post("/v1/classify?rate=3", files=files)
                wait_for_compiler()
                made = {key[1:] for key, cell in cells.items() if cell.graph is not None}
                if made >= wanted:
                    break
            sent = client.post("/v1/classify?rate=3&logits=true", files=files)
            answers.append([each["logits"] for each in sent.json()["results"]])
        assert made >= wanted if limit else not made
    torch.testing.assert_close(torch.tensor(answers[0]), torch.tensor(answers[1]))
