import threading

import pytest

from server.models.budget import PixelBudget


class Told(threading.Condition):
    """Tells when a thread is about to wait."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait(self, timeout=None):
        self.waits.release()
        return super().wait(timeout)


@pytest.fixture
def budget():
    budget = PixelBudget()
    budget._changed = Told()
    return budget


@pytest.fixture
def waiting(budget):
    """Start a thread that holds pixels, and return once it waits for them."""
    threads, order = [], []

    def hold(pixels):
        with budget.hold(pixels, 10):
            order.append((pixels, budget._held))

    def start(pixels):
        threads.append(threading.Thread(target=hold, args=(pixels,)))
        threads[-1].start()
        budget._changed.waits.acquire()
        return order

    yield start
    for thread in threads:
        thread.join()
    assert budget._held == 0
    assert not budget._waiting
    assert all(held <= 10 for _, held in order)


def test_what_fits_together_is_held_together(budget):
    with budget.hold(4, 10), budget.hold(6, 10):
        assert budget._held == 10
    assert budget._held == 0


def test_what_does_not_fit_waits(budget, waiting):
    with budget.hold(6, 10):
        order = waiting(5)
        assert order == []


def test_a_large_one_has_its_turn_before_small_ones_that_came_later(budget, waiting):
    with budget.hold(6, 10):
        order = waiting(10)
        waiting(1)
        assert order == []
    with budget.hold(10, 10):  # comes after both
        assert [pixels for pixels, _ in order] == [10, 1]


def test_more_than_the_limit_is_held_alone(budget):
    with budget.hold(11, 10):
        assert budget._held == 11


def test_an_error_gives_back_what_was_held(budget):
    with pytest.raises(ValueError, match="broken"), budget.hold(10, 10):
        raise ValueError("broken")
    assert budget._held == 0


def test_who_is_interrupted_while_it_waits_keeps_no_turn(budget, monkeypatch):
    def interrupted(timeout=None):
        raise KeyboardInterrupt("stop")

    with budget.hold(10, 10):
        monkeypatch.setattr(budget._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stop"), budget.hold(1, 10):
            pass
        assert not budget._waiting
    assert budget._held == 0
