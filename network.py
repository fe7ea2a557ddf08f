"""The models: FeedForward, CNN, ResNet20, and VisionTransformer with its parts. `model.save(path)`, `Model.load(path)`.

Shapes in docstrings name their axes: `tokens` is the number of patches, plus one where there is a CLS token.
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.model import Model, begin_with, whitening_filters


class FeedForward(Model):
    """A multi-layer perceptron with one hidden layer and ReLU. Images are flattened: logits `(batch, output_size)`."""

    def __init__(self, input_size: int = 3072, hidden_size: int = 512, output_size: int = 10):
        super().__init__()
        _require_positive(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        self.hidden = nn.Linear(input_size, hidden_size)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(F.relu(self.hidden(images.flatten(1))))

    @property
    def title(self) -> str:
        return "MLP"

    @property
    def image_size(self) -> int:
        return math.isqrt(self.config["input_size"] // 3)


class CNN(Model):
    """Two 3x3 convolutions (3 -> 16 -> 32), each with ReLU and 2x2 max pooling, then one linear layer.

    For 32x32 images that layer is 2048 -> 10 and the network has 25,578 parameters. Logits `(batch, output_size)`.
    """

    def __init__(self, img_size: int = 32, output_size: int = 10, in_channels: int = 3):
        super().__init__()
        _require_positive(img_size=img_size, output_size=output_size, in_channels=in_channels)
        if img_size < 4:
            raise ValueError(f"the CNN halves the image twice: img_size {img_size} must be at least 4")
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()  # a module of its own: Grad-CAM looks at what comes out of it
        self.output = nn.Linear(32 * (img_size // 4) ** 2, output_size)
        self.to(memory_format=torch.channels_last)  # a third faster in training on a CPU, twice as fast in bf16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(self.relu2(self.conv2(x)), 2)
        return self.output(x.flatten(1))

    def whiten(self, images: torch.Tensor) -> None:
        """Let the first layer begin with filters that whiten the 3x3 patches of these normalised images."""
        begin_with(self.conv1, whitening_filters(images, 3, stride=1))


class ResidualBlock(nn.Module):
    """ReLU(x + F(x)) of two 3x3 convolutions, each with BatchNorm (He et al. 2015): `(batch, channels, height, width)`.

    Where there are more channels than before, the first convolution halves the image, and x is every second pixel, with
    zeros for the new channels: the paper's option A, which its networks for CIFAR have and which has no parameters.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.new_channels = channels - in_channels
        stride = 2 if self.new_channels else 1
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + change)


