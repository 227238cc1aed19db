"""What tests of commands that fail share: the smallest run that does not, and a way to damage files."""

from collections.abc import Callable

SMALL = [
    *("trainer.steps=4", "encoder.hidden=[4]", "decoder.hidden=[4]", "model.latent_dim=2"),
    *("evaluation.particles=2", "evaluation.elbo_samples=1", "evaluation.data=5", "evaluation.draws=1"),
]
Say = Callable[..., str]


def changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
