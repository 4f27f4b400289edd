import torch
from torch import Tensor, nn

from adapters import AdaptFormer
from tests.tocom_models import pictures, small_model
from tocom import Adapter, Variant, forward
from tocom.vit import embed, run_blocks


def slow_branch(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Evaluate s ReLU(x W_down) W_up token by token, in fp64."""
    rows = []
    for token in x.double().flatten(0, 1):
        hidden = torch.stack([(token * weights).sum() for weights in down.double()])
        hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
        rows.append(scale * torch.stack([(hidden * weights).sum() for weights in up.double()]))
    return torch.stack(rows).view(*x.shape[:2], -1)


def random_adaptformer(depth: int, width: int, scale: float = 0.7) -> AdaptFormer:
    torch.manual_seed(3)
    tuned = AdaptFormer(depth, width, bottleneck=4, scale=scale)
    nn.init.normal_(tuned.up, std=0.3)
    return tuned


def test_the_branch_and_its_gradients_are_the_formulas() -> None:
    tuned = random_adaptformer(2, 6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    fast = tuned()(1, x)
    slow = slow_branch(x, tuned.down[1], tuned.up[1], 0.7)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(fast)
    parameters = [tuned.down, tuned.up]
    for got, expected in zip(
        torch.autograd.grad((fast * weight).sum(), parameters),
        torch.autograd.grad((slow * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_branch_changes_no_bit() -> None:
    model = small_model()
    images = pictures(model)
    fresh = AdaptFormer(3, model.embed_dim)()
    for rate in (0, 3):
        tuned = forward(model, images, rate, adapter=fresh)
        assert torch.equal(tuned, forward(model, images, rate))


def test_the_branch_reads_the_merged_tokens_of_its_block() -> None:
    model = small_model()
    tuned = random_adaptformer(3, model.embed_dim)
    adapter = tuned()
    read: list[Tensor] = []

    class Spy(Adapter):
        def __call__(self, block: int, x: Tensor) -> Tensor:
            read.append(x)
            return super().__call__(block, x)

    variant = Variant(3, adapter=Spy(adapter.branches))
    states = list(run_blocks(model, embed(model, pictures(model)), variant))
    assert [x.shape[1] for x in read] == [14, 11, 8]
    for i, (state, x) in enumerate(zip(states, read, strict=True)):
        block = model.blocks[i]
        expected = x + block.mlp(block.norm2(x)) + slow_branch(x, tuned.down[i], tuned.up[i], 0.7)
        torch.testing.assert_close(state.x, expected.float(), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_branch() -> None:
    model = small_model()
    tuned = random_adaptformer(3, model.embed_dim)
    forward(model, pictures(model), 2, adapter=tuned()).square().sum().backward()
    for parameter in (tuned.down, tuned.up):
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
