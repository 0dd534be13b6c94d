"""Answers of saved networks for a report: those of the evaluation, asked once, kept by weights."""

import shutil

import numpy as np
import pytest

from fastkd.report.answers import Answers
from fastkd.report.collecting import collect
from fastkd.report.runs_read import read_runs
from fastkd.runs.kept_answers import keep_answers
from tests.report.fake_runs import fake_run

KEYS = ("epochs=2", "teacher.epochs=1", "baseline.lrs=0.4", "data.train_limit=100")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, program):
    folder = tmp_path_factory.mktemp("answers")
    program("-m", "fastkd.train", *KEYS, "out=runs/mine", cwd=folder)
    return folder


def kept(folder, *, ask=True, keys=()):
    runs = collect(read_runs([folder / "runs/mine"])).runs
    said = []
    (run,) = keep_answers(runs, folder / "report", keys, ask=ask, say=said.append)
    return run, said


def test_they_are_those_that_the_run_was_judged_by(trained, monkeypatch):
    monkeypatch.chdir(trained)
    run, said = kept(trained)
    assert said == []
    found = {name: Answers.read(file) for name, file in run.predictions.items()}
    summary = run.summary
    reached = {name: float((a.predicted_N == a.labels_N).mean()) for name, a in found.items()}
    assert reached == {
        "student": pytest.approx(summary["accuracy_best"]),
        "alone": pytest.approx(summary["alone"]["accuracy_best"]),
        "teacher": pytest.approx(summary["teacher"]["accuracy"]),
    }
    one = found["student"]
    assert one.top_NK.shape == one.probability_NK.shape == (1497, 5)
    assert (np.diff(one.probability_NK, axis=1) <= 0).all()
    assert one.classes == tuple("0123456789")


def test_nothing_is_asked_twice_and_without_being_told_to(trained, monkeypatch):
    monkeypatch.chdir(trained)
    shutil.rmtree(trained / "report", ignore_errors=True)
    run, said = kept(trained, ask=False)
    assert (run.predictions, said) == ({}, [])
    first, _ = kept(trained)
    monkeypatch.setattr("fastkd.runs.kept_answers._ask", None)
    again, said = kept(trained)
    assert (again.predictions, said) == (first.predictions, [])
    assert kept(trained, ask=False)[0].predictions == first.predictions
    # Other images are other answers.
    assert kept(trained, ask=False, keys=["data.eval_crop=12"])[0].predictions == {}


def test_a_teacher_that_is_not_found_is_named(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs/mine", tmp_path / "runs/mine")
    monkeypatch.chdir(tmp_path)
    run, said = kept(tmp_path)
    assert set(run.predictions) == {"student", "alone"}
    (line,) = said
    assert "no answers of the teacher of quickstart: the trained teacher is not found" in line


def test_unfinished_runs_and_runs_without_weights_have_none(tmp_path):
    fake_run(tmp_path / "runs/mine", values=[0.5])
    run, said = kept(tmp_path)
    assert (run.predictions, said) == ({}, [])


def test_last_layers_are_those_of_the_worst_classes(trained, monkeypatch):
    from fastkd.models.registry import model_from_file
    from fastkd.runs.activations import CLASSES, keep_activations
    from fastkd.teachers.parts import last_linear

    monkeypatch.chdir(trained)
    run, _ = kept(trained)
    said = []
    (shown,) = keep_activations([run], trained / "report", (), ask=True, say=said.append)
    assert said == []
    with np.load(shown.last_layers) as file:
        arrays = dict(file)
    alone = Answers.read(run.predictions["alone"])
    right = alone.predicted_N == alone.labels_N
    by_class = [right[alone.labels_N == label].mean() for label in range(10)]
    classes = arrays["classes_K"].tolist()
    assert classes == np.argsort(by_class, kind="stable")[:CLASSES].tolist()
    wanted = np.isin(alone.labels_N, classes)
    assert float(arrays["alone_accuracy"]) == pytest.approx(right[wanted].mean())
    assert (arrays["labels_N"] == alone.labels_N[wanted]).all()
    # The last layer makes of them what the network has answered.
    for name, folder in (("student", run.path), ("alone", run.alone)):
        head = last_linear(model_from_file(folder))
        assert head is not None
        inputs_ND = arrays[f"{name}_ND"].astype(np.float64)
        weight, bias = (one.detach().double().numpy() for one in (head.weight, head.bias))
        logits_NC = inputs_ND @ weight.T + bias
        top_N = Answers.read(run.predictions[name]).predicted_N[wanted]
        assert (logits_NC.argmax(1) == top_N).mean() > 0.98
    assert arrays["teacher_ND"].shape == (wanted.sum(), 128)
    # Nothing is asked twice, nor without being told to.
    monkeypatch.setattr("fastkd.runs.activations._asked", None)
    (again,) = keep_activations([run], trained / "report", (), ask=False, say=said.append)
    assert (again.last_layers, said) == (shown.last_layers, [])


def test_no_t_sne_is_a_sentence_and_not_an_end(trained, monkeypatch):
    from fastkd.errors import UserError
    from fastkd.runs import activations

    monkeypatch.chdir(trained)
    run, _ = kept(trained)

    def fails(*_):
        raise UserError("the images are gone")

    monkeypatch.setattr(activations, "_asked", fails)
    said = []
    (out,) = activations.keep_activations([run], trained / "none", (), ask=True, say=said.append)
    assert (out.last_layers, said) == (None, ["no t-SNE of quickstart: the images are gone"])
