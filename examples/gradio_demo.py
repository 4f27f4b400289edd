"""A demo with a slider: what a rate costs, what it changes, and which patches it merges.

    pip install gradio
    python examples/gradio_demo.py

It runs as it is in a Hugging Face Space; `examples/space/README.md` says how.
"""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import tocom
from adapters import compose, open_bank


class Demo:
    """A model, and what is shown of it."""

    def __init__(
        self, backbone: str = "bundled:deit_tiny", bank: str = "bundled:deit_tiny_bank"
    ) -> None:
        self._backbone = tocom.load_backbone(backbone)
        self._bank = open_bank(bank)
        self._bank.check_fits(self._backbone)
        self._transform = create_transform(**self._backbone.data_config, is_training=False)
        self.max_rate = self._bank.info.max_rate

    def show(self, photo: Image.Image, rate: int) -> tuple[dict[str, float], Image.Image, str]:
        """Return the scores of the classes, the picture with its merged patches, and the cost."""
        backbone, ladder = self._backbone, self._bank.ladder
        images = self._transform(photo.convert("RGB"))[None]  # [1, 3, H, W]
        with torch.inference_mode():
            # `trace` is a forward that also tells what became of the tokens.
            traced = tocom.trace(
                backbone.model,
                images,
                rate,
                compose(self._bank, backbone.source, rate),
                adapter=backbone.adapter,
                ladder=ladder,
            )
        scores = traced.logits[0].softmax(dim=-1).tolist()
        share = (
            tocom.cost(backbone.model, rate, ladder=ladder).macs
            / tocom.cost(backbone.model, 0, ladder=ladder).macs
        )
        cost = (
            f"{share:.0%} of the multiply-adds of the stock model; "
            f"{traced.plan.tokens[-1]} of {traced.plan.tokens_in} tokens left"
        )
        return (
            dict(zip(backbone.class_names, scores, strict=True)),
            to_pil_image(self._merged(images, traced.source[0])),
            cost,
        )

    def _merged(self, images: Tensor, source: Tensor) -> Tensor:
        """Return the picture [3, H, W] with all patches of a token as their mean.

        Args:
            images: [1, 3, H, W], as the model sees them.
            source: [N] the final token that holds each input token.
        """
        config, model = self._backbone.data_config, self._backbone.model
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        size = model.patch_embed.patch_size
        patches = F.unfold(images * std + mean, size, stride=size)[0].T  # [P, 3 h w]
        tokens = source[model.num_prefix_tokens :]  # [P]; the class token is no patch
        total = patches.new_zeros(len(source), patches.shape[1]).index_add(0, tokens, patches)
        count = tokens.bincount(minlength=len(source)).clamp(min=1)
        means = (total / count[:, None])[tokens]
        return F.fold(means.T[None], images.shape[2:], size, stride=size)[0].clamp(0, 1)


def build(demo: Demo) -> Any:
    """Return the page, a `gradio.Interface`."""
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise SystemExit("the demo needs gradio: pip install gradio") from error
    return gradio.Interface(
        demo.show,
        inputs=[
            gradio.Image(type="pil", label="photograph"),
            gradio.Slider(0, demo.max_rate, value=2, step=1, label="rate: 0 is the stock model"),
        ],
        outputs=[
            gradio.Label(num_top_classes=3, label="what it shows"),
            gradio.Image(label="patches that became one token, as their mean"),
            gradio.Textbox(label="cost"),
        ],
        examples=[[str(path), 2] for path in sorted(tocom.bundled_folder("samples").glob("*.jpg"))],
        cache_examples=False,
        live=True,
        flagging_mode="never",
        title="One Vision Transformer, any compute",
    )


if __name__ == "__main__":
    build(Demo()).launch()
