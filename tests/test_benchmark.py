"""The benchmark's times to accuracy: which seconds count, and what is stored of a run."""

import json
import re

import pytest
import torch
from helpers import batches, run_main
from torch import nn

from runner import Runner
from studies import benchmark, peers, speed_facts
from training.presets import PRESETS


class FakeTime:
    """A clock on which loading a batch takes 1 second, a step 10, validation 1000; all of it on the processor."""

    seconds = 0.0

    def perf_counter(self):
        return self.seconds

    process_time = perf_counter

    def passing(self, loader, seconds):
        for batch in loader:
            self.seconds += seconds
            yield batch


@pytest.mark.parametrize("with_loading, step", [(True, 11), (False, 10)])
def test_seconds_are_those_of_training_steps(monkeypatch, with_loading, step):
    clock = FakeTime()
    monkeypatch.setattr(peers, "time", clock)

    class Loader(list):  # 3 batches
        def __init__(self, seconds):
            super().__init__(batches())
            self.seconds = seconds

        def __iter__(self):
            return clock.passing(super().__iter__(), self.seconds)

    class Slow(Runner):
        def train_step(self, images, labels):
            clock.seconds += 10
            super().train_step(images, labels)

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    history = peers.History(with_loading)
    runner = Slow(model, torch.optim.SGD(model.parameters()), nn.CrossEntropyLoss(), "cpu", callbacks=[history])
    runner.train(Loader(1), Loader(1000), epochs=2)
    assert [row["epoch"] for row in history.rows] == [1, 2]
    for clock_name in ("wall_seconds", "cpu_seconds"):
        assert [row[clock_name] for row in history.rows] == [3 * step, 6 * step]
    assert [row["val_accuracy"] for row in history.rows] == runner.metrics["val_accuracy"]


def test_what_is_stopped_goes_on_from_the_parts_that_are_done(tmp_path, monkeypatch, capsys):
    measured, stop_at = [], "hidden_size"

    def part(name, result):
        def measure(*args):
            measured.append(name)
            if name == stop_at:
                raise KeyboardInterrupt
            return result

        return measure

    def growth(name, _threads):
        sizes = [
            {"batch_size": 128, "patch_size": 4, "hidden_size": 64, "num_blocks": 4, name: v} for v in GROWTH[name]
        ]
        return part(name, [{"varied": name, **row, "seconds": 0.1, "memory_mb": 10.0} for row in sizes])()

    GROWTH = benchmark.GROWTH
    monkeypatch.setattr(benchmark, "compare_steps", part("step", {"medians": {}}))
    monkeypatch.setattr(benchmark, "compare_memory", part("memory", {"ratio": 1.2}))
    monkeypatch.setattr(benchmark, "compare_pipeline", part("pipeline", {"ratio": 1.0}))
    monkeypatch.setattr(benchmark, "kind_of_processor", lambda: "avx2")
    monkeypatch.setattr(benchmark, "measure_growth", growth)
    with pytest.raises(SystemExit) as stop:
        run_main("studies.benchmark", "--output_dir", tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "stored: step, memory, pipeline, patch_size in" in error and "goes on" in error
    assert not list(tmp_path.glob("*.json"))
    measured.clear()
    stop_at = None
    run_main("studies.benchmark", "--output_dir", tmp_path)
    assert measured == ["hidden_size", "num_blocks", "batch_size"]
    results = json.loads((tmp_path / "benchmark_avx2.json").read_text(encoding="utf-8"))
    assert results["pipeline"] == {"ratio": 1.0} and results["memory"] == {"ratio": 1.2}
    assert len(json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["rows"]) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark_avx2.json", "cost.json", "cost.png"}
    run_main("studies.benchmark", "--output_dir", tmp_path)  # begins anew: nothing is half done
    assert measured[3:6] == ["step", "memory", "pipeline"]


def test_parts_of_other_settings_are_measured_again(tmp_path):
    config = benchmark.Config(output_dir=str(tmp_path))
    assert benchmark.run_parts(config, "a", {"x": lambda: 1}) == {"x": 1}
    assert benchmark.run_parts(config, "a", {"x": lambda: 2}) == {"x": 1}
    config.repeats += 1
    assert benchmark.run_parts(config, "a", {"x": lambda: 3}) == {"x": 3}


def test_each_run_is_stored_and_ends_where_it_should(tmp_path, monkeypatch, capsys):
    data = benchmark.synthetic_data(256)
    monkeypatch.setattr(peers, "load_data", lambda *args: data)
    monkeypatch.setattr(benchmark, "TARGET", 0.01)
    run_main("studies.benchmark", "--time_to_accuracy", "--seeds", 1, "--output_dir", tmp_path)
    for contender in ("reference", "quick"):
        report = json.loads((tmp_path / f"time_to_accuracy_{contender}_0.json").read_text(encoding="utf-8"))
        assert report["contender"] == contender and len(report["history"]) == 1
    assert "| reference | " in re.sub(" +", " ", capsys.readouterr().out)
    together = json.loads((tmp_path / "time_to_accuracy.json").read_text(encoding="utf-8"))
    assert together["reached"]["quick"] == report["history"]
    assert together["ratios"].keys() == {"wall_seconds", "cpu_seconds"}
    with pytest.raises(SystemExit):
        run_main("studies.benchmark", "--contender", "nobody", "--output_dir", tmp_path)


@pytest.mark.parametrize("flag", ["--threads", "--seeds", "--repeats", "--cct_epochs"])
def test_what_cannot_be_counted_is_refused_in_one_line(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        run_main("studies.benchmark", "--time_to_accuracy", flag, 0, "--output_dir", tmp_path)
    error = capsys.readouterr().err
    assert f"{flag[2:]} must be at least 1, not 0" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "taken"),
    [({}, True), ({"cpu": "other"}, False), ({"threads": 64}, False), ({"torch": "1.0"}, False), ({"date": "1"}, True)],
)
def test_a_history_is_taken_if_it_was_measured_under_the_same_conditions(tmp_path, changes, taken):
    path, row = tmp_path / "x.json", {"epoch": 1, "val_accuracy": 0.5, "wall_seconds": 1.0, "cpu_seconds": 1.0}
    stored = {"history": [row], "provenance": {**benchmark.provenance(), **changes}}
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert benchmark.stored_history(path) == ([row] if taken else None)


