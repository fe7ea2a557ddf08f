import copy
import errno
import inspect
import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import same_weights

import network
from images.augment import import_torchvision
from network import (
    CNN,
    MODELS,
    FeedForward,
    Model,
    MultiHeadAttention,
    PatchEmbedding,
    ResNet20,
    TransformerBlock,
    VisionTransformer,
    whitening_filters,
)
from support.files import CheckpointError, write_file
from training.optim import build_optimizer

# For every class, arguments none of which is the default: a `save` or `load` that loses one is noticed.
UNUSUAL = {
    FeedForward: {"input_size": 12, "hidden_size": 5, "output_size": 3},
    CNN: {"img_size": 16, "output_size": 3, "in_channels": 1},
    ResNet20: {"img_size": 16, "output_size": 3, "in_channels": 1},
    VisionTransformer: {
        "img_size": 16,
        "hidden_size": 24,
        "output_size": 3,
        "num_heads": 3,
        "num_blocks": 2,
        "patch_size": 8,
        "in_channels": 1,
        "mlp_ratio": 1.5,
        "pooling": "mean",
        "tokenizer": "conv",
        "tokenizer_depth": 2,
        "drop_path": 0.25,
    },
}
INPUTS = {FeedForward: (4, 3, 2, 2)}
every_class = pytest.mark.parametrize("cls", UNUSUAL, ids=lambda cls: cls.__name__)


def count(model):
    return sum(p.numel() for p in model.parameters())


def randomize(model, seed=0):
    """Weights without any symmetry: a fresh head of zeros would agree with everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + ("norm" in name and name.endswith("weight")))
    return model.eval()


def unusual(cls, seed=0):
    return randomize(cls(**UNUSUAL[cls]), seed)


def example(cls, seed=0):
    return torch.randn(INPUTS.get(cls, (4, 1, 16, 16)), generator=torch.Generator().manual_seed(seed))


def small_vit(**options):
    sizes = {"hidden_size": 24, "num_heads": 3, "num_blocks": 2, "patch_size": 8, **options}
    return randomize(VisionTransformer(**sizes))


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------- sizes and shapes


def test_feed_forward_flattens_images_itself(images):
    model = FeedForward(3072, 100, 10)
    assert count(model) == 3072 * 100 + 100 + 100 * 10 + 10
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model(images), model(images.flatten(1)))


def test_feed_forward_is_two_linear_layers_with_relu_between(images):
    model = randomize(FeedForward(3072, 20, 7))
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    by_hand = np.maximum(images.flatten(1).numpy() @ w1.T + b1, 0) @ w2.T + b2
    np.testing.assert_allclose(model(images).detach().numpy(), by_hand, rtol=1e-3, atol=1e-3)


def test_cnn_has_the_layers_it_says(images):
    model = CNN()
    assert count(model) == (3 * 9 * 16 + 16) + (16 * 9 * 32 + 32) + (2048 * 10 + 10) == 25_578
    w1, b1, w2, b2, w3, b3 = model.parameters()
    x = F.max_pool2d(F.conv2d(images, w1, b1, padding=1).relu(), 2)
    x = F.max_pool2d(F.conv2d(x, w2, b2, padding=1).relu(), 2)
    torch.testing.assert_close(model(images), x.flatten(1) @ w3.T + b3)


@pytest.mark.parametrize("img_size, in_channels", [(28, 1), (4, 3), (31, 2)])
def test_cnn_takes_other_images(img_size, in_channels):
    model = CNN(img_size=img_size, output_size=4, in_channels=in_channels)
    assert model(torch.zeros(2, in_channels, img_size, img_size)).shape == (2, 4)


class TorchvisionResNet20(nn.Module):
    """The same network of torchvision's blocks, with the padded shortcut in the place of their downsample."""

    def __init__(self, classes):
        super().__init__()
        import_torchvision()
        from torchvision.models.resnet import BasicBlock

        class Shortcut(nn.Module):
            def forward(self, x):
                halved = x[:, :, 0::2, 0::2]
                return torch.cat([halved, torch.zeros_like(halved)], dim=1)

        blocks = []
        for inside, width, stride in [(16, 16, 1), (16, 32, 2), (32, 64, 2)]:
            blocks.append(BasicBlock(inside, width, stride, Shortcut() if stride > 1 else None))
            blocks += [BasicBlock(width, width) for _ in range(2)]
        stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.layers = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("img_size, classes", [(32, 10), (27, 7)])
