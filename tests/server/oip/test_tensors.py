import torch

from server.engine.job import Answer
from server.models.served import Output, ServedModel
from server.oip.tensors import parameters


def answer(served: ServedModel, rate: int, batch_size: int = 1) -> Answer:
    output = Output(torch.zeros(10), torch.zeros(192), None)
    work = served.at(rate, compensate=True)
    return Answer(output, work, f"reason of {rate}", 0.1, 0.2, 0.3, batch_size)


def test_images_that_ran_at_several_rates_are_told_apart(served):
    told = parameters([answer(served, 2, 8), answer(served, 4, 3), answer(served, 2, 8)])
    assert told["rates"] == "2,4,2"
    assert (told["rate"], told["reason"], told["batch_size"]) == (4, "reason of 4", 3)
    assert told["macs"] == served.costs[4].macs


def test_one_rate_is_told_once(served):
    told = parameters([answer(served, 2, 8), answer(served, 2, 3)])
    assert told["rate"] == 2
    assert "rates" not in told
