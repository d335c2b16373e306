"""The stability-plasticity analysis: its mathematics, its numbers on runs, its page, and what it refuses."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pages import HOSTILE, Page, assert_no_missing_value_text, assert_self_contained, full_results, write_run
from test_cli import recipe, write_recipe  # noqa: F401

from hf_pm import UserError
from hf_pm.cli import _loader, main
from hf_pm.config import parse_recipe
from hf_pm.hub.releases import Releases
from hf_pm.loading import build_trainer
from hf_pm.metrics.representations import fit_probe, linear_cka
from hf_pm.report.analysis import format_analysis
from hf_pm.report.page import render_report, write_report
from hf_pm.runs.analysis import STRENGTH, analyze
from hf_pm.runs.doctor import examine
from hf_pm.store.results import scores_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- CKA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(30, 7), (7, 30)])
def test_cka_is_the_quotient_of_its_definition(rows, width):
    X = draw(rows, width) + 5
    Y = X[:, :3] @ draw(3, width + 2, seed=1) + draw(rows, width + 2, seed=2) - 3
    # By columns, as it is printed; the code works with Gram matrices.
    a, b = X - X.mean(0), Y - Y.mean(0)
    expected = (b.T @ a).square().sum() / ((a.T @ a).square().sum() * (b.T @ b).square().sum()).sqrt()
    assert linear_cka(X, Y) == pytest.approx(expected.item(), rel=1e-10) and 0.05 < expected < 0.95
    assert linear_cka(Y, X) == pytest.approx(linear_cka(X, Y), rel=1e-12)


def test_cka_sees_neither_a_rotation_nor_a_scale_nor_a_shift():
    X = draw(40, 12)
    rotation = torch.linalg.qr(draw(12, 12, seed=1)).Q
    assert linear_cka(X, X) == pytest.approx(1, abs=1e-12)
    assert linear_cka(X, -3 * X @ rotation + 7) == pytest.approx(1, abs=1e-12)
    # Another scale for some columns is another matter.
    assert linear_cka(X, X * torch.linspace(0.01, 3, 12)) < 0.95


def test_cka_of_what_does_not_vary_is_not_defined():
    X, constant = draw(9, 4), torch.full((9, 4), 0.1, dtype=torch.float64)  # whose mean is not 0.1 in floats
    assert linear_cka(X, constant) is None and linear_cka(constant, X) is None
    with pytest.raises(ValueError, match="have 9 and 8 rows"):
        linear_cka(X, X[:8])


# ---- The probe ------------------------------------------------------------------------------------------------------


def newton_probe(features, labels, classes, strength):
    """The same minimum by Newton's method with the Hessian written out row by row: (features + 1, classes)."""
    scale = [value if value > 0 else 1.0 for value in features.std(0, correction=0).tolist()]
    scale = torch.tensor(scale, dtype=torch.float64)
    inputs = torch.cat([(features - features.mean(0)) / scale, torch.ones(len(features), 1)], 1).double()
    size = inputs.shape[1] * classes
    weights = torch.zeros(size, dtype=torch.float64)
    for _ in range(30):
        gradient, hessian = strength * weights, strength * torch.eye(size, dtype=torch.float64)
        for x, label in zip(inputs, labels.tolist(), strict=True):
            p = (x @ weights.view(-1, classes)).softmax(0)
            off = p - torch.nn.functional.one_hot(torch.tensor(label), classes)
            gradient = gradient + torch.outer(x, off).flatten() / len(inputs)
            hessian = hessian + torch.kron(torch.outer(x, x), torch.diag(p) - torch.outer(p, p)) / len(inputs)
        weights = weights - torch.linalg.solve(hessian, gradient)
    return weights.view(-1, classes)


@pytest.mark.parametrize("strength", [1e-3, 0.3])
def test_the_probe_is_newtons(strength):
    features = draw(40, 5) * torch.tensor([1.0, 100, 0.01, 1, 0]) + 3  # of many scales, one of them constant
    labels = (features[:, 0] > 3).long() + (features[:, 2] > 3.002).long()
    probe = fit_probe(features, labels, 4, strength)  # the fourth class has no row
    expected = newton_probe(features, labels, 4, strength)
    assert torch.allclose(torch.cat([probe.weight, probe.bias[None]]), expected, atol=2e-7 / strength)
    inputs = torch.cat([(features - features.mean(0)) / probe.scale, torch.ones(40, 1)], 1)
    assert torch.equal(probe.predict(features), (inputs @ expected).argmax(1))
    assert 3 not in probe.predict(draw(200, 5, seed=5) * 50)
    again = fit_probe(features, labels, 4, strength)
    assert torch.equal(again.weight, probe.weight) and torch.equal(again.bias, probe.bias)


