"""Studies: predictions against closed forms and samples, trainings that are kept, resumed and compared."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import dagpath
from dagpath import study
from dagpath.study import training
from dagpath.study.runs import TrainingStudy


@pytest.mark.parametrize("scheme", study.SCHEMES)
@pytest.mark.parametrize("layer", [nn.Linear(40, 90), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3, groups=4)])
def test_second_moments_are_those_of_drawn_parameters(scheme, layer):
    moments = study.second_moments(layer, scheme, gain=1.5)
    draws = [study.initialize_(layer, scheme, 1.5, seed) and _squares(layer) for seed in range(200)]
    for name, moment in moments.items():
        found = statistics.fmean(draw[name] for draw in draws)
        assert found == pytest.approx(float(moment.mean()), rel=0.05), name


def _squares(layer):
    return {name: float(parameter.detach().double().square().mean()) for name, parameter in layer.named_parameters()}


def test_the_default_scheme_is_that_of_the_layers():
    for build in (lambda: nn.Linear(50, 80), lambda: nn.Conv2d(6, 8, 3, groups=2)):
        torch.manual_seed(0)
        fresh = build()
        drawn = build()
        torch.manual_seed(0)
        study.initialize_(drawn)
        for a, b in zip(fresh.parameters(), drawn.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_seed_leaves_the_global_generator_alone():
    net = study.mlp(4, 8, 2)
    state = torch.get_rng_state()
    study.initialize_(net, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_that_no_scheme_draws_have_their_mean_square():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    moments = study.second_moments(net)
    assert (moments["1.weight"] == 1).all()
    assert (moments["1.bias"] == 0).all()


@pytest.mark.parametrize("scheme", study.SCHEMES)
@pytest.mark.parametrize("widths", [(64, 64, 64, 64), (30, 200, 7, 90, 12), (5, 1, 3)])
def test_the_prediction_of_a_perceptron_is_the_closed_form(scheme, widths):
    effect = study.predict(lambda: study.mlp(*widths, bias=False), torch.zeros(1, widths[0]), scheme, gain=0.7)
    expected = study.mlp_log_scales(widths, scheme, gain=0.7)
    np.testing.assert_allclose(list(effect.layers.values()), expected, atol=1e-7)
    after = effect.condition[1]
    assert after == pytest.approx(1.0, abs=1e-6)  # all elements have the same expected entry


def test_a_deep_prediction_stays_in_range():
    widths = [64] * 60
    effect = study.predict(lambda: study.mlp(*widths, bias=False), torch.zeros(1, 64), gain=1e-12)
    np.testing.assert_allclose(list(effect.layers.values()), np.zeros(58), atol=1e-6)


NETWORKS = {
    "constant": (lambda: study.mlp(64, 64, 64, 64), (1, 64)),
    "narrowing": (lambda: study.mlp(64, 256, 128, 64, 64), (1, 64)),
    "convolutional": (lambda: study.cnn(3, 64, 96, 64), (1, 3, 8, 8)),
}


@pytest.mark.parametrize("scheme", ["default", "kaiming"])
@pytest.mark.parametrize("gain", [0.5, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_prediction_is_the_mean_over_samples(name, gain, scheme):
    build, shape = NETWORKS[name]
    found = study.initialization({name: (build, torch.zeros(shape))}, [gain], 20, [scheme], progress=False)
    assert found.rows[0].error < 0.05


def test_constant_width_and_large_gain_leave_nothing_to_do():
    builds = {
        "constant": (lambda: study.mlp(64, 64, 64, 64, 64), torch.zeros(1, 64)),
        "varying": (lambda: study.mlp(256, 64, 256, 64, 256), torch.zeros(1, 256)),
    }
    found = study.initialization(builds, [0.25, 4.0], 3, ["kaiming"], progress=False)
    spread = {(row.architecture, row.gain): row.predicted.spread for row in found.rows}
    assert spread["constant", 4.0] < 0.01
    assert spread["constant", 0.25] > 5 * spread["constant", 4.0]
    assert spread["varying", 4.0] > 10 * spread["constant", 4.0]


def test_seeds_decide_what_a_model_draws_by_itself():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) * self.scale)

    builds = {"a": (Scaled, torch.zeros(1, 4))}
    state = torch.get_rng_state()
    found = study.initialization(builds, [1.0], [3, 4], progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert study.initialization(builds, [1.0], [3, 4], progress=False) == found
    assert found.rows[0].sampled[0] != found.rows[0].sampled[1]


def test_an_initialization_study_is_printed_and_kept(tmp_path):
    builds = {"a": (lambda: study.mlp(8, 16, 4), torch.zeros(1, 8))}
    found = study.initialization(builds, [1.0, 2.0], range(3), progress=False)
    assert str(found).count("\n") == 3
    found.to_csv(tmp_path / "study.csv")
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 3
    again = study.InitializationStudy.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert found.rows[0].predicted.rescaling.converged
    assert "mean log λ" in str(found.rows[0].predicted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: study.predict(b, torch.zeros(1, 4), "he"), "scheme must be one of 'default', .* got 'he'"),
        (lambda b: study.predict(b, torch.zeros(1, 4), gain=0.0), "gain must be positive and finite, got 0.0"),
        (lambda b: study.predict(b, torch.zeros(1, 4), moments={"x": 1.0}), "moments names 'x'"),
        (lambda b: study.initialization({}), "there is nothing to compare"),
        (lambda b: study.initialization({"a": (b, torch.zeros(1, 4))}, schemes=["he"]), "scheme must be one of"),
        (lambda b: study.mlp_log_scales([4]), r"widths must be two or more positive numbers, got \[4\]"),
    ],
)
def test_bad_studies_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda: study.mlp(4, 8, 2))


# -- training ----------------------------------------------------------------------------------------------------------


def run_all(path, **options):
    return study.train(
        path,
        **{"tasks": ["autoencoder"], "methods": ["baseline", "path conditioning"], "learning_rates": [0.5]}
        | {"seeds": 2, "epochs": 2, "n_jobs": 1, "progress": False}
        | options,
    )


def without_seconds(runs):
    return sorted(({**run, "seconds": 0} for run in runs), key=str)


def test_the_smoke_study_runs_every_task_and_method(tmp_path):
    found = study.train(tmp_path / "runs.jsonl", learning_rates=[0.05], seeds=1, epochs=1, n_jobs=2, progress=False)
    assert len(found.runs) == len(study.TASKS) * len(study.METHODS)
    for task in study.TASKS:
        starts = {method: found.curves(task, method, 0.05)[0][0] for method in ("baseline", "path conditioning")}
        assert starts["path conditioning"] == pytest.approx(starts["baseline"], rel=1e-4)  # the same function
    assert all(name in str(found) for name in (*study.TASKS, *study.METHODS))
    assert "p" in found.comparison_table()


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch):
    path, whole = tmp_path / "runs.jsonl", tmp_path / "whole.jsonl"
    expected = run_all(whole)
    run, ran = training._run, []

    def interrupted(facts, task, method):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(facts)
        return run(facts, task, method)

    monkeypatch.setattr(training, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(path)
    kept = path.read_bytes()
    assert kept.count(b"\n") == 2
    path.write_bytes(kept + b'{"task": "autoen')  # killed while it wrote
    again = []
    monkeypatch.setattr(training, "_run", lambda *args: again.append(args) or run(*args))
    found = run_all(path)
    assert len(again) == 2
    assert without_seconds(found.runs) == without_seconds(expected.runs)
    assert path.read_bytes().startswith(kept)
    assert without_seconds(study.load(path).runs) == without_seconds(expected.runs)


def test_a_run_that_two_studies_wrote_counts_once(tmp_path):
    path = tmp_path / "runs.jsonl"
    run_all(path)
    path.write_bytes(2 * path.read_bytes())
    assert len(study.load(path).runs) == 4


def test_a_wider_study_runs_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    run_all(path)
    run, ran = training._run, []
    monkeypatch.setattr(training, "_run", lambda *args: ran.append(args[0]) or run(*args))
    found = run_all(path, seeds=3)
    assert {facts["seed"] for facts in ran} == {2}
    assert len(found.runs) == 6
    assert len(run_all(path, seeds=[1]).runs) == 2
    assert len(ran) == 2


def test_runs_do_not_depend_on_the_number_of_processes_nor_disturb_the_caller(tmp_path):
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    one = run_all(tmp_path / "one.jsonl")
    two = run_all(tmp_path / "two.jsonl", n_jobs=2)
    assert without_seconds(one.runs) == without_seconds(two.runs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_run_is_the_training_that_it_says(tmp_path):
    found = run_all(tmp_path / "runs.jsonl", seeds=1)
    torch.manual_seed(0)
    x = study.TASKS["autoencoder"].data()[0]
    model = study.mlp(64, 128, 32, 8, 32, 128, 64)
    dagpath.balance(dagpath.trace(model, x[:1])).apply_()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    batches = torch.Generator().manual_seed(0)
    losses = [float(nn.functional.mse_loss(model(x), x).detach())]
    for _ in range(2):
        for batch in torch.randperm(len(x), generator=batches).split(64):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[batch]), x[batch]).backward()
            optimizer.step()
        losses.append(float(nn.functional.mse_loss(model(x), x).detach()))
    curve = found.curves("autoencoder", "path conditioning", 0.5)[0]
    np.testing.assert_allclose(curve, losses, rtol=1e-3)


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path):
    found = run_all(tmp_path / "runs.jsonl", learning_rates=[1e12], seeds=1, methods=["baseline"])
    assert found.runs[0]["losses"][1:] == [None, None]
    assert found.runs[0]["error"] in ("the loss is nan", "the loss is inf")
    assert found.final_losses("autoencoder", "baseline", 1e12) == {0: math.inf}
    assert "inf" in str(found)


def made(losses):
    """A study of one task and learning rate, from method -> seed -> losses."""
    facts = {"task": "t", "lr": 0.1, "epochs": 3, "batch_size": 1, "seconds": 0.0, "versions": {}}
    return TrainingStudy(
        [
            {**facts, "method": method, "seed": seed, "losses": curve}
            for method, curves in losses.items()
            for seed, curve in enumerate(curves)
        ]
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_comparison_can_show_either(sign):
    generator = np.random.default_rng(0)
    curves = np.exp(-np.arange(4) + 0.01 * generator.normal(size=(8, 4)))
    better = np.exp(-1.8 * np.arange(4) + 0.01 * generator.normal(size=(8, 4)))
    ours, theirs = (better, curves) if sign == 1 else (curves, better)
    [found] = made({"path conditioning": ours.tolist(), "baseline": theirs.tolist()}).compare()
    assert found.lower == ((8, 0) if sign == 1 else (0, 8))
    assert found.p_value == pytest.approx(stats.wilcoxon(ours[:, -1], theirs[:, -1]).pvalue)
    assert found.p_value < 0.01
    assert found.losses == (np.median(ours[:, -1]), np.median(theirs[:, -1]))
    assert (found.epochs[0] < found.epochs[1]) == (sign == 1)


def test_runs_that_diverge_are_the_worst():
    [found] = made(
        {
            "path conditioning": [[1.0, None, None, None]] * 3 + [[1, 0.5, 0.4, 0.3]],
            "baseline": [[1, 0.9, 0.8, 0.7]] * 4,
        }
    ).compare()
    assert found.lower == (1, 3)
    assert found.losses[0] == math.inf
    assert found.epochs == (math.inf, 3)
    same = made({"path conditioning": [[1, 0.5, 0.4, 0.3]], "baseline": [[1, 0.5, 0.4, 0.3]]}).compare()[0]
    assert math.isnan(same.p_value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["mnist"]}, "there is no task 'mnist'; there are 'MLP, constant width'"),
        ({"tasks": "autoencoder"}, "give the tasks as a list, got 'autoencoder'"),
        ({"methods": ["adam"]}, "there is no method 'adam'"),
        ({"learning_rates": [0.0]}, r"learning rates must be positive and finite, got 0\.0"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 2.0}, r"epochs must be an integer of at least 1, got 2\.0"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seeds": [0.5]}, r"every seed must be an integer of at least 0, got 0\.5"),
        ({"seeds": []}, "there is nothing to run"),
        ({"methods": []}, "there is nothing to run"),
        ({"learning_rates": {"autoencoder": []}}, "there is nothing to run"),
        ({"learning_rates": {"mnist": [0.1]}}, "learning_rates has none for the task 'autoencoder'"),
    ],
)
def test_bad_trainings_are_refused_before_anything_runs(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_all(tmp_path / "runs.jsonl", **options)
    assert not (tmp_path / "runs.jsonl").exists()


def test_files_that_are_no_studies_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    for content in ("to do", "to do\n", '{"task": "a"}\n', "[]\nmore"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"notes\.txt, line 1: this is no run of a study: "):
            run_all(path)
        assert path.read_text() == content
    with pytest.raises(FileNotFoundError):
        study.load(tmp_path / "nothing.jsonl")


def test_a_study_may_have_tasks_and_methods_of_its_own(tmp_path):
    tasks = {"tiny": study.Task(lambda: study.mlp(64, 8, 64), study.TASKS["autoencoder"].data, nn.functional.mse_loss)}
    methods = {"momentum": lambda model, x, lr: (model, torch.optim.SGD(model.parameters(), lr, momentum=0.9))}
    found = run_all(tmp_path / "runs.jsonl", tasks=tasks, methods=methods)
    found.to_csv(tmp_path / "runs.csv")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 3
    assert found.select(methods=["momentum"], tasks=["tiny"]).runs == found.runs


def test_seeds_and_learning_rates_may_be_any_iterables(tmp_path):
    path = tmp_path / "runs.jsonl"
    found = run_all(path, seeds=iter(np.array([1, 0, 1])), learning_rates=iter(np.array([0.5, 0.1, 0.5])), epochs=1)
    assert len(found.runs) == len(study.load(path).runs) == 8
    assert {(run["seed"], run["lr"]) for run in found.runs} == {(0, 0.1), (0, 0.5), (1, 0.1), (1, 0.5)}


def test_batch_norm_refuses_a_network_that_it_would_change():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    for net in (Functional(), nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))):
        with pytest.raises(ValueError, match='"batch norm" puts its layers before the nn'):
            study.METHODS["batch norm"](net, torch.zeros(1, 4), 0.1)


def test_files_are_read_task_by_task(tmp_path):
    data, build = study.TASKS["autoencoder"].data, study.TASKS["autoencoder"].build
    tasks = {name: study.Task(build, data, nn.functional.mse_loss) for name in ("b", "a")}
    run_all(tmp_path / "runs.jsonl", tasks=tasks, learning_rates=[0.1, 0.5], seeds=1, epochs=1)
    assert study.load(tmp_path / "runs.jsonl").settings == [("a", 0.1), ("a", 0.5), ("b", 0.1), ("b", 0.5)]


def test_runs_of_other_lengths_are_not_mixed(tmp_path):
    path = tmp_path / "runs.jsonl"
    shorter = run_all(path, epochs=1)
    run_all(path, epochs=2)
    both = study.load(path)
    with pytest.raises(ValueError, match=r"several runs of 'baseline' .* are \(1, 64\), \(2, 64\); choose with select"):
        str(both)
    assert str(both.select(epochs=1, batch_size=64)) == str(shorter)


def test_a_comparison_is_over_the_seeds_that_both_methods_have():
    runs = made({"path conditioning": [[4, 3, 2, 1]] * 2, "baseline": [[4, 3, 3, 3], [4, 4, 4, 4], [9] * 4, [9] * 4]})
    [found] = runs.compare()
    assert (found.losses, found.target) == ((1, 3.5), 4)
    assert (found.lower, found.faster) == ((2, 0), (0, 0))
    apart = TrainingStudy([run for run in runs.runs if (run["method"] == "baseline") == (run["seed"] > 1)])
    assert apart.compare() == []
    with pytest.raises(ValueError, match="there is no run of 'adam'; there are 'path conditioning', 'baseline'"):
        runs.compare("adam")


def test_differences_are_found_for_losses_of_any_sign():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 9, 4))
    ours[0, -1] = 0.0
    [found] = made({"path conditioning": ours.tolist(), "baseline": theirs.tolist()}).compare()
    assert found.p_value == pytest.approx(stats.wilcoxon(ours[:, -1], theirs[:, -1]).pvalue)


def test_a_reference_that_diverged_is_no_target():
    runs = made({"path conditioning": [[4, 3, 2, 1]] * 3, "baseline": [[4, None, None, None]] * 3})
    [found] = runs.compare()
    assert found.lower == (3, 0)
    assert math.isnan(found.epochs[0])
    assert found.faster == (0, 0)


def test_figures_show_the_methods_that_were_run():
    figures = pytest.importorskip("dagpath.study.figures")
    curve = [4, 3, 2, 1]
    runs = made({"path conditioning": [curve], "baseline": [curve]})
    other = [{**runs.runs[1], "lr": 0.5, "losses": [4, None, None, None]}]
    study_of_two = TrainingStudy([*runs.runs, *other])
    assert [line.get_label() for line in figures.loss_curves(study_of_two, "t", 0.5).lines] == ["baseline"]
    lines = figures.epochs_to_target(study_of_two, "t").lines
    np.testing.assert_array_equal(lines[0].get_ydata(), [3])
    np.testing.assert_array_equal(lines[1].get_ydata(), [3, math.nan])
    for draw in (lambda: figures.loss_curves(runs, "u", 0.1), lambda: figures.epochs_to_target(runs, "u")):
        with pytest.raises(ValueError, match="there is no run"):
            draw()
    many = made({str(number): [curve] for number in range(8)})
    with pytest.raises(ValueError, match="a figure tells 7 methods apart, got 8"):
        figures.loss_curves(many, "t", 0.1)
    linear = study.initialization({"a": (lambda: study.mlp(4, 2), torch.zeros(1, 4))}, [1.0], 2, progress=False)
    assert figures.prediction_against_samples(linear).get_xlabel()


def test_figures_return_their_axes(tmp_path):
    figures = pytest.importorskip("dagpath.study.figures")
    runs = run_all(tmp_path / "runs.jsonl")
    drawn = study.initialization({"a": (lambda: study.mlp(8, 16, 4), torch.zeros(1, 8))}, [1.0, 2.0], 2, progress=False)
    axes = [
        figures.loss_curves(runs, "autoencoder", 0.5),
        figures.epochs_to_target(runs, "autoencoder"),
        figures.heat_map(drawn, "default"),
        figures.prediction_against_samples(drawn),
    ]
    assert axes[0].get_yscale() == "log"
    assert len(axes[0].lines) == 2
    for ax in axes:
        ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="the study has no scheme 'kaiming'"):
        figures.heat_map(drawn, "kaiming")
    with pytest.raises(ValueError, match="figure must be one of 'spread'"):
        figures.heat_map(drawn, "default", "sprad")
