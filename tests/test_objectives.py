"A run with each of the peers: trained, scored, measured, told, exported."

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from test_model import refusal
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qr_rlhf import RiskMeasure, load, resume, reward_function
from qr_rlhf.figures import figure3, reliability_figure
from qr_rlhf.pipeline import (
    add_backbone,
    begin_run,
    collect_results,
    finish_run,
    metrics_table,
    score_models,
    train_models,
    verdict_markdown,
    warm_up,
)
from qr_rlhf.settings import make_settings
from qr_rlhf.size import checksum
from qr_rlhf.studies import quiet

PEERS = dict(  # objective → family of its quantiles, number of outputs, link
    free=("free", 10, "distributional"),
    purm=("normal", 2, "distributional"),
    dpl_normal=("normal", 2, None),
    dpl_categorical=("categorical", 10, None),
)
ASKED = ("Why?", ["Because.", "No idea."])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=PEERS)
def made(request, place):
    "A finished run with one of the objectives; what has no objective is made once."
    quiet()
    settings = make_settings("demo", workload="harmless", objective=request.param, **SMALL)
    run = begin_run(settings, request.param, place)
    for results in list(place.glob("*/results.json"))[:1]:
        for part in ("scratch", "warm_up", "scalar"):
            shutil.copytree(results.with_name(part), run.folder / part)
    add_backbone(run)
    warm_up(run)
    train_models(run)
    rewards = score_models(run)
    results = finish_run(run, collect_results(run, rewards), seconds=1.0)
    family, outputs, link = PEERS[request.param]
    return SimpleNamespace(**locals())


def test_a_run_takes_each_objective(made):
    assert made.results["objective"]["name"] == made.settings.objective
    assert made.results["models"]["quantile"]["crossing_rate"] == 0
    quantiles = made.rewards[made.rewards.model == "quantile"]
    assert quantiles.level.nunique() == 10 and quantiles.reward.std() > 0
    assert figure3(made.rewards, "a note").axes


def test_a_finished_model_is_taken_up_after_one_look_at_each_file(made, monkeypatch, capsys):
    looked = []

    def watched(path):
        looked.append(path)
        return checksum(path)

    monkeypatch.setattr(resume, "checksum", watched)
    train_models(made.run, processes=1)
    assert capsys.readouterr().out.count("taken up, it was finished already") == 2
    folders = made.run.folders().values()
    listed = [len(resume.read_json(f / resume.MANIFEST)["files"]) for f in folders]
    assert len(looked) == len(set(looked)) == sum(listed)
    assert (made.run.folder / "rewards.parquet").exists()


def test_its_checkpoint_says_how_its_outputs_are_read(made):
    folder = made.run.folders()["quantile", 0]
    model = load(folder, device="cpu")
    config = model.model.config
    assert (config.quantile_family, config.num_labels) == (made.family, made.outputs)
    assert len(set(config.id2label.values())) == made.outputs
    assert config.quantile_link == made.run.link() == made.link
    row = made.run.pairs["eval"][0]
    text = [made.run.tokenizer.decode(row[part]) for part in ("prompt_ids", "chosen_ids")]
    scored = model.score(text[0], [text[1].removesuffix(model.tokenizer.eos_token)])
    first = made.rewards.query("model == 'quantile' and pair == 0 and side == 'chosen'")
    assert (scored.quantiles[0] - torch.tensor(first.reward.to_numpy())).abs().max() < 1e-4
    card = (folder / "README.md").read_text()
    assert f"objective: `{made.settings.objective}`" in card and "not identified" in card


def test_a_forecast_is_judged_where_there_is_one(made):
    for name, block in made.results["models"].items():
        known = name == "scalar" or made.link is not None
        for metric in ("nll", "ece"):
            assert (metric in block) == (metric in block["intervals"]) == known
    known = made.link is not None
    assert ("nll" in made.results["difference"]) == known
    assert ("give no forecast" not in verdict_markdown(made.results, "")) == known
    card = (made.run.folders()["quantile", 0] / "README.md").read_text()
    assert ("no log-loss" not in card) == ("| log-loss" in card) == known
    figure = reliability_figure(made.rewards, "", made.link)
    lines = [text.get_text() for text in figure.axes[0].get_legend().texts]
    assert len(lines) == (3 if known else 2)
    table = metrics_table(made.results)
    assert len(table) == 11 and "nan" not in table.to_string()


def test_what_can_be_exported_is(made, tmp_path):
    model = load(made.run.folders()["quantile", 0], device="cpu")
    assert "only the mean can be folded" in refusal(model.export, tmp_path, "cvar 0.2")
    if made.family == "categorical":
        assert "not even that" in refusal(model.export, tmp_path, "mean")
    else:
        model.export(tmp_path, "mean")
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        text = "\n\nHuman: Why?\n\nAssistant: Because."
        with torch.no_grad():
            inputs = AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")
            reward = stock(**inputs).logits.item()
        assert reward == pytest.approx(model.score(*ASKED).mean()[0].item(), abs=1e-5)
    pessimistic = reward_function(model.model, model.tokenizer, RiskMeasure("cvar", 0.2))
    rewards = pessimistic([ASKED[0]] * 2, ASKED[1])
    assert rewards == pytest.approx(model.score(*ASKED).cvar(0.2).tolist())


def test_one_value_is_no_distribution():
    few = dict(objective="dpl_categorical", n_quantiles=1)
    assert "a distribution on 1 value is none" in refusal(make_settings, "demo", **few)
