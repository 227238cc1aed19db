"""Decoders that can do without their latents, and remedies against it: words of the study collapse."""

from collections.abc import Mapping

from inference.config import ConfigError

# The more of a picture a decoder can make up by itself, the less it asks of the latent.
DECODERS: dict[str, str] = {
    "mlp": "decoder.hidden=[200]",
    "wide": "decoder.hidden=[400,400]",
    "pixelcnn_near": "likelihood=pixelcnn likelihood.channels=12 likelihood.kernel=3 likelihood.layers=1 "
    "likelihood.features=4 decoder.hidden=[50]",
    "pixelcnn": "likelihood=pixelcnn likelihood.channels=12 likelihood.kernel=7 likelihood.layers=2 "
    "likelihood.features=1 decoder=linear",
}
REMEDIES: dict[str, str] = {
    "none": "",
    "beta_half": "objective=beta objective.beta=0.5",
    "annealing": "objective=annealed objective.warmup=0.5",
    "cyclical": "objective=annealed objective.schedule=cyclical objective.warmup=0.8 objective.cycles=4",
    "free_bits": "objective=free_bits objective.nats=3 objective.group=all",
    "committed": "guide=committed guide.rate=3",
    "mmd": "objective=infovae objective.alpha=0.5 objective.scale=100",
    "aggressive": "inference=aggressive",
    "semi_amortized": "guide=semi_amortized guide.steps=1",
    "skip": "decoder=skip decoder.hidden=[50]",
    "vq": "model=vq guide=quantized objective=vq model.grid=[2,2] model.codes=16",
}
AT_ONCE = {f"objective={word}" for word in ("beta", "annealed", "free_bits", "infovae")}  # in objective=combined


def combined(remedy: str) -> list[str]:
    """The run.py words of one remedy, or of several joined by a plus; several objectives become objective=combined.

    Raises:
        ConfigError: two of them are about the same part, or the same option of one.
    """
    names = remedy.split("+") if all(name in REMEDIES for name in remedy.split("+")) else [remedy]
    words = [word for name in names for word in words_of(name, REMEDIES, "remedies")]
    objectives = [word for word in words if word.startswith("objective=")]
    if len(objectives) > 1 and set(objectives) <= AT_ONCE:
        words = ["objective=combined", *(word for word in words if word not in objectives)]
    keys = [word.partition("=")[0] for word in words]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"study.remedies: {remedy!r} says twice what {twice[0]} is; combine remedies of other parts")
    return words


def words_of(name: str, known: Mapping[str, str], option: str) -> list[str]:
    """The run.py words behind a word of this study, or the words themselves."""
    text = known.get(name, name)
    if bad := [word for word in text.split() if "=" not in word]:
        raise ConfigError(
            f"study.{option}: {bad[0]!r} is neither one of {', '.join(known)} nor key=value words of a run"
        )
    return text.split()