def test_resnet20_is_that_of_torchvisions_blocks(img_size, classes):
    torch.manual_seed(0)
    model, other = ResNet20(img_size, classes), TorchvisionResNet20(classes)
    with torch.no_grad():
        for p in model.parameters():  # norms too, which begin with ones and zeros
            p.add_(0.1 * torch.randn(p.shape) if p.ndim == 1 else 0)
    assert count(model) == count(other) == 269_722 - 65 * (10 - classes)
    ours, theirs = model.state_dict(), other.state_dict()
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in theirs.values()]
    other.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))  # both in the order of the layers
    images = torch.randn(6, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    for training in (True, False):  # with the statistics of the batch, then with those kept from it
        logits, expected = model.train(training)(images), other.train(training)(images)
        assert logits.shape == (6, classes) and expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_every_block_of_resnet20_is_a_layer_of_its_own_for_layer_decay():
    model = ResNet20()
    layers = model.layers()
    assert len(layers) == 11
    assert sum(count(module) for layer in layers for module in layer) == count(model)
    scales = model.rate_scales(0.5)
    assert scales[model.output.weight] == 1 and scales[model.blocks[-1].conv1.weight] == 0.5
    assert scales[model.conv1.weight] == scales[model.norm1.bias] == 0.5**10


def vit_parameters(hidden, blocks, patch, mlp_ratio=4, classes=10, cls_token=True):
    tokens = (32 // patch) ** 2 + cls_token
    mlp = int(hidden * mlp_ratio)
    embedding = 3 * patch**2 * hidden + hidden + cls_token * hidden + tokens * hidden
    block = 2 * 2 * hidden + 4 * hidden**2 + 2 * hidden * mlp  # without biases in the block's linear layers
    return embedding + blocks * block + 2 * hidden + hidden * classes + classes


def test_vit_of_the_users_document_has_205_770_parameters():
    model = VisionTransformer(img_size=32, hidden_size=64, output_size=10, num_heads=4, num_blocks=4)
    assert count(model) == vit_parameters(64, 4, 4) == 205_770


@pytest.mark.parametrize("patch", [1, 2, 6, 8, 32])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vit_parameters_and_shapes(images, patch, pooling):
    model = VisionTransformer(hidden_size=8, num_heads=2, num_blocks=3, patch_size=patch, mlp_ratio=2, pooling=pooling)
    assert count(model) == vit_parameters(8, 3, patch, 2, cls_token=pooling == "cls")
    assert model(images[:2]).shape == (2, 10)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 24])
def test_heads_share_the_width_of_the_model(num_heads):
    attention = randomize(MultiHeadAttention(24, num_heads))
    assert count(attention) == 4 * 24 * 24
    x, weights = attention(torch.randn(2, 5, 24), return_attention=True)
    assert x.shape == (2, 5, 24)
    assert weights.shape == (2, num_heads, 5, 5)


def test_a_new_vit_finds_every_class_equally_likely(images):
    torch.testing.assert_close(VisionTransformer()(images).softmax(dim=1), torch.full((3, 10), 0.1))


def test_every_parameter_learns(images):
    for options in ({}, {"pooling": "mean", "tokenizer": "conv"}):
        model = small_vit(**options).train()
        F.cross_entropy(model(images), torch.tensor([1, 2, 3])).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# --------------------------------------------------------------------------------------------------- patches


def test_patches_are_linear_projections_row_by_row(images):
    embedding = randomize(PatchEmbedding(32, 8, 24))
    weight, bias = embedding.project.weight.flatten(1), embedding.project.bias
    for row, column in ((0, 0), (0, 3), (2, 1)):
        patch = images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(1)
        token = 1 + 4 * row + column
        expected = patch @ weight.T + bias + embedding.position[0, token]
        torch.testing.assert_close(embedding(images)[:, token], expected, rtol=1e-4, atol=1e-4)


def test_cls_token_comes_first_and_does_not_see_the_image(images):
    embedding = randomize(PatchEmbedding(32, 8, 24))
    first = embedding(images)[:, 0]
    torch.testing.assert_close(first, (embedding.cls_token + embedding.position[:, :1])[0].expand(3, -1))


