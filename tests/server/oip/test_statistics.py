from server.engine.job import Answer
from server.oip.statistics import Statistics
from tests.server.works import Exact


def answer(batch_size: int, decode: float = 0.0, queue: float = 0.0, inference: float = 0.0):
    return Answer(None, Exact(), "asked", decode, queue, inference, batch_size)


def test_the_slowest_image_stands_for_its_request():
    statistics = Statistics(wall_clock=lambda: 12.5)
    slow, fast = answer(1, 0.3, 0.1, 0.5), answer(1, 0.1, 0.2, 0.4)
    statistics.succeeded("tiny", [slow, fast], seconds=2.0, output=0.25)
    told = statistics.of("tiny")
    assert (told.last_inference, told.inference_count) == (12_500, 2)
    nanoseconds = {name: value["ns"] for name, value in told.inference_stats.model_dump().items()}
    assert nanoseconds == {
        "success": 2_000_000_000,
        "fail": 0,
        "queue": 200_000_000,
        "compute_input": 300_000_000,
        "compute_infer": 500_000_000,
        "compute_output": 250_000_000,
        "cache_hit": 0,
        "cache_miss": 0,
    }


def test_an_image_is_its_share_of_a_batch():
    statistics = Statistics()
    for _ in range(2):  # two requests, whose images ran in one batch of four
        statistics.succeeded("tiny", [answer(4, 0.1, inference=0.8)] * 2, 1.0, 0.0)
    # A third of a batch whose other images came from elsewhere.
    statistics.succeeded("tiny", [answer(3, inference=0.3)], 1.0, 0.0)
    told = statistics.of("tiny")
    assert (told.inference_count, told.execution_count) == (5, 2)
    three, four = told.batch_stats
    assert (three.batch_size, three.compute_infer.count, three.compute_infer.ns) == (3, 1, 10**8)
    assert (four.batch_size, four.compute_infer.count, four.compute_infer.ns) == (4, 1, 8 * 10**8)
    assert four.compute_input.ns == 4 * 10**8


def test_failures_are_of_their_model_only():
    statistics = Statistics()
    statistics.failed("tiny", 0.5)
    assert statistics.of("tiny").inference_stats.fail.model_dump() == {"count": 1, "ns": 5 * 10**8}
    assert statistics.of("bare").inference_stats.fail.count == 0
