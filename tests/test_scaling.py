"""scaling.py: a memory formula that counts what autograd keeps, and a plan whose arithmetic holds."""

import json

import pytest
import torch
from helpers import run_main

from network import VisionTransformer
from studies import scaling


def run(*flags):
    run_main("studies.scaling", *flags)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 7},
        {"hidden_size": 48, "num_heads": 2},
        {"num_heads": 8},
        {"mlp_ratio": 1.0},
        {"patch_size": 2},
        {"img_size": 64, "patch_size": 8},
    ],
)
def test_the_formula_counts_what_autograd_keeps(options):
    """Its part that grows with blocks, against PyTorch's own account of saved tensors."""

    def kept(blocks):
        model, storages = VisionTransformer(pooling="mean", **{**options, "num_blocks": blocks}), {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        size = options.get("img_size", 32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.randn(4, 3, size, size)).sum()
        del loss
        return sum(storages.values())

    def predicted(blocks):
        return scaling.predicted_memory_mb(4, 0, **{**options, "num_blocks": blocks}) * 2**20 / scaling.ALLOCATOR

    blocks = options.get("num_blocks", 4)
    assert predicted(blocks) - predicted(1) == pytest.approx(kept(blocks) - kept(1), rel=0.01)
    assert 0 < predicted(blocks) - kept(blocks) < 0.5 * kept(blocks)  # the gradients on their way back


def test_each_parameter_is_sixteen_bytes():
    more = scaling.predicted_memory_mb(1, 3_000_000) - scaling.predicted_memory_mb(1, 2_000_000)
    assert more == pytest.approx(scaling.ALLOCATOR * 16e6 / 2**20)


def test_the_plan_by_hand(tmp_path, monkeypatch, capsys):
    flags = ["--only", "plan", "--output_dir", tmp_path, "--machines", 2, "--gpus", 4, "--batch_size", 512]
    flags += ["--peak_tflops", 100, "--utilisation", 0.5, "--network_gigabits_per_second", 80]
    run(*flags, "--images", 5120, "--epochs", 10)
    plan = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["plan"]
    parameters = plan["parameters"]
    assert parameters == pytest.approx(22.05e6, rel=0.01)  # ViT-S/16 in DeiT's paper: 22 million
    patches = 196 * 768 * 384  # multiply-adds, forward; backward has twice as many, but none for images' gradients
    matmuls = 12 * 196 * (12 * 384**2 + 2 * 196 * 384) + 384 * 1000
    assert plan["training_flops_per_image"] == pytest.approx(2 * (3 * matmuls + 2 * patches), rel=1e-3)
    compute = 512 * plan["training_flops_per_image"] / (8 * 50e12)
    assert plan["compute_seconds_per_step"] == pytest.approx(compute)
    assert plan["communication_seconds_per_step"] == pytest.approx(2 * 7 / 8 * 4 * parameters / 10e9)
    step = compute + plan["communication_seconds_per_step"]
    assert plan["images_per_second"] == pytest.approx(512 / step)
    assert plan["steps"] == 100 and plan["hours"] == pytest.approx(100 * step / 3600)
    assert f"{512 / step:,.0f}" in capsys.readouterr().out


def test_one_gpu_sends_nothing(tmp_path, monkeypatch):
    run("--only", "plan", "--gpus", 1, "--output_dir", tmp_path)
    plan = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["plan"]
    assert plan["communication_bytes_per_step"] == plan["communication_seconds_per_step"] == 0


@pytest.mark.parametrize("flags", [("--workers", 0), ("--gpus", 3), ("--utilisation", 0), ("--turns", -1)])
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, flags):
    with pytest.raises(SystemExit):
        run(*flags, "--output_dir", tmp_path / "out")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_throughput_and_memory_in_miniature(tmp_path, monkeypatch):
    """Two processes by torchrun, and a step in a process of its own; then the figure, and what was measured stays."""
    monkeypatch.setattr(scaling, "WIDTHS", {64: 256})
    monkeypatch.setattr(
        scaling, "memory_grid", lambda: [{"batch_size": 32, "hidden_size": 64, "patch_size": 4, "num_blocks": 4}]
    )
    run("--only", "throughput", "memory", "--turns", 1, "--output_dir", tmp_path)
    run("--only", "plan", "--output_dir", tmp_path)
    results = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert [(row["processes"], row["threads"]) for row in results["throughput"]] == [(1, 1), (1, 2), (2, 1)]
    assert all(row["images_per_second"] > 0 for row in results["throughput"])
    assert results["throughput"][2]["all_reduce_seconds"] > 0
    (row,) = results["memory"]["rows"]
    assert row["parameters"] == 205_642 and row["memory_mb"] > 35  # the activations alone are 35 MB
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
