"""Explanations against values worked out by hand or in another way."""

from pathlib import Path

import pytest
import torch

import explain
from network import CNN, FeedForward, ResNet20, VisionTransformer
from training import heatmaps

KINDS = {  # every kind of ViT that heat maps must work for
    "mean": dict(pooling="mean"),
    "cls": dict(pooling="cls"),
    "conv": dict(pooling="mean", tokenizer="conv"),
    "patch 6": dict(pooling="cls", patch_size=6),
}


def vit(**options) -> VisionTransformer:
    """A small ViT with attention that is far from uniform and a head that is not zero."""
    torch.manual_seed(0)
    model = VisionTransformer(**{"hidden_size": 32, "num_heads": 2, "num_blocks": 2, "drop_path": 0.2, **options})
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_key_value.weight.mul_(2)
        model.head.weight.normal_()
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Two blocks, two tokens, one head: rows are the tokens that look.
ATTENTION = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]).view(2, 1, 1, 2, 2)


def test_rollout_by_hand():
    # block 1: (A + 1) / 2 = [[3/4, 1/4], [1/8, 7/8]], block 2: [[1, 0], [1/4, 3/4]]; second times first
    expected = [[3 / 4, 1 / 4], [1 / 4 * 3 / 4 + 3 / 4 * 1 / 8, 1 / 4 * 1 / 4 + 3 / 4 * 7 / 8]]
    torch.testing.assert_close(heatmaps.roll_out(ATTENTION), torch.tensor([expected]))


def test_rollout_averages_heads():
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(2, 1, 1, 2, 2)
    torch.testing.assert_close(
        heatmaps.roll_out(torch.cat([ATTENTION, other], dim=2)), heatmaps.roll_out((ATTENTION + other) / 2)
    )


def test_relevance_by_hand():
    gradients = torch.tensor([[[2.0, -1.0], [4.0, 0.0]], [[-3.0, 9.0], [2.0, 4.0]]]).view(2, 1, 1, 2, 2)
    # gradient times attention without what is negative: block 1 [[1, 0], [1, 0]], block 2 [[0, 0], [1, 2]]
    # R = 1; after block 1 [[2, 0], [1, 1]]; block 2 adds [[0, 0], [1*2 + 2*1, 1*0 + 2*1]]
    expected = torch.tensor([[[2.0, 0.0], [5.0, 3.0]]])
    torch.testing.assert_close(heatmaps.propagate_relevance(ATTENTION, gradients), expected)


