"""The study of codes end to end, at a size that says nothing, and what it refuses."""

import json

import pytest
import torch

from inference.config import ConfigError
from inference.console import Quiet
from inference.studies import run_study
from inference.studies.codes import CodesSettings

SMALL = [
    "model.codes=8",
    "model.code_dim=4",
    "encoder.channels=4",
    "decoder.channels=4",
    "tokens=markov",
    "trainer.steps=20",
    "evaluation.data=40",
    "evaluation.surgery_data=20",
    "evaluation.draws=2",
    "evaluation.posterior_data=2",
    "trainer.validations=1",
]


def test_the_page_and_the_table(tmp_path):
    torch.set_default_dtype(torch.float32)
    own = ["study.priors=[markov,masked]", "study.conditional=markov", "study.steps=3", "study.coded=60"]
    sizes = ["study.samples=100", "study.classifier_steps=30", "study.levels=[2]", "study.data=100"]
    page = run_study(["codes", *SMALL, *own, *sizes, f"run.dir={tmp_path / 'study'}"], Quiet())
    assert "Priors over codes" in page.read_text()
    rows = json.loads((tmp_path / "study" / "table.json").read_text())
    priors = {row["prior"]: row for row in rows if row["part"] == "prior"}
    assert list(priors) == ["uniform", "markov", "masked", "markov, learnt with the codes"]
    assert priors["uniform"]["bits_per_image"] == pytest.approx(48)
    assert priors["markov"]["nats_per_grid"] < priors["uniform"]["nats_per_grid"]
    written = [row for row in rows if row["part"] == "file" and row["decoded"] is not None]
    assert written
    assert all(row["decoded"] and abs(row["excess"]) < 0.03 for row in written)
    assert {row["classifier"].split(",")[0] for row in rows if row["part"] == "classifier"} > {"real", "sampled"}
    (levels,) = (row for row in rows if row["part"] == "levels")
    assert levels["test_mse"] > 0
    assert levels["test_nats_z2"] > 0
    assert {f.name for f in (tmp_path / "study" / "figures").iterdir()} == {
        "reconstructions.png", "priors.png", "samples.png", "by_class.png"
    }  # fmt: skip


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'pixelcn' is not known; accepted: markov, masked, pixelcnn"):
        CodesSettings(priors=["pixelcn"])
    with pytest.raises(ConfigError, match="chooses model and guide itself"):
        run_study(["codes", "model=vq", f"run.dir={tmp_path}"], Quiet())
    with pytest.raises(ConfigError, match="at least 1"):
        CodesSettings(steps=0)