def test_patch_size_6_sees_the_first_30_pixels(images):
    model = small_vit(patch_size=6)
    assert model.embedding.grid_size == 5
    assert model(images, return_attention=True)["attention_weights"].shape[-1] == 26
    for edge in (np.s_[..., 30:], np.s_[..., 30:, :]):
        changed = images.clone()
        changed[edge] = 9.0
        assert torch.equal(model(changed), model(images))
    changed = images.clone()
    changed[..., 29] = 9.0
    assert not torch.allclose(model(changed), model(images))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_convolutional_tokenizer_has_the_same_grid(images, patch):
    tokens = PatchEmbedding(32, patch, 24, tokenizer="conv")(images)
    assert tokens.shape == PatchEmbedding(32, patch, 24)(images).shape == (3, (32 // patch) ** 2 + 1, 24)


def test_stages_of_a_tokenizer_have_half_as_many_channels_in_multiples_of_16():
    for (hidden_size, patch_size), widths in {
        (64, 4): [32, 64],
        (104, 8): [32, 64, 104],
        (96, 8): [32, 48, 96],
        (8, 4): [8, 8],
        (64, 2): [64],
    }.items():
        for tokenizer in ("conv", "whitened"):
            project = PatchEmbedding(32, patch_size, hidden_size, tokenizer=tokenizer).project
            convolutions = [layer for layer in project if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
            assert [layer.out_channels for layer in convolutions] == widths


def test_convolutional_tokenizer_is_convolution_pooling_batch_norm_relu_and_again(images):
    embedding = randomize(PatchEmbedding(32, 4, 24, tokenizer="conv", tokenizer_depth=2, cls_token=False)).train()
    x = images
    for stage, width in enumerate((16, 24)):
        for convolution in range(2):
            layer = 7 * stage + (0 if convolution == 0 else 4)
            x = F.conv2d(x, embedding.project[layer].weight, padding=1)
            assert x.shape[1] == width
            if convolution == 0:
                x = F.max_pool2d(x, 2)
            norm = embedding.project[layer + (2 if convolution == 0 else 1)]
            mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
            x = x.relu()
    by_hand = x.flatten(2).transpose(1, 2) + embedding.position
    torch.testing.assert_close(embedding(images), by_hand, rtol=1e-4, atol=1e-4)


def test_order_of_patches_matters_to_the_vit(images):
    model = small_vit()
    swapped = torch.cat([images[..., 16:], images[..., :16]], dim=-1)
    assert not torch.allclose(model(swapped), model(images), atol=1e-4)


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("pooling, tokens", [("cls", 17), ("mean", 16)])
def test_return_attention_is_the_same_forward_pass(images, pooling, tokens):
    model = small_vit(pooling=pooling)
    output = model(images, return_attention=True)
    attention = output["attention_weights"]
    assert attention.shape == (2, 3, 3, tokens, tokens)
    assert attention.min() >= 0
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, 3, tokens))
    last = []
    with_hook = model.blocks[-1].register_forward_hook(lambda _block, _inputs, output: last.append(output.shape[1]))
    logits = model(images)
    with_hook.remove()
    assert last == [1 if pooling == "cls" else 16]  # the head reads nothing else
    torch.testing.assert_close(output["logits"], logits, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), [*model.parameters()]) for x in (output["logits"], logits)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_cls_token_alone_drops_branches_and_rounds_as_all_tokens_do(images):
    model = small_vit(pooling="cls", drop_path=0.5).train()
    logits = []
    for return_attention in (False, True):
        torch.manual_seed(0)
        output = model(images, return_attention)
        logits.append(output["logits"] if return_attention else output)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.eval()(images), model(images, return_attention=True)["logits"]
    torch.testing.assert_close(*low, rtol=0.1, atol=0.1)


def test_attention_weights_are_the_softmax_written_by_hand(images):
    model = small_vit()
    weights = model(images, return_attention=True)["attention_weights"]
    x = model.embedding(images)
    for b, block in enumerate(model.blocks):
        normed = block.norm1(x).detach().double().numpy()
        w = block.attention.query_key_value.weight.detach().double().numpy()
        for head in range(3):
            rows = slice(8 * head, 8 * head + 8)  # 24 / 3 = 8 wide
            query = normed @ w[:24][rows].T
            key = normed @ w[24:48][rows].T
            for i in range(len(images)):
                exponentials = np.exp([[q @ k / math.sqrt(8) for k in key[i]] for q in query[i]])
                by_hand = exponentials / exponentials.sum(axis=1, keepdims=True)
                np.testing.assert_allclose(weights[b, i, head].detach().numpy(), by_hand, atol=1e-5)
        x = block(x)


