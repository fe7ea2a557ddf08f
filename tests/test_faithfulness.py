"""The deletion and insertion test of heat maps, by hand and from the command line."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn as nn
from helpers import run_main

from network import VisionTransformer
from studies import faithfulness


class SumOfPatch(torch.nn.Module):
    """Says 1 where the sum of the one patch that it looks at, in row 0 and column 1 of 2x2, is positive."""

    def forward(self, images):
        score = images[:, :, :16, 16:].sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_faithfulness_by_hand():
    images = torch.rand(20, 3, 32, 32)
    labels = torch.ones(20, dtype=torch.long)
    best = torch.tensor([0.0, 9.0, 1.0, 2.0]).expand(20, -1)
    report = faithfulness.measure([SumOfPatch()], images, labels, [{"best": best, "worst": -best}], size=16, steps=4)
    assert report["removed"] == [0, 1, 2, 3, 4] and report["patches"] == 4
    best, worst = report["rankings"]["best"], report["rankings"]["worst"]
    assert best["deletion"]["accuracy"] == worst["insertion"]["accuracy"] == [1, 0, 0, 0, 0]
    assert best["insertion"]["accuracy"] == worst["deletion"]["accuracy"] == [1, 1, 1, 1, 0]
    assert best["deletion"]["area"] == pytest.approx(0.125) and best["insertion"]["area"] == pytest.approx(0.875)
    difference, low, high = best["deletion"]["versus_random"]
    assert low < difference < high < 0 < best["insertion"]["versus_random"][1]
    assert report["rankings"]["random"]["deletion"]["versus_random"] == [0, 0, 0]
    table = faithfulness.markdown_table(report).splitlines()
    assert len(table) == 5 and table[3].startswith("| best | 12.5 | -")


def test_rankings_are_compared_pair_by_pair_over_the_mean_of_the_models():
    areas = {
        (name, "deletion"): torch.tensor(values, dtype=torch.float64)
        for name, values in {
            "random": [[0.5, 0.6, 0.4, 0.5, 0.7], [0.7, 0.4, 0.6, 0.5, 0.5]],
            "good": [[0.1, 0.1, 0.2, 0.1, 0.2], [0.3, 0.3, 0.2, 0.1, 0.2]],
            "same": [[0.2, 0.1, 0.2, 0.1, 0.2], [0.3, 0.3, 0.1, 0.1, 0.2]],
        }.items()
    }
    rows = faithfulness.compare(areas)
    assert [(row["ranking"], row["other"]) for row in rows] == [
        ("random", "good"),
        ("random", "same"),
        ("good", "same"),
    ]
    # means over the models: 0.6, 0.5, 0.5, 0.5, 0.6; 0.2, 0.2, 0.2, 0.1, 0.2; 0.25, 0.2, 0.15, 0.1, 0.2
    raw = [scipy.stats.ttest_1samp(x, 0).pvalue for x in ([0.4, 0.3, 0.3, 0.4, 0.4], [0.35, 0.3, 0.35, 0.4, 0.4])]
    assert [row["difference"] for row in rows] == pytest.approx([0.36, 0.36, 0])
    assert rows[0]["by_model"] == pytest.approx([0.4, 0.32])
    # over the models 0.4, 0.32; 0.38, 0.34; -0.02, 0.02
    least, other = [scipy.stats.ttest_1samp(x, 0).pvalue for x in ([0.38, 0.34], [0.4, 0.32])]
    over_models = [row["over_models"]["p"] for row in rows]
    assert over_models == pytest.approx([max(3 * least, 2 * other), 3 * least, 1])
    first, second = sorted(raw)
    assert sorted(row["p"] for row in rows) == pytest.approx([3 * first, max(3 * first, 2 * second), 1])
    assert rows[0]["interval"][0] > 0 and rows[2]["interval"][0] < 0 < rows[2]["interval"][1]
    row = faithfulness.compare({key: value[:, :1] for key, value in areas.items()})[0]
    assert row["interval"] is row["p"] is None


def test_an_edge_that_no_patch_covers_stays():
    images, seen = torch.ones(2, 3, 32, 32), []

    class Spy(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 2)

    order = torch.arange(25).expand(2, -1)
    faithfulness.remove_patches(Spy(), images, torch.zeros(2), order, torch.tensor([0, 6, 25]), size=6)
    assert torch.equal(seen[0], images)
    expected = images.clone()
    expected[:, :, :6, :30] = 0
    expected[:, :, 6:12, :6] = 0
    assert torch.equal(seen[1], expected)
    assert not seen[2][:, :, :30, :30].any() and seen[2][:, :, 30:].all() and seen[2][:, :, :, 30:].all()


def test_equal_scores_are_ranked_at_random():
    random = torch.Generator().manual_seed(0)
    ranking = faithfulness.rank(torch.zeros(2000, 4), random)
    assert torch.equal(ranking.sort(dim=1).values, torch.arange(4).expand(2000, -1))
    assert all(abs((ranking[:, 0] == patch).float().mean() - 0.25) < 0.05 for patch in range(4))
    assert faithfulness.rank(torch.tensor([[1.0, 3.0, 2.0]]), random).tolist() == [[1, 2, 0]]


def test_the_command_measures_all_methods_and_draws(tmp_path, digits, capsys):
    torch.manual_seed(0)
    model = VisionTransformer(hidden_size=16, num_heads=2, num_blocks=2, patch_size=8)
    nn.init.normal_(model.head.weight)
    model.save(tmp_path / "VisionTransformer.pt", **digits.metadata)
    figures = tmp_path / "figures"
    flags = ("--checkpoint", tmp_path / "VisionTransformer.pt", "--output_dir", figures)
    run_main("studies.faithfulness", *flags, "--images", 20, "--steps", 4)
    assert "| rollout |" in capsys.readouterr().out
    assert {file.name for file in figures.iterdir()} == {
        f"VisionTransformer_faithfulness.{kind}" for kind in ("png", "json")
    }
    report = json.loads((figures / "VisionTransformer_faithfulness.json").read_text(encoding="utf-8"))
    assert report["images"] == 20 and report["removed"] == [0, 4, 8, 12, 16] and report["dataset"] == "digits"
    methods = ["attention", "rollout", "relevance", "integrated gradients", "occlusion"]
    assert list(report["rankings"]) == ["random", *methods]
    assert "torch" in report["provenance"] and len(report["pairs"]) == 30

    another, finer = VisionTransformer(**model.config), VisionTransformer(**{**model.config, "patch_size": 4})
    nn.init.normal_(another.head.weight)
    another.save(tmp_path / "another.pt", **digits.metadata)
    finer.save(tmp_path / "finer.pt", **digits.metadata)
    run_main("studies.faithfulness", tmp_path / "another.pt", *flags[2:], "--images", 20, "--steps", 4)
    alone = json.loads((figures / "another_faithfulness.json").read_text(encoding="utf-8"))
    run_main("studies.faithfulness", tmp_path / "another.pt", *flags, "--images", 20, "--steps", 4)
    mean = json.loads((figures / "another_and_1_more_faithfulness.json").read_text(encoding="utf-8"))
    assert len(mean["models"]) == 2 and (figures / "another_and_1_more_faithfulness.png").exists()
    curves = [
        np.array([of["rankings"][name][kind]["accuracy"] for name in methods for kind in ("deletion", "insertion")])
        for of in (report, alone, mean)
    ]
    assert np.allclose(curves[2], (curves[0] + curves[1]) / 2) and not np.allclose(curves[0], curves[1])
    for first, second, message in (("finer", "another", "of other sizes"), ("another", "another", "given twice")):
        with pytest.raises(SystemExit):
            run_main("studies.faithfulness", tmp_path / f"{first}.pt", tmp_path / f"{second}.pt", *flags[2:])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main("studies.faithfulness", *flags, "--images", 0)
    assert "images must be at least 1" in capsys.readouterr().err