def test_a_whole_run_is_stored_beside_those_to_the_target(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "time_run", lambda *args: asked.append(args) or [{"epoch": 1}])
    run_main("studies.benchmark", "--contender", "quick", "--seed", 3, "--output_dir", tmp_path)
    (path,) = tmp_path.iterdir()
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "whole_run_quick_3.json" and (stored["contender"], stored["seed"]) == ("quick", 3)
    assert asked == [("quick", 3, 1.0, None)] and stored["history"] == [{"epoch": 1}]


def test_whole_runs_are_the_epochs_times_the_median_of_their_parts(tmp_path, monkeypatch, capsys):
    seconds = {"reference": iter([9.0, 2.0, 1.0]), "accurate": iter([4.0, 1.0, 3.0])}
    monkeypatch.setattr(benchmark, "time_run", lambda name, *args: [{"cpu_seconds": next(seconds[name])}])
    run_main("studies.benchmark", "--whole_runs", "--output_dir", tmp_path)
    stored = json.loads((tmp_path / "whole_runs.json").read_text(encoding="utf-8"))
    assert [row["whole"] for row in stored["rows"]] == [20 * 8.0, PRESETS["accurate"]["epochs"] * 12.0]
    assert "| reference | 20 | 8.0 | 160 |" in re.sub(" +", " ", capsys.readouterr().out)


def test_a_part_of_a_presets_run_is_timed(monkeypatch):
    monkeypatch.setattr(peers, "load_data", lambda *args: benchmark.synthetic_data(256))
    (row,) = peers.time_run("quick", 0, 1.0, None, 0.5)
    assert row["cpu_seconds"] > 0 and row["epoch"] == 1


def test_each_preset_is_timed_in_both_precisions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRESETS", ("default", "quick"))
    turns = {}
    monkeypatch.setattr(benchmark, "take_turns", lambda steps, _: turns.update(steps) or dict.fromkeys(steps, [0.2]))
    run_main("studies.benchmark", "--precision", "--repeats", 1, "--output_dir", tmp_path)
    (path,) = tmp_path.glob("precision_*.json")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["speed_of_bf16_over_fp32"] == {"default": 1.0, "quick": 1.0} and stored["share_of_optimizer"] == 1.0
    assert len(stored["medians"]) == 6 and stored["auto"] in ("fp32", "bf16")
    assert "| quick, bf16 " in capsys.readouterr().out
    turns["quick, fp32"](), turns["quick, bf16"]()


@pytest.mark.parametrize("low", [False, True])
def test_steps_are_timed_in_bf16_only_where_the_processor_computes_in_it(monkeypatch, low):
    monkeypatch.setattr(benchmark, "AUTO", "bf16" if low else "fp32")
    seconds = {name: [2.0] for name in ("ours, MLP ratio 4, CLS", "ours, MLP ratio 4, CLS, bf16")[: 1 + low]}
    monkeypatch.setattr(benchmark, "take_turns", lambda steps, _: {**dict.fromkeys(steps, [6.0]), **seconds})
    monkeypatch.setattr(benchmark, "count_flops", lambda _: 1e9)
    step = benchmark.compare_steps(benchmark.Config())
    assert any("bf16" in name for name in step["medians"]) == low
    rows = speed_facts.step_rows({"step": step, "provenance": benchmark.provenance()})
    assert [row["precision"] for row in rows] == (["fp32", "bf16"] if low else ["fp32"])
    assert all(row["timm"] == row["vit_pytorch"] == [3, 1] and row["ms"] == [2000, 6000] for row in rows)
    assert rows[0]["reference"] == [1, 1] and not any(row["reference"] for row in rows[1:])
    assert [row["over_timm_fp32"] for row in rows] == ([None, [3, 1]] if low else [None])


def test_what_memory_costs_is_measured_in_turns(monkeypatch):
    asked = []

    def cost(options, threads):
        asked.append(options["keep_memory"])
        return {"seconds": 1.0 if options["keep_memory"] else 1.5, "memory_mb": 100.0}

    monkeypatch.setattr(benchmark, "cost_in_a_process", cost)
    found = benchmark.compare_memory(benchmark.Config())
    assert asked == [True, False] * 5 and found["ratio"] == 1.5