def test_block_agrees_with_torchs_encoder_layer():
    block = randomize(TransformerBlock(24, 3, mlp_ratio=1.5))
    layer = nn.TransformerEncoderLayer(
        24, 3, dim_feedforward=36, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    names = {
        "self_attn.in_proj_weight": "attention.query_key_value.weight",
        "self_attn.out_proj.weight": "attention.output.weight",
        "linear1.weight": "mlp.0.weight",
        "linear2.weight": "mlp.2.weight",
        "norm1.weight": "norm1.weight",
        "norm1.bias": "norm1.bias",
        "norm2.weight": "norm2.weight",
        "norm2.bias": "norm2.bias",
    }
    ours = block.state_dict()
    zeros = {name: torch.zeros_like(p) for name, p in layer.state_dict().items()}  # our linear layers have no biases
    layer.load_state_dict(zeros | {their: ours[our] for their, our in names.items()})
    x = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("patch", [4, 6])
def test_vit_agrees_with_timm(images, pooling, patch):
    import_torchvision()
    timm = pytest.importorskip("timm.models.vision_transformer")
    model = small_vit(pooling=pooling, patch_size=patch, num_blocks=3, mlp_ratio=2)
    theirs = timm.VisionTransformer(
        img_size=32,
        patch_size=patch,
        num_classes=10,
        embed_dim=24,
        depth=3,
        num_heads=3,
        mlp_ratio=2,
        class_token=pooling == "cls",
        global_pool="token" if pooling == "cls" else "avg",
        fc_norm=False,
        norm_layer=nn.LayerNorm,
    ).eval()
    renamed = {
        "embedding.project": "patch_embed.proj",
        "embedding.cls_token": "cls_token",
        "embedding.position": "pos_embed",
        "attention.query_key_value": "attn.qkv",
        "attention.output": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }
    weights = {name: torch.zeros_like(p) for name, p in theirs.state_dict().items()}  # stays so for biases we have not
    for name, tensor in model.state_dict().items():
        for our, their in renamed.items():
            name = name.replace(our, their)
        weights[name] = tensor
    theirs.load_state_dict(weights)
    with torch.no_grad():
        assert model(images).abs().max() > 0.1
        torch.testing.assert_close(model(images), theirs(images), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- stochastic depth


def test_drop_path_does_nothing_in_eval_mode(images):
    plain, dropping = small_vit(), small_vit(drop_path=0.9)
    assert torch.equal(plain(images), dropping(images))
    assert not torch.equal(plain.train()(images), dropping.train()(images))


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    block = randomize(TransformerBlock(8, 2, drop_path=0.3))
    nn.init.zeros_(block.mlp[2].weight)  # leaves the attention branch alone
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        change = block(x) - x
        changes = block.train()(x.expand(5000, -1, -1)) - x
    kept = changes.flatten(1).abs().amax(dim=1) > 1e-6
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(changes[kept], (change / 0.7).expand(int(kept.sum()), -1, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changes.mean(dim=0), change[0], rtol=0.05, atol=1e-3)


def test_drop_path_grows_linearly_over_the_blocks():
    model = VisionTransformer(num_blocks=5, drop_path=0.2)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert VisionTransformer(num_blocks=1, drop_path=0.2).blocks[0].drop_path == 0.2  # it is the last one


# -------------------------------------------------------------------------------------------------- bad sizes


@pytest.mark.parametrize(
    "cls, arguments",
    [
        (VisionTransformer, {"num_heads": 5}),
        (VisionTransformer, {"num_heads": 0}),
        (VisionTransformer, {"num_heads": -4}),
        (VisionTransformer, {"hidden_size": 0}),
        (VisionTransformer, {"hidden_size": -64}),
        (VisionTransformer, {"hidden_size": 64.0}),
        (VisionTransformer, {"output_size": 0}),
        (VisionTransformer, {"num_blocks": 0}),
        (VisionTransformer, {"num_blocks": -1}),
        (VisionTransformer, {"patch_size": 33}),
        (VisionTransformer, {"patch_size": 0}),
        (VisionTransformer, {"img_size": 0}),
        (VisionTransformer, {"in_channels": 0}),
        (VisionTransformer, {"mlp_ratio": 0}),
        (VisionTransformer, {"mlp_ratio": -1.0}),
        (VisionTransformer, {"mlp_ratio": math.inf}),
        (VisionTransformer, {"mlp_ratio": math.nan}),
        (VisionTransformer, {"drop_path": 1.0}),
        (VisionTransformer, {"drop_path": -0.1}),
        (VisionTransformer, {"drop_path": 1.5, "num_blocks": 1}),
        (VisionTransformer, {"pooling": "max"}),
        (VisionTransformer, {"tokenizer": "linear"}),
        (PatchEmbedding, {"tokenizer": "conv", "patch_size": 6}),
        (PatchEmbedding, {"tokenizer": "conv", "patch_size": 1}),
        (PatchEmbedding, {"tokenizer": "conv", "tokenizer_depth": 0}),
        (PatchEmbedding, {"patch_size": 64}),
        (MultiHeadAttention, {"num_heads": 3}),
        (TransformerBlock, {"num_heads": 3}),
        (TransformerBlock, {"hidden_size": -8, "num_heads": 2}),
        (CNN, {"img_size": 3}),
        (CNN, {"output_size": 0}),
        (ResNet20, {"img_size": 4}),
        (ResNet20, {"output_size": 0}),
        (FeedForward, {"hidden_size": 0}),
        (FeedForward, {"input_size": -1}),
    ],
)
def test_bad_sizes_are_value_errors(cls, arguments):
    with pytest.raises(ValueError) as error:
        cls(**arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- saving and loading


def test_the_unusual_arguments_are_all_there_and_none_is_the_default():
    for cls, arguments in UNUSUAL.items():
        parameters = inspect.signature(cls).parameters
        assert arguments.keys() == parameters.keys()
        assert not [name for name, value in arguments.items() if parameters[name].default == value]
    defined = {cls for cls in vars(network).values() if isinstance(cls, type) and issubclass(cls, Model)}
    assert defined - {Model} == UNUSUAL.keys() == set(MODELS.values())


@every_class
def test_save_and_load_keep_arguments_weights_and_outputs(cls, tmp_path):
    model = unusual(cls).train()
    model(example(cls))  # moves the statistics of batch norms, which are saved too
    model.eval().save(tmp_path / "folder" / "model.pt")
    for loader in (cls, Model):
        loaded = loader.load(tmp_path / "folder" / "model.pt")
        assert type(loaded) is cls
        assert loaded.config == model.config == UNUSUAL[cls]
        assert not loaded.training
        assert same_weights(loaded, model)
        assert torch.equal(loaded(example(cls)), model(example(cls)))


def test_a_class_that_is_defined_again_loads_as_the_last_one(tmp_path):
    """As when a cell of a notebook is run again, with objects of the first time still there."""
    kept = []
    for _ in range(6):

        class Again(CNN):
            pass

        kept.append(Again())
        kept[-1].save(tmp_path / "again.pt")
        assert type(Again.load(tmp_path / "again.pt")) is type(Model.load(tmp_path / "again.pt")) is Again
    assert type(type(kept[0]).load(tmp_path / "again.pt")) is type(kept[0])


def test_load_keeps_what_only_training_uses(tmp_path):
    unusual(VisionTransformer).save(tmp_path / "model.pt")
    loaded = VisionTransformer.load(tmp_path / "model.pt")
    assert [block.drop_path for block in loaded.blocks] == [0, 0.25]


def test_positional_arguments_and_defaults_are_kept(tmp_path):
    FeedForward(12, 5).save(tmp_path / "model.pt")
    assert FeedForward.load(tmp_path / "model.pt").config == {"input_size": 12, "hidden_size": 5, "output_size": 10}


def test_metadata_is_carried(tmp_path):
    metadata = {"dataset": "digits", "classes": ["zero", "ä"], "mean": [0.1, 0.2, 0.3], "nothing": None, "n": 3}
    unusual(CNN).save(tmp_path / "model.pt", **metadata)
    assert CNN.load(tmp_path / "model.pt").metadata == metadata


def test_files_load_with_weights_only(tmp_path):
    unusual(VisionTransformer).save(tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["model"] == "VisionTransformer"


def test_saving_again_replaces_the_file(tmp_path):
    for seed in (0, 1):
        unusual(CNN, seed).save(tmp_path / "model.pt")
    assert torch.equal(CNN.load(tmp_path / "model.pt").output.weight, unusual(CNN, 1).output.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@every_class
def test_deepcopy_is_independent_and_keeps_the_arguments(cls, tmp_path):
    model = unusual(cls)
    twin = copy.deepcopy(model)
    assert twin.config == model.config
    assert torch.equal(twin(example(cls)), model(example(cls)))
    randomize(twin, seed=5)
    assert not torch.equal(twin(example(cls)), model(example(cls)))
    twin.save(tmp_path / "twin.pt")
    assert torch.equal(cls.load(tmp_path / "twin.pt")(example(cls)), twin(example(cls)))


def refuse(path, cls=Model):
    with pytest.raises(CheckpointError) as error:
        cls.load(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_file_of_another_class_is_refused_by_name(tmp_path):
    unusual(CNN).save(tmp_path / "model.pt")
    message = refuse(tmp_path / "model.pt", VisionTransformer)
    assert "CNN" in message
    assert "VisionTransformer" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not really a zip", bytes(2000)])
def test_files_that_are_not_checkpoints_are_refused(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    refuse(tmp_path / "model.pt")


def test_missing_files_and_folders_are_refused(tmp_path):
    refuse(tmp_path / "missing.pt")
    refuse(tmp_path)


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    unusual(CNN).save(path)
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuse(path)


def test_a_flipped_byte_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    model = unusual(CNN)
    model.save(path)
    data = bytearray(path.read_bytes())
    stored = model.conv2.weight.detach().permute(0, 2, 3, 1)  # channels last, as they lie in memory
    data[data.index(stored.numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(data)
    refuse(path)


def test_a_flipped_byte_anywhere_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "model.pt"
    model = FeedForward(12, 5, 3)
    model.save(path, classes=["a", "b", "c"])
    whole = path.read_bytes()
    noticed = 0
    positions = range(0, len(whole), 7)
    for position in positions:
        data = bytearray(whole)
        data[position] ^= 0x10
        path.write_bytes(data)
        try:
            loaded = Model.load(path)
        except CheckpointError:
            noticed += 1
        else:  # padding, a date or the like
            assert (loaded.config, loaded.metadata) == (model.config, {"classes": ["a", "b", "c"]})
            assert same_weights(loaded, model)
    assert noticed > len(positions) / 4


@pytest.mark.parametrize(
    "contents",
    [
        nn.Linear(2, 2).state_dict(),
        [1, 2],
        torch.zeros(3),
        {"model": "CNN", "config": {}, "weights": {}, "metadata": {}},
        {"model": "CNN", "config": {}, "weights": {}, "metadata": {}, "sha256": "0" * 64},
    ],
    ids=["state_dict", "list", "tensor", "no checksum", "wrong checksum"],
)
def test_foreign_torch_files_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "model.pt")
    refuse(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"model": "CNN"},
        {"model": "ResNet", "config": {}, "weights": {}, "metadata": {}},
        {"model": "CNN", "config": {"depth": 3}, "weights": {}, "metadata": {}},
        {"model": "CNN", "config": {"img_size": 0}, "weights": {}, "metadata": {}},
        {"model": "CNN", "config": {}, "weights": {}, "metadata": {}},
    ],
)
def test_intact_files_that_hold_no_known_model_are_refused(tmp_path, contents):
    write_file(tmp_path / "model.pt", contents)
    refuse(tmp_path / "model.pt")


def test_code_in_a_file_does_not_run(tmp_path, trap):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(trap, protocol=2))
    refuse(path)
    torch.save({"model": "CNN", "config": trap, "weights": {}, "metadata": {}, "sha256": ""}, path)
    refuse(path)
    assert not trap.sprung
    pickle.loads(pickle.dumps(trap))
    assert trap.sprung  # so the trap works


def test_a_path_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    for path in (tmp_path / "file" / "model.pt", tmp_path / "file" / "folder" / "model.pt"):
        with pytest.raises(OSError, match="cannot write .*model.pt") as error:
            unusual(CNN).save(path)
        assert ".tmp" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "model.pt"
    unusual(CNN, 0).save(path)

    def disk_full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match="cannot write .*model.pt: No space left"):
        unusual(CNN, 1).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    assert torch.equal(CNN.load(path).output.weight, unusual(CNN, 0).output.weight)


# ------------------------------------------------------------------------------------------------- whitening


def covariance_of_answers(images: torch.Tensor, filters: torch.Tensor, stride: int) -> torch.Tensor:
    answers = F.conv2d(images.double(), filters.double(), stride=stride).transpose(0, 1).flatten(1)
    return answers @ answers.T / answers.shape[1]


@pytest.mark.parametrize(("size", "stride"), [(2, 1), (4, 4), (3, 1)])
def test_answers_of_whitening_filters_are_uncorrelated_with_variance_one(size, stride):
    noise = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = 2 * F.avg_pool2d(noise, 3, stride=1, padding=1) + 0.5 * noise[:, :1]  # neighbours are alike
    filters = whitening_filters(images, size, stride)
    assert filters.shape == (3 * size**2, 3, size, size)
    covariance = covariance_of_answers(images, filters, stride)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert ((covariance.diag() > 0.3) & (covariance.diag() < 1.001)).all()  # 0.01 beside the smallest is felt
    norms = filters.flatten(1).norm(dim=1)
    assert (norms[1:] >= norms[:-1] - 1e-6).all()  # of the largest variance first


@pytest.mark.parametrize("hidden_size", [16, 64])
def test_whitening_gives_a_patch_embedding_its_first_filters(hidden_size):
    images = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(dim=3)
    model = VisionTransformer(img_size=16, hidden_size=hidden_size, num_heads=2, num_blocks=1)
    before = model.embedding.project.weight.clone()
    model.whiten(images)
    filters, after = whitening_filters(images, 4, 4), model.embedding.project.weight
    count = min(48, hidden_size)
    assert torch.equal(after[:count], filters[:count]) and torch.equal(after[count:], before[count:])
    assert after.requires_grad


def test_whitened_tokenizer_keeps_its_filters_in_training_and_in_a_file(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16).cumsum(dim=2)
    arguments = {"img_size": 16, "hidden_size": 16, "num_heads": 2, "num_blocks": 1, "patch_size": 4, "pooling": "mean"}
    model = VisionTransformer(**arguments, tokenizer="whitened", tokenizer_depth=2)
    model.whiten(images)
    first = model.embedding.project[1].weight
    filters = whitening_filters(images, 2, 1)
    assert torch.equal(first, torch.cat([filters, -filters])) and not first.requires_grad
    optimizer = build_optimizer(model)
    F.cross_entropy(model(images), torch.arange(64) % 10).backward()
    optimizer.step()
    assert torch.equal(first, torch.cat([filters, -filters]))
    model.eval().save(tmp_path / "model.pt")
    assert torch.equal(Model.load(tmp_path / "model.pt")(images), model(images))
    assert model(images, return_attention=True)["attention_weights"].shape == (1, 64, 2, 16, 16)


def test_whitened_tokenizer_is_these_layers_one_after_another():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, hidden_size=8, num_heads=2, num_blocks=1, patch_size=4, tokenizer="whitened",
                              tokenizer_depth=2).eval()  # fmt: skip
    images, weights = torch.randn(3, 3, 8, 8), dict(model.embedding.project.named_parameters())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def stage(x, entry, inner, first, second):
        x = F.max_pool2d(F.conv2d(x, weights[entry], padding=1), 2)
        x = F.gelu(first(x))
        return x + F.gelu(second(F.conv2d(x, weights[inner], padding=1)))

    x = F.gelu(F.conv2d(F.pad(images, (0, 1, 0, 1)), weights["1.weight"]))
    x = stage(x, "3.weight", "7.convolution.weight", norms[0], norms[1])
    x = stage(x, "8.weight", "12.convolution.weight", norms[2], norms[3])
    torch.testing.assert_close(model.embedding.project(images), x)


def test_a_plain_convolutional_tokenizer_is_left_as_it_is():
    model = VisionTransformer(num_blocks=1, tokenizer="conv")
    before = copy.deepcopy(model)
    model.whiten(torch.randn(5, 3, 32, 32))
    assert same_weights(model, before)


@pytest.mark.parametrize("cls", [CNN, ResNet20])
def test_convolutional_networks_begin_with_whitening_filters(cls):
    images = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cumsum(dim=3)
    model = cls()
    model.whiten(images)
    assert torch.equal(model.conv1.weight, whitening_filters(images, 3, 1)[:16])
