"""The pictures of a search: some to search on, others to judge what was found."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tocom import Backbone, ConfigError, Ladder, Variant
from tocom.vit import embed, outputs
from training.ladders.search_config import LadderSearchConfig
from training.measuring import compare
from training.pictures.batches import evaluation_batches
from training.pictures.sets import open_pictures
from training.screen.progress import following


class Shown:
    """Pictures, embedded, and what rung 0 answers."""

    def __init__(self, backbone: Backbone, config: LadderSearchConfig, keys: list[tuple[int, int]]):
        """Embed the pictures at `keys` (set, position) once."""
        self.backbone = backbone
        batches = evaluation_batches(
            backbone, config.pictures, keys, config.batch_size, config.workers
        )
        device = backbone.model.patch_embed.proj.weight.device
        self.batches: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            for images, _ in following(batches, "embedding pictures", "batch"):
                tokens = embed(backbone.model, images.to(device))
                stock = outputs(backbone.model, tokens, Variant(0, None, backbone.adapter)).logits
                self.batches.append((tokens, stock))

    @torch.inference_mode()
    def figures(self, ladder: Ladder, rung: int, hopeless: Sequence[float] = ()) -> Tensor:
        """Return top-1 (0), agreement and KL of each picture [P, 3] at a rung.

        Args:
            ladder, rung: what runs.
            hopeless: mean KL after each batch from which on the rest is not run.
        """
        variant = Variant(rung, None, self.backbone.adapter, self.backbone.proportional, ladder)
        done: list[Tensor] = []
        for i, (tokens, stock) in enumerate(self.batches):
            answer = outputs(self.backbone.model, tokens, variant).logits
            many = self.backbone.multi_label
            done.append(compare(answer, stock, None, many).cpu())
            if i < len(hopeless) and float(torch.cat(done)[:, 2].mean()) > hopeless[i]:
                break
        return torch.cat(done)


def draw(config: LadderSearchConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the keys (set, position) of pictures to search and to judge on, none in both."""
    sizes = [len(open_pictures(each)) for each in config.pictures]
    keys = [(i, j) for i, size in enumerate(sizes) for j in range(size)]
    wanted = config.search_on + config.judge_on
    if wanted > len(keys):
        raise ConfigError(
            f"search_on and judge_on ask for {wanted} pictures, there are {len(keys)}"
        )
    # Each set gives as many, as far as it has them.
    rng = random.Random(config.seed)
    by_set = [rng.sample(range(size), size) for size in sizes]
    drawn = sorted((place, i, j) for i, order in enumerate(by_set) for place, j in enumerate(order))
    chosen = [(i, j) for _, i, j in drawn[:wanted]]
    rng.shuffle(chosen)
    return chosen[: config.search_on], chosen[config.search_on :]