class ResNet20(Model):
    """The ResNet of 20 layers for small images (He et al. 2015, section 4.2): a 3x3 convolution, three stages of three
    ResidualBlocks with 16, 32 and 64 channels, the mean over all places, one linear layer.

    269,722 parameters with 10 classes, whatever the image's size. Logits `(batch, output_size)`.
    """

    def __init__(self, img_size: int = 32, output_size: int = 10, in_channels: int = 3):
        super().__init__()
        _require_positive(img_size=img_size, output_size=output_size, in_channels=in_channels)
        if img_size < 5:  # one place would be left, and BatchNorm could not train on a batch of one
            raise ValueError(f"the ResNet halves the image twice: img_size {img_size} must be at least 5")
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in itertools.pairwise(widths)))
        self.output = nn.Linear(64, output_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # a sixth faster in training on a CPU, a twentieth in bf16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.norm1(self.conv1(images))))
        return self.output(x.mean(dim=(2, 3)))

    def whiten(self, images: torch.Tensor) -> None:
        begin_with(self.conv1, whitening_filters(images, 3, stride=1))

    def layers(self) -> list[list[nn.Module]]:
        return [[self.conv1, self.norm1], *([block] for block in self.blocks), [self.output]]


class PatchEmbedding(nn.Module):
    """Images to tokens: patches, each projected to `hidden_size`, an optional CLS token in front, and positions.

    `(batch, in_channels, img_size, img_size)` -> `(batch, tokens, hidden_size)`.

    Args:
        patch_size: side of a patch in pixels. Where it does not divide the image, the pixels beyond the last whole
            patch on the right and at the bottom are dropped, as a strided convolution does: 6 on 32 gives 5x5 patches
            which see the first 30 pixels.
        tokenizer: "patch" is one convolution with kernel and stride `patch_size` (Dosovitskiy et al. 2021); "conv" is
            stages of 3x3 convolutions, each with BatchNorm and ReLU, that halve the image by 2x2 max pooling, down to
            the same grid (Xiao et al. 2021, Hassani et al. 2021), for patch sizes 2, 4, 8, ...; "whitened" has the same
            stages with GELU, each convolution but a stage's first as a residual branch, and before them a fixed
            layer of 2x2 filters that `whiten` makes (Jordan 2024).
        tokenizer_depth: convolutions in each stage of these two.
        cls_token: whether a learnable CLS token is put before the patches.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        hidden_size: int = 64,
        in_channels: int = 3,
        tokenizer: Literal["patch", "conv", "whitened"] = "patch",
        tokenizer_depth: int = 1,
        cls_token: bool = True,
    ):
        super().__init__()
        _require_positive(img_size=img_size, patch_size=patch_size, hidden_size=hidden_size, in_channels=in_channels)
        if patch_size > img_size:
            raise ValueError(f"a patch of {patch_size} pixels is larger than the image of {img_size}")
        self.grid_size = img_size // patch_size  # patches along each side
        self.tokenizer = tokenizer
        if tokenizer == "patch":
            self.project = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
            nn.init.trunc_normal_(self.project.weight, std=(in_channels * patch_size**2) ** -0.5)
            nn.init.zeros_(self.project.bias)
        elif tokenizer in ("conv", "whitened"):
            _require_positive(tokenizer_depth=tokenizer_depth)
            if self.grid_size == 1:  # and BatchNorm could not train on a batch of one
                raise ValueError(f"the {tokenizer} tokenizer leaves one token: patch_size must be below {patch_size}")
            build = _convolutional_tokenizer if tokenizer == "conv" else _whitened_tokenizer
            self.project = build(in_channels, _stage_widths(hidden_size, patch_size), tokenizer_depth)
        else:
            raise ValueError(f"unknown tokenizer {tokenizer!r}: choose patch, conv or whitened")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if cls_token else None
        tokens = self.grid_size**2 + cls_token
        self.position = nn.Parameter(torch.empty(1, tokens, hidden_size))
        nn.init.trunc_normal_(self.position, std=0.02)
        if cls_token:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def whiten(self, images: torch.Tensor) -> None:
        """Let the first layer begin with filters that whiten the patches of these `(n, in_channels, height, width)`
        normalised images: "patch" trains them further, "whitened" keeps them, "conv" has none."""
        if self.tokenizer == "patch":
            size = self.project.kernel_size[0]
            begin_with(self.project, whitening_filters(images, size, stride=size))
        elif self.tokenizer == "whitened":
            filters = whitening_filters(images, 2, stride=1)
            begin_with(self.project[1], torch.cat([filters, -filters]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.project(images).flatten(2).transpose(1, 2)  # (batch, patches, hidden_size)
        tokens = tokens.contiguous()  # sums keep the layout of their first term, and a LayerNorm copies any other one
        if self.cls_token is not None:
            batch = tokens.shape[0]  # not len(tokens): torch.export would take that for a constant
            tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        return tokens + self.position


def _stage_widths(hidden_size: int, patch_size: int) -> list[int]:
    """Channels of a stage for each halving of the image: `hidden_size` in the last and half as many in each one before,
    rounded up to a multiple of 16, since 26 channels take longer than 32; never more than `hidden_size`."""
    stages = patch_size.bit_length() - 1
    if patch_size < 2 or 2**stages != patch_size:
        raise ValueError(
            f"a convolutional tokenizer halves the image until a patch is one pixel: patch_size {patch_size} must be "
            "2, 4, 8, ..."
        )
    halved = [min(hidden_size, 16 * math.ceil(hidden_size / 2**stage / 16)) for stage in range(1, stages)]
    return [*reversed(halved), hidden_size]


def _convolutional_tokenizer(channels: int, widths: list[int], depth: int) -> nn.Sequential:
    layers = []
    for width in widths:
        for convolution in range(depth):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False))
            if convolution == 0:
                layers.append(nn.MaxPool2d(2))  # before BatchNorm and ReLU, which then have a quarter of the work
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # a fifth faster in training on a CPU


def _whitened_tokenizer(channels: int, widths: list[int], depth: int) -> nn.Sequential:
    first = nn.Conv2d(channels, 8 * channels, kernel_size=2, bias=False)  # of a 2x2 patch, plus and minus
    first.weight.requires_grad_(False)
    layers = [nn.ZeroPad2d((0, 1, 0, 1)), first, nn.GELU()]
    channels = first.out_channels
    for width in widths:
        layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False))
        layers += [nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
        layers += [ResidualConvolution(width) for _ in range(depth - 1)]
        channels = width
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class ResidualConvolution(nn.Module):
    """x + GELU(BatchNorm(3x3 convolution(x))) (He et al. 2015); `(batch, channels, height, width)` kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.gelu(self.norm(self.convolution(x)))


class MultiHeadAttention(nn.Module):
    """Self-attention (Vaswani et al. 2017) with one fused projection and heads of width `hidden_size / num_heads`.

    `(batch, tokens, hidden_size)` -> the same; with `return_attention` also the attention weights after the softmax,
    `(batch, heads, tokens, tokens)`, whose last axis (the tokens looked at) sums to 1. With `first_alone` only the
    first token looks at all, `(batch, 1, hidden_size)`. Without biases: summing their gradients over all tokens took a
    tenth of a training step and gained nothing.
    """

    def __init__(self, hidden_size: int = 64, num_heads: int = 4):
        super().__init__()
        _require_positive(hidden_size=hidden_size, num_heads=num_heads)
        if hidden_size % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide hidden_size {hidden_size}")
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, return_attention: bool = False, first_alone: bool = False):
        batch, tokens, hidden_size = x.shape
        head_size = hidden_size // self.num_heads
        query, key, value = (
            part.view(batch, tokens, self.num_heads, head_size).transpose(1, 2)  # (batch, heads, tokens, head_size)
            for part in self.query_key_value(x).split(hidden_size, dim=-1)
        )
        if first_alone:
            query = query[:, :, :1]
        # on a CPU the fused kernel's backward pass is slow in bf16
        if return_attention or (query.device.type == "cpu" and query.dtype == torch.bfloat16):
            attention = (query * head_size**-0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
            x = attention @ value
        else:
            x = F.scaled_dot_product_attention(query, key, value)
        x = self.output(x.transpose(1, 2).flatten(2))
        return (x, attention) if return_attention else x


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)) with GELU; `(batch, tokens, hidden_size)` kept.

    With `first_alone` only the first token comes out, `(batch, 1, hidden_size)`. `drop_path` is the probability that an
    image skips a residual branch in training (stochastic depth, Huang et al. 2016).
    """

    def __init__(self, hidden_size: int = 64, num_heads: int = 4, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        _require_positive(hidden_size=hidden_size)
        if not 0 < mlp_ratio < math.inf or not 0 <= drop_path < 1:
            raise ValueError(f"mlp_ratio {mlp_ratio} must be positive and drop_path {drop_path} in [0, 1)")
        mlp_size = max(1, round(hidden_size * mlp_ratio))
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = MultiHeadAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_size, bias=False), nn.GELU(), nn.Linear(mlp_size, hidden_size, bias=False)
        )

    def forward(self, x: torch.Tensor, return_attention: bool = False, first_alone: bool = False):
        change = self.attention(self.norm1(x), return_attention, first_alone)
        if return_attention:
            change, attention = change
        if first_alone:
            x = x[:, :1]
        x = x + self._drop(change)
        x = x + self._drop(self.mlp(self.norm2(x)))
        return (x, attention) if return_attention else x

    def _drop(self, change: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return change
        kept = torch.rand(len(change), 1, 1, device=change.device) >= self.drop_path
        return change * kept / (1 - self.drop_path)


class VisionTransformer(Model):
    """Vision Transformer (Dosovitskiy et al. 2021): `(batch, in_channels, img_size, img_size)` images to logits.

    `model(images)` gives logits `(batch, output_size)`. `model(images, return_attention=True)` is the same forward
    pass and gives a dict with `logits` and `attention_weights` `(num_blocks, batch, heads, tokens, tokens)`.

    Args:
        img_size, patch_size: sides in pixels. A patch size that does not divide the image drops its right and bottom
            edge (see PatchEmbedding).
        hidden_size: width of a token (the embedding dimension).
        output_size: number of classes.
        num_heads: attention heads in each block; must divide `hidden_size`.
        num_blocks: transformer blocks.
        mlp_ratio: width of a block's hidden layer over `hidden_size`.
        pooling: what the head reads: "cls", the CLS token, or "mean", the mean of the patch tokens (no CLS token).
        tokenizer, tokenizer_depth: "patch", or "conv" or "whitened" with this many convolutions in a stage (see
            PatchEmbedding).
        drop_path: stochastic depth of the last block, or the only one; it grows linearly from 0 at the first.

    Raises:
        ValueError: sizes that do not go together.
    """

    def __init__(
        self,
        img_size: int = 32,
        hidden_size: int = 64,
        output_size: int = 10,
        num_heads: int = 4,
        num_blocks: int = 4,
        patch_size: int = 4,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        pooling: Literal["cls", "mean"] = "cls",
        tokenizer: Literal["patch", "conv", "whitened"] = "patch",
        tokenizer_depth: int = 1,
        drop_path: float = 0.0,
    ):
        super().__init__()
        _require_positive(output_size=output_size, num_blocks=num_blocks)
        if pooling not in ("cls", "mean"):
            raise ValueError(f"unknown pooling {pooling!r}: choose cls or mean")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} must be in [0, 1)")
        self.pooling = pooling
        self.embedding = PatchEmbedding(
            img_size, patch_size, hidden_size, in_channels, tokenizer, tokenizer_depth, cls_token=pooling == "cls"
        )
        shares = [block / (num_blocks - 1) for block in range(num_blocks)] if num_blocks > 1 else [1]
        rates = (drop_path * share for share in shares)
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, output_size)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.head.weight)  # every class equally likely at first
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor, return_attention: bool = False):
        x = self.embedding(images)
        attention_weights = []
        for block in self.blocks:
            # of the last block's tokens nothing but the CLS token is read
            cls_alone = self.pooling == "cls" and block is self.blocks[-1] and not return_attention
            x = block(x, return_attention, cls_alone)
            if return_attention:
                x, attention = x
                attention_weights.append(attention)
        x = self.norm(x)
        logits = self.head(x[:, 0] if self.pooling == "cls" else x.mean(dim=1))
        if return_attention:
            return {"logits": logits, "attention_weights": torch.stack(attention_weights)}
        return logits

    def whiten(self, images: torch.Tensor) -> None:
        """Before training: see PatchEmbedding."""
        self.embedding.whiten(images)

    def layers(self) -> list[list[nn.Module]]:
        *blocks, last = self.blocks
        return [[self.embedding], *([block] for block in blocks), [last, self.norm], [self.head]]


# what `python train.py --model NAME` trains
MODELS = {"vit": VisionTransformer, "cnn": CNN, "resnet20": ResNet20, "mlp": FeedForward}


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive whole number, not {size!r}")
