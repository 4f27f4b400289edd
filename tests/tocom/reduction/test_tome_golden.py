"""ToMe as a method: the golden cases of merging, of a block and of schedules."""

import pytest
import torch
from timm.models.vision_transformer import Block

from tests import oracle_case
from tocom import match, merge, plan, unmerge
from tocom.attention import answer, look
from tocom.reduction import Cut, Tokens, ToMe

TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize("name", ["tome_1", "tome_2", "tome_3", "tome_4"])
def test_golden_merges(name):
    case, tensors = oracle_case.read(f"reduction/{name}")
    x, size = tensors["x"], tensors.get("size")
    prefix = case["class_token"] + case["distill_token"]
    held = torch.eye(x.shape[1]).expand(len(x), -1, -1)  # [B, N, tokens on the way]
    for step, asked in enumerate(case["r"], start=1):
        end = f"_{step}" if len(case["r"]) > 1 else ""
        metric = tensors[f"metric{end}"]
        matched = match(metric, min(asked, (x.shape[1] - prefix) // 2), prefix)
        # Of set A, at even positions, and of set B, at odd ones.
        assert torch.equal(matched.merged, 2 * tensors[f"src_idx{end}"])
        joined = matched.kept.gather(1, matched.into)
        assert torch.equal(joined, 2 * tensors[f"dst_idx{end}"] + 1)
        x, size = merge(x, size, matched)
        torch.testing.assert_close(x, tensors[f"x_out{end}"], **TOLERANCE)
        torch.testing.assert_close(size, tensors[f"size_out{end}"], **TOLERANCE)
        torch.testing.assert_close(unmerge(x, matched), tensors[f"unmerged{end}"], **TOLERANCE)
        groups = torch.nn.functional.one_hot(matched.assignment, x.shape[1]).float()
        held = held @ groups
    assert torch.equal(held.transpose(1, 2), tensors["source"])
    assert torch.equal(held.argmax(dim=2), tensors["assign"])


def test_a_golden_block_without_sizes():
    case, tensors = oracle_case.read("reduction/tomeblock_1")
    state = oracle_case.run_block(case, tensors, ToMe(), case["r"])
    torch.testing.assert_close(state.x, tensors["x_out_nosize"], **TOLERANCE)
    torch.testing.assert_close(state.size, tensors["size_out_nosize"], **TOLERANCE)


def test_a_golden_block_with_sizes():
    case, tensors = oracle_case.read("reduction/tomeblock_1")
    x, size = tensors["x"], tensors["size"]
    block = Block(x.shape[2], case["heads"], qkv_bias=True)
    block.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    for norm in (block.norm1, block.norm2):
        norm.eps = case["ln_eps"]
    block.eval().requires_grad_(False)

    seen = look(block.attn, "attn", block.norm1(x), size, None)
    torch.testing.assert_close(seen.mean_key, tensors["metric"], **TOLERANCE)
    y = answer(block.attn, "attn", seen, None)
    torch.testing.assert_close(y, tensors["attn_out"], **TOLERANCE)
    cut = Cut(0, 1, x.shape[1] - case["r"], (1, 25), trace=True)
    merged, fate = ToMe().reduce(Tokens(x + y, size), seen, cut)
    assert torch.equal(fate.into[:, 1:], 1 + tensors["assign"])
    out = merged.x + block.mlp(block.norm2(merged.x))
    torch.testing.assert_close(out, tensors["x_out"], **TOLERANCE)
    torch.testing.assert_close(merged.size, tensors["size_out"], **TOLERANCE)


def test_golden_schedules():
    case, tensors = oracle_case.read("reduction/tomesched_1")
    columns = [tensors[key].tolist() for key in ("r", "inflection", "r_list", "tokens")]
    for r, inflection, asked, tokens in zip(*columns, strict=True):
        made = plan((r, inflection), case["layers"], case["T0"], prefix=1)
        assert made.asked == tuple(asked)
        assert (case["T0"], *made.tokens) == tuple(tokens)