def test_a_probe_needs_rows_and_a_penalty():
    for features, strength in ((draw(0, 3), 0.1), (draw(3, 3), 0.0)):
        with pytest.raises(ValueError, match="needs examples and a positive strength"):
            fit_probe(features, torch.zeros(len(features), dtype=torch.long), 2, strength)


# ---- On a run -------------------------------------------------------------------------------------------------------


def finished(path, values, **changes):
    """A run of the recipe; its folder."""
    path.write_text(yaml.safe_dump(values | {"method": "sequential", "release": "none"} | changes))
    assert main(["run", str(path)]) == 0
    return Path(values["output_dir"])


def files_of(run):
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in run.rglob("*")
        if file.is_file() and file.name not in ("analysis.json", "report.html")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A run folder that no test writes to."""
    torch.set_num_threads(1)
    path, values = write_recipe(tmp_path_factory.mktemp("trained"), tokenizer)
    return finished(path, values)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it; its recipe, model and data stay where they are."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def changed(run, name, **changes):
    """The run with other content of one of its JSON files."""
    record = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(record | changes))
    return run


def without_options(*names):
    """A `load` whose tasks of these names have free text for an answer."""

    def load(settings):
        trainer = _loader([])(settings)
        for task in trainer.stream:
            if task.name in names:
                task.options = None
        return trainer

    return load


def explicit_features(trainer, run, number, task, split):
    """By one unpadded forward pass a row: the last hidden state of the prompt, in the model after `number` tasks."""
    Releases.open(run).folder.into_model(trainer.model, number)
    rows = (trainer.rows.train if split == "train" else trainer.rows.test_rows)[task]
    found = []
    for encoded in trainer.encoder.encode(trainer.stream[task], rows):
        prompt = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == -100]
        with torch.no_grad():
            output = trainer.model.eval()(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        found.append(output.hidden_states[-1][0, -1])
    return torch.stack(found), rows["label"][:]


def test_the_analysis_of_a_run(run, trained, capsys):
    before = files_of(run)
    assert main(["report", str(run), "--analysis"]) == 0
    said = capsys.readouterr().out
    assert files_of(run) == before
    assert all(finding.problem is None for finding in examine(str(run)))
    found, results = (json.loads((run / f"{name}.json").read_text()) for name in ("analysis", "results"))
    assert found["stages"] == ["base", "colour", "mood"] and found["classes"] == 6 and found["left_out"] == {}
    assert found["head"] == [results["base_row"], [*results["matrix"][0], None], results["matrix"][1]]
    for t in range(3):
        for j in range(2):
            head = found["head"][t][j]
            assert found["gap"][t][j] == (None if head is None else found["probe"][t][j] - head)
    # The last model by hand.
    words = ["--output_dir", str(run.parent / "elsewhere")]
    trainer = build_trainer(parse_recipe(trained.parent / "recipe.yaml", words))
    answers = ["blue", "green", "red", "calm", "happy", "sad"]
    train, labels = zip(*(explicit_features(trainer, run, 2, task, "train") for task in (0, 1)), strict=True)
    numbers = torch.tensor([answers.index(label) for part in labels for label in part])
    probe = fit_probe(torch.cat(train), numbers, 6, STRENGTH)
    for task in (0, 1):
        features, right = explicit_features(trainer, run, 2, task, "test")
        share = (probe.predict(features) == torch.tensor([answers.index(label) for label in right])).double().mean()
        assert found["probe"][2][task] == pytest.approx(share.item())
    base = explicit_features(trainer, run, 0, 0, "train")[0]
    assert found["cka"][0][2] == pytest.approx(linear_cka(base, train[0]), abs=1e-4) and found["cka"][0][2] < 0.999
    assert [found["cka"][t][t] for t in range(3)] == pytest.approx([1, 1, 1])
    # On the page and on the terminal.
    page = Page((run / "report.html").read_text())
    assert [row[0] for row in page.table("probes")[1:]] == ["1: colour", "2: mood"]
    assert page.table("cka")[3][0] == "after 2: mood" and page.table("cka")[1][1] == "1.000"
    assert "after 2: mood" in said and said.splitlines()[-1] == str(run / "report.html")
    # It stays on the page that is written without it, until the run has other scores.
    write_report(run)
    assert 'id="features"' in (run / "report.html").read_text()
    results["matrix"][1][0] = 0.123
    (run / "results.json").write_text(json.dumps(results))
    assert 'id="features"' not in write_report(run).read_text()


def test_a_model_that_never_moves_has_flat_curves(run, capsys):
    """Of every update nothing is kept: the base after every task."""
    entries = json.loads((run / "ledger.json").read_text())["entries"]
    changed(run, "ledger.json", entries=[entry | {"coefficient": 0.0} for entry in entries])
    assert main(["report", str(run), "--analysis", "--analysis_rows", "10"]) == 0
    found = json.loads((run / "analysis.json").read_text())
    assert found["rows"] == {"train": [10, 10], "test": [10, 10]}
    assert found["probe"][0] == found["probe"][1] == found["probe"][2]
    assert all(value == pytest.approx(1, abs=1e-9) for row in found["cka"] for value in row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "pm"},
        {"method": "ties"},
        {"method": "smile"},
        {"method": "single"},
        {"method": "joint"},
        {"method": "seq-lora"},
    ],
    ids=str,
)
def test_every_kind_of_payload_is_analyzed_as_it_was_scored(changes, recipe, capsys):  # noqa: F811
    """The models are those of the run: their own heads, read off the same pass, answer as results.json says."""
    run = finished(*recipe, **changes)
    assert main(["report", str(run), "--analysis"]) == 0
    found, results = (json.loads((run / f"{name}.json").read_text()) for name in ("analysis", "results"))
    stages = 1 if changes["method"] == "joint" else 2
    assert len(found["stages"]) == stages + 1
    assert found["head"][-1][1] == results["matrix"][-1][1]
    if changes["method"] == "single":
        assert found["head"][2][0] is None and found["gap"][2][0] is None
    assert all(0 <= score <= 1 for row in found["probe"] for score in row)


@pytest.mark.slow
def test_an_encoder_decoder_is_analyzed(recipe, tmp_path, seq2seq_tokenizer, capsys):  # noqa: F811
    from conftest import build

    build("t5").save_pretrained(tmp_path / "t5")
    seq2seq_tokenizer.save_pretrained(tmp_path / "t5")
    run = finished(*recipe, model_name_or_path="t5", task_type="SEQ_2_SEQ_LM")
    assert main(["report", str(run), "--analysis"]) == 0
    found = json.loads((run / "analysis.json").read_text())
    assert found["features"] == 16 and found["probe"][2][1] is not None


def test_a_task_without_options_is_left_out_with_a_note(run):
    found = analyze(run, without_options("colour"), rows=10)
    assert found == json.loads((run / "analysis.json").read_text())
    assert [row[0] for row in found["probe"]] == [None] * 3 and found["probe"][2][1] is not None
    assert found["classes"] == 3 and len(found["cka"]) == 3 and found["cka"][0][2] < 0.999
    page = Page(write_report(run).read_text())
    assert len(page.table("probes")) == 2 and "colour is left out: it has no options" in page.visible
    assert "colour is left out" in format_analysis(found)
    assert_no_missing_value_text(page)


def refused(words, capsys):
    assert main(["report", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("hf-pm: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--analysis", "--analysis_rows", "1"], "`analysis_rows` must be at least 2, but got 1"),
        (["--analysis_rows", "9"], "`--analysis_rows` belongs to `--analysis`"),
        (["--base", "x"], "`--base` belongs to `--analysis`"),
        (["--data_dir", "x"], "Unexpected argument '--data_dir'"),
        (["--analysis", "--lora_rank", "2"], "'lora_rank'"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, message, run, capsys):
    before = files_of(run)
    assert message in refused([run, *words], capsys)
    assert files_of(run) == before and not (run / "analysis.json").exists()


def test_a_run_that_is_not_finished_is_refused(run, capsys):
    results, ledger = (json.loads((run / name).read_text()) for name in ("results.json", "ledger.json"))
    changed(run, "results.json", matrix=results["matrix"][:1])
    changed(run, "ledger.json", entries=ledger["entries"][:1])
    assert "has learned 1 of 2 tasks, and only a finished run is analyzed" in refused([run, "--analysis"], capsys)


def test_a_classifier_is_refused(run, capsys):
    changed(run, "release.json", task_type="SEQ_CLS")
    assert "trains classification heads" in refused([run, "--analysis"], capsys)


def test_a_run_started_from_python_is_refused(run, capsys):
    settings = json.loads((run / "run.json").read_text())["recipe"]
    changed(run, "run.json", recipe={key: value for key, value in settings.items() if key != "tasks"})
    assert "was started from Python" in refused([run, "--analysis"], capsys)


def test_other_data_are_refused(run, capsys):
    settings = json.loads((run / "run.json").read_text())["recipe"]
    own = run.parent / "fewer.jsonl"
    own.write_text("".join(Path(settings["tasks"][0]["train"]).read_text().splitlines(keepends=True)[1:]))
    settings["tasks"][0]["train"] = str(own)
    changed(run, "run.json", recipe=settings)
    assert "are no longer those that" in refused([run, "--analysis"], capsys)
    assert not (run / "analysis.json").exists()


def test_a_stream_of_free_text_is_refused(run):
    with pytest.raises(UserError, match=r"None of the tasks \['colour', 'mood'\] has `options`"):
        analyze(run, without_options("colour", "mood"))


# ---- On the page ----------------------------------------------------------------------------------------------------


def analysis_of(results, **changes):
    stages = ["base", *results["tasks"][: len(results["matrix"])]]
    T, n = len(results["tasks"]), len(stages)
    head = [results["base_row"], *([*row, *[None] * (T - len(row))] for row in results["matrix"])]
    probe = [[0.1 * t + 0.05 * j for j in range(T)] for t in range(n)]
    gap = [[None if head[t][j] is None else probe[t][j] - head[t][j] for j in range(T)] for t in range(n)]
    return {
        "schema": 1, "tasks": results["tasks"], "stages": stages, "probe": probe, "head": head, "gap": gap,
        "cka": [[1 - 0.1 * abs(s - t) for s in range(n)] for t in range(n)], "classes": 9, "features": 16,
        "rows": {"train": [200, 57, 200], "test": [100] * 3}, "strength": 0.01, "left_out": {},
        "of": scores_of(results),
    } | changes  # fmt: skip


def test_the_section_has_the_numbers():
    results = full_results()
    text = render_report(results, None, analysis_of(results))
    page = Page(text)
    assert_self_contained(text)
    assert_no_missing_value_text(page)
    assert page.table("probes") == [
        ["Task", "Probe, base", "Just learned", "Now", "Head now", "Probe − head"],
        ["1: agnews", "0.000", "0.100", "0.300", "0.750", "-0.450"],
        ["2: yelp", "0.050", "0.250", "0.350", "0.900", "-0.550"],
        ["3: amazon", "0.100", "0.400", "0.400", "0.600", "-0.200"],
    ]
    assert page.table("cka")[1] == ["base", "1.000", "0.900", "0.800", "0.700"]
    assert "57 to 200 of each" in page.visible and "scored on 100 test rows" in page.visible
    (first, *_) = page.section("features").all("figure")
    # x from 30 to 230 for 0 to 3 tasks, y from 108 (0) to 8 (1).
    (line,) = [item for item in first.all("polyline") if item.attributes["class"] == "this"]
    assert line.attributes["points"] == "30.0,108.0 96.7,98.0 163.3,88.0 230.0,78.0"
    (ring,) = first.all("circle", "ring")
    assert (ring.attributes["cx"], ring.attributes["cy"]) == ("96.7", "98.0")
    assert 'id="features"' not in render_report(results) and "Features and head" not in render_report(results)


def test_the_table_of_the_terminal():
    results = full_results()
    lines = format_analysis(analysis_of(results)).splitlines()
    assert lines[0].split() == ["probe", "/", "head", "agnews", "yelp", "amazon", "CKA", "to", "base"]
    assert lines[2].split() == ["after", "1:", "agnews", *"0.100 / 0.900 0.150 / – 0.200 / –".split(), "0.900"]
    assert lines[-1] == "The last model's probes are -0.400 against its head, on average."


def test_hostile_names_are_escaped():
    results = full_results() | {"tasks": [HOSTILE, "b", "c"], "stream": None, "cells": {}}
    text = render_report(results, None, analysis_of(results, left_out={"b": HOSTILE}))
    assert_self_contained(text)
    assert f"b is left out: {' '.join(HOSTILE.split())}." in Page(text).visible


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has not schema 1"),
        ('{"schema": 2}', "has not schema 1"),
        ('{"schema": 1, "stages": ["base"], "tasks": ["a"], "probe": [[0.5, 0.5]]}', "must hold 1 values for each"),
        ('{"schema": 1}', "must hold 0 values for each"),
    ],
)
def test_a_broken_file_is_named(content, message, tmp_path, capsys):
    run = write_run(tmp_path / "run", full_results())
    (run / "analysis.json").write_text(content)
    err = refused([run], capsys)
    assert message in err and "Delete it, or write it again with" in err
