"""What cannot be is refused in one line that names the key and what would be accepted, before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import SMALL, Say
from tests.forked import ROOT

OPTIONS = {  # bad arguments, and what the message has to name
    "nosuch=1": "nosuch; accepted: data, model, ; trainer, ",
    "trainer.epoch=3": "trainer.epoch; did you mean epochs?; accepted: trainer.epochs",
    "trainr.epochs=3": "trainr.epochs; did you mean trainer.epochs?",
    "guide.foo=1": "guide.foo; no options",
    "encoder.widths=[3]": "encoder.widths; accepted: encoder.hidden",
    "seed.x=3": "seed.x; did you mean seed?; accepted: data",
    "trainer=5": "trainer is a group; accepted: trainer.epochs",
    "trainer={epochs:3}": "trainer is a group; accepted: trainer.epochs",
    "batching.batch_size=3": "batching.batch_size; did you mean data.batch_size?",
    "guide._target_=os.system": "guide._target_; accepted",
    "guide=diagnal": "guide=diagnal; did you mean diagonal?; accepted; diagonal",
    "objective=iwea": "objective=iwea; did you mean iwae?; accepted; elbo, ",
    "data=mnst": "data=mnst; did you mean mnist?; accepted; digits",
    "model=ppac": "model=ppac; did you mean ppca?; accepted; composed",
    "prior=5": "prior=5; accepted; standard",
    "optimizer=null": "optimizer=None; accepted; adam",
    "encoder=[a]": "encoder=['a']; accepted; mlp",
    "experiment=nosuch": "experiment=nosuch; accepted; aevb; .yaml",
    "experiment=/nowhere/x.yaml": "experiment=/nowhere/x.yaml; no such recipe",
    "seed=abc": "seed=abc; Integer",
    "seed=1.5": "seed=1.5; Integer",
    "seed=true": "seed=True; Integer",
    "seed=null": "seed=None; not Optional",
    "seed=-1": "seed: -1; between 0 and 2^63",
    "seed=99999999999999999999": "seed: 99999999999999999999; between 0 and 2^63",
    "seed=": "seed=VALUE",
    "seed=???": "seed=???; write the value itself",
    "seed=${oc.env:HOME}": "seed=${oc.env:HOME}; write the value itself",
    "run.dir=": "run.dir=VALUE",
    "threads=-3": "threads: -3; between 0",
    "threads=100000": "threads: 100000; 1024",
    "trainer.epochs=-1": "trainer.epochs: -1; 0 or above",
    "trainer.steps=-1": "trainer.steps: -1; 0 or above",
    "trainer.epochs=1.5": "trainer.epochs=1.5; Integer",
    "trainer.learning_rate=nan": "trainer.learning_rate: nan; above 0",
    "trainer.learning_rate=inf": "trainer.learning_rate: inf; finite",
    "trainer.learning_rate=0": "trainer.learning_rate: 0.0; above 0",
    "trainer.learning_rate=fast": "trainer.learning_rate=fast; Float",
    "trainer.schedule=cosin": "trainer.schedule: 'cosin'; constant, linear, cosine, burda",
    "trainer.log_every=0": "trainer.log_every: 0; above 0",
    "trainer.validations=-1": "trainer.validations: -1; 0 or above",
    "trainer.checkpoint_seconds=nan": "trainer.checkpoint_seconds: nan; 0 or above",
    "trainer.gradient_clip=-1": "trainer.gradient_clip: -1; 0 or above",
    "data.batch_size=0": "data.batch_size: 0; below 1",
    "data.resident=maybe": "data.resident: 'maybe'; auto, yes, no",
    "data.workers=-1": "data.workers: -1; below 0",
    "data.binarization=dynamc": "data.binarization='dynamc'; accepted: dynamic, static, none",
    "model.latent_dim=0": "model.latent_dim: 0; below 1",
    "model.latent_dim=-2": "model.latent_dim: -2; below 1",
    "model=two_layer guide=bottom_up model.top_dim=0": "model.top_dim: 0; below 1",
    "encoder.hidden=5": "encoder.hidden=5; encoder.hidden=[5]",
    "encoder.hidden=[0]": "encoder=mlp; hidden must be positive",
    "decoder.hidden=[a]": "decoder.hidden=['a']; Integer",
    "encoder.hidden=[[1]]": "encoder.hidden=[[1]]; list of plain values",
    "encoder.hidden=[null]": "encoder.hidden=[None]; int",
    "encoder.activation=rleu": "encoder=mlp; 'rleu'; accepted: elu",
    "objective.particles=0": "objective.particles: 0; below 1",
    "objective.particles=many": "objective.particles=many; Integer",
    "objective=elbo objective.kl=typo": "objective=elbo; kl; 'analytic'; 'monte_carlo'",
    "objective=iwae objective.particles=2 objective.max_plate_nesting=0": "max_plate_nesting; at least 1",
    "optimizer.beta1=2": "optimizer=adam; beta",
    "optimizer.lr=3": "optimizer.lr; accepted: optimizer.beta1",
    "optimizer=sgd optimizer.momentum=-1": "optimizer=sgd; momentum",
    "evaluation.particles=0": "evaluation.particles: 0; below 1",
    "evaluation.data=-1": "evaluation.data: -1; 0 takes all",
    "evaluation.draws=no": "evaluation.draws=no; Integer",
    "+x=1": "+x=1; key=value",
    "++seed=2": "++seed=2; key=value",
    "~seed": "~seed; key=value",
    "seed=1,2": "seed=1,2; several values; -m",
    "guide=diagonal,exact": "guide=diagonal,exact; several values",
    "seed=range(1,3)": "seed=range(1,3); several values",
    "foo": "foo; key=value",
    "=3": "''; accepted",
    "seed=[1": "seed=[1; key=value",
    "seed==3": "seed==3; key=value",
    "device=cuda:99": "device=cuda:99; accepted: auto, cpu",
    "device=meta": "device=meta; accepted: auto, cpu",
    "device=tpu": "device=tpu; accepted: auto, cpu",
    "run.dir=/dev/null/x": "run.dir=/dev/null/x; Not a directory",
    "run.dir=/proc/nope": "run.dir=/proc/nope; accepted: a new directory",
    f"run.dir={'x' * 300}": "run.dir=x; File name too long",
    "data=mnist data.root=/nowhere": "data=mnist; /nowhere/MNIST; is missing; data.root; LOWERBOUND_DATA",
    "data=omniglot data.root=/nowhere": "data=omniglot; /nowhere/omniglot_28x28.npz; is missing",
    "data=file": "data; likelihood=bernoulli; gaussian",
    "data=file likelihood=gaussian": "data=file; data.path=FILE",
    "data.binarization=none likelihood=bernoulli": "data=digits; grey pixels; Bernoulli; likelihood=logistic",
    "likelihood=gaussian": "data=digits; bits; likelihood=bernoulli",
    "data=iris likelihood=logistic": "data=iris; real; likelihood=learned_gaussian",
    "data=iris likelihood=gaussian likelihood.scale=0": "likelihood=gaussian; scale; positive",
    "guide=exact": "guide=exact; closed-form posterior; model=ppca",
    "model=ppca data=iris prior=normal": "model=ppca; leave out prior",
    "model=ppca data=iris decoder=mlp prior=vamp": "model=ppca; leave out prior=... and decoder=...",
    "model=two_layer": "guide=diagonal, the default; accepted: guide=bottom_up or top_down or ladder",
    "model=vq_levels": "guide=diagonal, the default; accepted: guide=quantized_levels",
    "model=gmm_vae guide=bits": "guide=bits; accepted: guide=clustering",
    "likelihood=lstm": "likelihood=lstm; data=shakespeare",
    "guide=unconditional encoder=mlp": "guide=unconditional; leave out encoder",
    **{
        f"data={data} model={model} inference=variational_em": "guide=diagonal, the default; "
        "accepted: guide=enumerated objective=trace_enum"
        for model, data in {"gmm": "iris", "kmeans": "iris", "tabular": "digits", "latent_class": "digits"}.items()
    },
    "data=iris model=hmm inference=variational_em": "the default; accepted: inference=em without a guide; no guide by",
    "data=iris model=hmm": "the default; accepted: guide=summed_out objective=trace_enum, or inference=em",
    "guide=no.such.Thing": "guide=no.such.Thing; No module named 'no'; accepted; diagonal",
    "guide=os.nothing": "guide=os.nothing; no attribute; accepted; diagonal",
    "guide=.foo": "guide=.foo; cannot be imported; accepted; diagonal",
    "guide=math.pi": "guide=math.pi; cannot be called; accepted; diagonal",
    "guide=builtins.int": "guide=builtins.int; signature",
    "guide=builtins.print": "guide=builtins.print; NoneType; Module",
    "objective=builtins.dict": "objective=builtins.dict; signature",
    "objective=collections.Counter": "objective=collections.Counter; Counter; ELBO",
}


@pytest.mark.parametrize("arguments", OPTIONS)
def test_a_bad_option_is_named_with_what_is_accepted(arguments: str, say: Say, tmp_path: Path) -> None:
    asked = arguments.split(" ")
    keys = {argument.partition("=")[0] for argument in asked}
    other = "model" in keys and "composed" not in arguments  # a model of another kind than what SMALL is for
    nets = [a for a in SMALL if a.partition("=")[0] not in keys and not ("latent" in a and other)]
    given = [a for a in nets if "epochs" not in arguments or "steps" not in a]
    latent = ["model.latent_dim=2"] if "ppca" in arguments and "data" in keys else []
    folder = [] if "run.dir" in keys else [f"run.dir={tmp_path / 'run'}"]
    line = say("train", *given, *latent, *folder, *asked)
    for words in OPTIONS[arguments].split("; "):
        assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("net", ["encoder", "decoder"])
def test_convolutions_need_images(net: str, say: Say, tmp_path: Path) -> None:
    line = say("train", "data=iris", f"{net}=conv", f"run.dir={tmp_path / 'run'}")
    assert f"{net}=conv" in line
    assert "image" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "trian": "did you mean train?; resume",
        "resum runs/a": "did you mean resume?",
        "--verbose": "neither a verb",
        "resume": "python run.py resume RUN",
        "report a=b": "python run.py report RUN",
        "resume nowhere": "nowhere is not a run; config.yaml",
        "resume . x=1": "'x=1'",
        "evaluate nowhere": "nowhere is not a run",
        "sample nowhere": "nowhere is not a run",
        "compare nowhere nowhere": "nowhere is not a run",
        "-m seed=0,1,0": "the grid has seed=0 twice; accepted: each combination once",
        "-m seed=0,1 seed=2,3": "twice; accepted: each combination once",
        "sample . 0": "at least 1",
        "sample . few": "'few'",
        "sample . 3 model.latent_dim=3": "model.latent_dim=3; seed",
        "evaluate . trainer.epochs=3": "trainer.epochs=3; evaluation.*",
        "list x": "'x'",
        "train -m": "-m; seed=0,1,2",
        "-m seed=0": "-m; seed=0,1,2",
        "-m +seed=0,1": "+seed=0,1; key=value,value",
        "-m seed=range(3,1)": "seed=range(3,1); no value",
        "-m guide=diagnal,exact": "guide=diagnal; did you mean diagonal?",
        "-m seed=0,a": "seed=a; Integer",
        "-m seed=0,1 grid.jobs=x": "grid.jobs=x; 0 takes one per core",
        "-m seed=0,1 run.dir=/dev/null/x": "run.dir=/dev/null/x; Not a directory",
        "study nosuch": "nosuch; families",
    }.items(),
)
def test_a_bad_verb_or_argument_of_a_verb(arguments: str, words: str, say: Say) -> None:
    line = say(*arguments.split(" "))
    for word in words.split("; "):
        assert word in line


def test_the_command_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "guide=diagnal", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("lowerbound: guide=diagnal is not known; did you mean diagonal?; accepted: ")
    assert not (tmp_path / "run").exists()