def test_relevance_drops_the_negative_before_averaging_heads():
    attention = torch.full((1, 1, 2, 2, 2), 0.5)
    gradients = torch.stack([torch.full((2, 2), 2.0), torch.full((2, 2), -6.0)]).view(1, 1, 2, 2, 2)
    expected = torch.eye(2) + 0.5  # heads 1 and -3, so 1 and 0, of which the mean is 1/2
    torch.testing.assert_close(heatmaps.propagate_relevance(attention, gradients), expected[None])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_relevance_takes_the_gradient_of_the_logit(images, pooling, monkeypatch):
    """Against gradients by finite differences: the second block's attention is changed, entry by entry."""
    model = vit(pooling=pooling, patch_size=16).double()
    image, target = images[:1].double(), 7
    with torch.no_grad():
        tokens, first = model.blocks[0](model.embedding(image), return_attention=True)
        block = model.blocks[1]
        attention = block.attention(block.norm1(tokens), return_attention=True)[1]
        value = block.attention.query_key_value(block.norm1(tokens)).chunk(3, dim=-1)[2]
        value = value.unflatten(-1, (2, 16)).transpose(1, 2)

        def logit(weights):
            mixed = block.attention.output((weights @ value).transpose(1, 2).flatten(2))
            x = tokens + mixed
            x = model.norm(x + block.mlp(block.norm2(x)))
            return model.head(x[:, 0] if pooling == "cls" else x.mean(dim=1))[0, target]

        gradient = torch.zeros_like(attention)
        for entry in range(attention.numel()):
            step = torch.zeros_like(attention)
            step.view(-1)[entry] = 1e-5
            gradient.view(-1)[entry] = (logit(attention + step) - logit(attention - step)) / 2e-5
    seen = []
    original = heatmaps.propagate_relevance
    monkeypatch.setattr(heatmaps, "propagate_relevance", lambda *both: seen.append(both) or original(*both))
    heatmaps.relevance(model, image, target)
    weights, gradients = seen[0]
    torch.testing.assert_close(weights, torch.stack([first, attention]))
    torch.testing.assert_close(gradients[1], gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_rows_sum_to_one(images, kind):
    model = vit(**KINDS[kind])
    with torch.no_grad():
        weights = model(images, return_attention=True)["attention_weights"]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    rows = heatmaps.roll_out(weights).sum(dim=-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_heat_maps_are_images_in_0_to_1(images, kind):
    model = vit(**KINDS[kind])
    covered = 30 if kind == "patch 6" else 32
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    for name, method in heatmaps.methods(model).items():
        heat = method(images)
        assert heat.shape == (3, 32, 32) and heat.dtype == torch.float32 and not heat.requires_grad, name
        assert heat.min() >= 0 and (heat.amax(dim=(1, 2)) - 1).abs().max() < 1e-5, name
        uncovered = [heat[:, covered:].sum(), heat[:, :, covered:].sum()]
        assert uncovered == pytest.approx([0, 0], abs=1e-4), name  # logits of other batches are rounded otherwise
        torch.testing.assert_close(method(images[:1]), heat[:1], atol=1e-4, rtol=1e-3)  # image by image
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_attention_is_that_of_the_block_and_head(images, pooling):
    model = vit(pooling=pooling, patch_size=8)
    with torch.no_grad():
        weights = model(images, return_attention=True)["attention_weights"][0, :, 1]
    scores = weights[:, 0, 1:] if pooling == "cls" else weights.mean(dim=1)
    heat = heatmaps.attention(model, images, block=0, head=1)[:, 4::8, 4::8].flatten(1)
    scores = scores - scores.amin(dim=1, keepdim=True)
    torch.testing.assert_close(heat, scores / scores.amax(dim=1, keepdim=True))
    with pytest.raises(IndexError):
        heatmaps.attention(model, images, block=2)


def test_relevance_differs_between_classes(images):
    model = vit()
    first, second = heatmaps.relevance(model, images, 0), heatmaps.relevance(model, images, torch.tensor([1, 1, 0]))
    assert (first[:2] - second[:2]).abs().amax(dim=(1, 2)).min() > 0.05
    torch.testing.assert_close(first[2], second[2])
    predicted = model(images).argmax(dim=1)
    torch.testing.assert_close(heatmaps.relevance(model, images), heatmaps.relevance(model, images, predicted))


def test_relevance_under_no_grad_of_a_frozen_backbone_in_training(images):
    model = vit()
    expected = heatmaps.relevance(model, images)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(heatmaps.relevance(model, images), expected)
    assert model.training
    assert not any(block.attention._forward_hooks for block in model.blocks)


@pytest.mark.parametrize(
    "model", [vit(), CNN(), ResNet20().eval(), FeedForward(hidden_size=16)], ids=lambda model: type(model).__name__
)
def test_integrated_gradients_are_complete(images, model):
    target = 3
    attribution = heatmaps.integrated_gradients(model, images, target, steps=128, signed=True)
    with torch.no_grad():
        expected = (model(images) - model(torch.zeros_like(images)))[:, target]
    torch.testing.assert_close(
        attribution.sum(dim=(1, 2)), expected, atol=0.02 * expected.abs().max().item(), rtol=0.02
    )


@pytest.mark.parametrize("size", [4, 6])
def test_occlusion_is_the_fall_of_the_logit(images, size):
    model = vit(patch_size=size)
    heat = heatmaps.occlusion(model, images, 5, signed=True)
    occluded = images.clone()
    occluded[:, :, size : 2 * size, 3 * size : 4 * size] = 0
    with torch.no_grad():
        fall = (model(images) - model(occluded))[:, 5]
    torch.testing.assert_close(heat[:, size + 1, 3 * size + 2], fall, atol=1e-4, rtol=1e-3)


def test_grad_cam_by_hand(images):
    torch.manual_seed(0)
    model = CNN()
    target = 2
    maps = model.conv2(torch.max_pool2d(model.conv1(images).relu(), 2)).relu()
    logits = model.output(torch.max_pool2d(maps, 2).flatten(1))
    gradients = torch.autograd.grad(logits[:, target].sum(), maps)[0]
    cam = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu().detach()
    cam = torch.nn.functional.interpolate(cam[:, None], (32, 32), mode="bilinear")[:, 0]
    heat = heatmaps.grad_cam(model, images, target)
    torch.testing.assert_close(heat, cam / cam.amax(dim=(1, 2), keepdim=True))


def test_grad_cam_of_resnet20_is_on_what_its_last_block_gives(images):
    torch.manual_seed(0)
    model = ResNet20().eval()
    x = model.blocks(model.norm1(model.conv1(images)).relu())  # 8x8
    weights = model.output.weight[2].detach() / 64  # of the mean over 64 places
    cam = torch.einsum("bchw,c->bhw", x, weights).relu().detach()
    cam = torch.nn.functional.interpolate(cam[:, None], (32, 32), mode="bilinear")[:, 0]
    heat = heatmaps.methods(model)["Grad-CAM"](images, 2)
    torch.testing.assert_close(heat, cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12))


@pytest.mark.parametrize("method", [heatmaps.relevance, heatmaps.integrated_gradients, heatmaps.occlusion])
@pytest.mark.parametrize("target", [-1, 10, [0, 1, 10]])
def test_a_class_that_is_not_there(images, method, target):
    with pytest.raises(ValueError, match="classes 0 to 9"):
        method(vit(), images, target)


# ------------------------------------------------------------------------------------------------ the model as a whole


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_attention_distance_of_uniform_attention(images, pooling, monkeypatch):
    monkeypatch.setattr(explain, "AT_ONCE", 2 * 64)  # weights of two images, so that there are several batches
    model = vit(pooling=pooling, patch_size=16)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_key_value.weight.zero_()
    # 2x2 patches of 16 pixels: from each patch 0, 16, 16 and 16 * sqrt(2) pixels
    expected = torch.full((2, 2), (32 + 16 * 2**0.5) / 4)
    torch.testing.assert_close(explain.mean_attention_distance(model, images), expected)


def test_attention_distance_of_each_patch_to_itself(images):
    model = vit(pooling="mean", patch_size=16)
    weights = torch.eye(4).expand(2, 3, 2, 4, 4)
    model.forward = lambda images, return_attention: {"attention_weights": weights}
    assert not explain.mean_attention_distance(model, images).any()


def test_position_similarity():
    model = vit(patch_size=8, pooling="cls")
    similarity = explain.position_similarity(model)
    assert similarity.shape == (4, 4, 4, 4)
    positions = model.embedding.position[0, 1:]
    expected = torch.cosine_similarity(positions[1 * 4 + 2], positions[3 * 4 + 0], dim=0)
    torch.testing.assert_close(similarity[1, 2, 3, 0], expected.detach())


@pytest.mark.parametrize("kind, shape", [("mean", (28, 3, 4, 4)), ("patch 6", (28, 3, 6, 6)), ("conv", (16, 3, 3, 3))])
def test_patch_filters_are_orthonormal(kind, shape):
    filters = explain.patch_filters(vit(**KINDS[kind]))
    assert filters.shape == shape
    flat = filters.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(capsys):
    """Runs the script in this process; gives exit code, stdout and the lines of stderr that are no progress bar."""

    def run(*arguments):
        try:
            code = explain.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        return code or 0, output.out, [line for line in output.err.splitlines() if "it/s]" not in line and line]

    return run


def save(model, path: Path, digits) -> Path:
    model.save(path, dataset="digits", classes=digits.classes, mean=digits.mean, std=digits.std)
    return path


def test_script_of_a_vit(tmp_path, digits, run):
    path = save(vit(patch_size=8), tmp_path / "VisionTransformer.pt", digits)
    figures = tmp_path / "figures"
    code, _, _ = run(path, "--output_dir", figures)
    assert code == 0
    names = {f"VisionTransformer_{what}.png" for what in ("explanations", "attention_distance", "positions")}
    assert {file.name for file in figures.iterdir()} == names


@pytest.mark.parametrize(
    "model", [CNN(), ResNet20(), FeedForward(hidden_size=8)], ids=lambda model: type(model).__name__
)
def test_script_of_other_models(tmp_path, digits, run, model):
    path = save(model, tmp_path / "other.pt", digits)
    code, out, _ = run("--checkpoint", path, "--output_dir", tmp_path / "figures")
    assert code == 0 and f"{model.title} does not give its attention weights" in out
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["other_explanations.png"]


def test_a_file_that_is_no_model_or_does_not_say_what_it_was_trained_on(tmp_path, run):
    code, _, err = run("--checkpoint", tmp_path / "none.pt")
    assert code == 2 and len(err) == 1 and "No such file" in err[0]
    vit().save(tmp_path / "bare.pt")
    code, _, err = run("--checkpoint", tmp_path / "bare.pt")
    assert code == 2 and len(err) == 1 and "metadata.dataset is missing" in err[0]
    code, _, err = run("--checkpoint", tmp_path / "bare.pt", "--rows", 0)
    assert code == 2 and len(err) == 1 and "rows must be positive" in err[0]
    code, _, err = run("a/bare.pt", "--checkpoint", tmp_path / "bare.pt")
    assert code == 2 and len(err) == 1 and "overwrite each other" in err[0]
