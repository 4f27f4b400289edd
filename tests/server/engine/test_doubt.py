"""Who is refused for want of time, where what is known of it may be out of date."""

import pytest
from torch import Tensor

from server.engine.scheduler import DOUBT, STALE
from server.errors import ShortDeadlineError
from tests.server.works import PATIENCE, Exact, submit


def test_one_slow_batch_refuses_nobody_for_good(make, clock):
    seconds = [9.0, 1.0]  # it was held up, and never is again

    def run(images: Tensor) -> Tensor:
        clock.now += seconds.pop(0)
        return images.flatten(1)

    engine, work = make(), Exact(run)
    times = work.controller.times
    times.measured(0, 1, 1.0)
    engine.start()
    submit(engine, work, 1).result(PATIENCE)
    engine.call(lambda: None).result(PATIENCE)  # its notes are taken
    slow, deadline = times.batch(0, 1), 1.1
    assert slow > deadline
    with pytest.raises(ShortDeadlineError):
        submit(engine, work, 2, clock.now + deadline)
    clock.now += 1.1 * STALE * work.controller.window
    with pytest.raises(ShortDeadlineError):  # so much too long they cannot be
        submit(engine, work, 2, clock.now + 0.9 * slow / DOUBT)
    submit(engine, work, 2, clock.now + deadline).result(PATIENCE)
    engine.call(lambda: None).result(PATIENCE)
    assert deadline < times.batch(0, 1) < slow
    with pytest.raises(ShortDeadlineError):  # one is enough to tell
        submit(engine, work, 3, clock.now + deadline)


def test_a_deadline_that_is_too_short_is_told_however_long_nobody_asked(make, clock):
    engine, work = make(), Exact()
    work.controller.times.measured(0, 1, 1.0)
    clock.now += 100 * STALE * work.controller.window
    with pytest.raises(ShortDeadlineError):
        submit(engine, work, 1, clock.now + 0.5)
