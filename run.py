"""Lowerbound's command line: parsing, dispatch and messages. `python run.py --help` says what it does."""

import difflib
import os
import sys
from pathlib import Path

HELP = """\
usage: python run.py [VERB] [key=value ...]

verbs
  train [key=value ...]         train, evaluate and report (the default verb)
  train -m [key=a,b ...]        a grid: every combination, in one table with errors over seeds
  evaluate RUN [key=value ...]  score a run again: evaluation.particles=5000, say
  sample RUN [COUNT]            draw from a trained model into RUN/samples.npz, images also into samples.png
  resume RUN                    continue a run that was stopped, to the same end
  report RUN                    draw a run's pictures and page again
  compare RUN RUN [RUN ...]     runs beside each other on the same held-out data: rate, information, paired fit
  study NAME [key=value ...]    answer a question by several runs: study.* options, others as for train
  list                          every data set, model, prior, likelihood, guide, objective, inference, net, optimizer

parts, each chosen by a word (or an import path): data model prior tokens likelihood guide objective inference encoder
decoder optimizer; inference=em fits a model by EM instead of by gradient steps
options of a part are its constructor's parameters: objective.particles=50, encoder.hidden=[300,300]
others: run.dir seed device threads data.root data.batch_size trainer.* evaluation.* experiment=RECIPE

examples
  python run.py
  python run.py train data=mnist data.root=DIR model.latent_dim=2 trainer.epochs=30
  python run.py train guide=diagonal objective=iwae objective.particles=50 seed=1 run.dir=runs/iwae

exit status: 0 done, 1 the run failed (what it had is kept), 2 a bad option, 130 or 143 stopped by a signal
"""
VERBS = ("train", "evaluate", "sample", "resume", "report", "compare", "study", "list")


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(HELP, end="")
        return 0
    verb, rest = _verb(arguments)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail(2, f"{verb!r} is neither a verb ({', '.join(VERBS)}) nor key=value{hint}; see run.py --help")
    from inference.signals import Interrupted, how_to_resume, ignored, raised

    try:
        with raised():
            return _guarded(verb, rest)
    except Interrupted as stop:
        with ignored():
            again = f". {how_to_resume(rest[0])}" if verb == "resume" and rest else ""
            return _fail(128 + stop.signum, str(stop) + again)


def _guarded(verb: str, arguments: list[str]) -> int:
    """Dispatch, with a message and a status for everything that can be expected to go wrong."""
    from inference.signals import deferred

    with deferred() as pending:  # a library is imported whole or not at all
        from inference import experiment  # noqa: F401
        from inference.ascent import EMError
        from inference.checkpoint import CheckpointError
        from inference.config import ConfigError
        from inference.data import DataError
        from inference.failures import out_of_memory
        from inference.grid import GridError
        from inference.parameters import keep_in_modules
        from inference.particles import StructureError
        from inference.trainer import Diverged
    pending.deliver()
    keep_in_modules()
    try:
        return _dispatch(verb, arguments)
    except (ConfigError, DataError, StructureError) as error:
        return _fail(2, str(error))
    except (CheckpointError, Diverged, EMError, GridError) as error:
        return _fail(1, str(error))
    except BrokenPipeError:  # whoever read our output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(1, f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(1, "out of memory; try a smaller data.batch_size or smaller nets, or data.resident=no")


def _verb(arguments: list[str]) -> tuple[str, list[str]]:
    if not arguments or "=" in arguments[0] or arguments[0] in ("-m", "--multirun"):
        return "train", arguments
    return arguments[0], arguments[1:]


def _dispatch(verb: str, arguments: list[str]) -> int:
    from inference import experiment
    from inference.config import ConfigError
    from inference.console import Console

    if verb == "list":
        if arguments:
            raise ConfigError(f"list takes nothing, got {arguments[0]!r}")
        _list()
        return 0
    if verb == "train":
        _train(arguments)
        return 0
    if verb in ("study", "compare"):
        from inference.compare import compare
        from inference.studies import run_study

        (run_study if verb == "study" else compare)(arguments, Console())
        return 0
    if not arguments or ("=" in arguments[0] and not Path(arguments[0]).is_dir()):
        raise ConfigError(f"{verb} needs the directory of a run: python run.py {verb} RUN")
    folder, options = Path(arguments[0]), arguments[1:]
    if verb == "evaluate":
        experiment.reevaluate(folder, options, Console())
    elif verb == "sample":
        count = options.pop(0) if options and "=" not in options[0] else "100"
        if not count.isdecimal():
            raise ConfigError(f"sample takes a number of samples, got {count!r}")
        print(experiment.sample(folder, int(count), options))
    elif options:
        raise ConfigError(f"{verb} takes the directory of a run and nothing else, got {options[0]!r}")
    elif verb == "resume":
        experiment.resume(folder, Console())
    else:
        print(experiment.report(folder, Console()))
    return 0


def _train(arguments: list[str]) -> None:
    from inference import experiment
    from inference.config import load
    from inference.console import Console
    from inference.grid import grid

    options = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if len(options) < len(arguments):
        grid(options, Console())
    else:
        experiment.train(load(options), Console())


def _list() -> None:
    from inference.catalog import CATALOG, DEFAULTS, OBJECTIVES, describe
    from inference.studies import STUDIES

    for group, words in CATALOG.items():
        print(f"{group}")
        for word, factory in words.items():
            default = " (default)" if DEFAULTS.get(group) == word else ""
            guides = [guide for guide, objective in OBJECTIVES.items() if group == "objective" and objective == word]
            of_guides = f" Default with guide={', '.join(guides)}." if guides else ""
            print(f"  {word + default:<28} {describe(factory)}{of_guides}")
    print("study")
    for word, (_, run) in STUDIES.items():
        print(f"  {word:<28} {describe(run)}")


def _fail(status: int, message: str) -> int:
    from inference.console import complain

    complain(message)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
