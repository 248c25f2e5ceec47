"""How large models are, how long they learn, and how they are judged: for one core, and for an accelerator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from examples.generative.frames import Recipe, Training

FAMILIES = ("hvae", "vq", "diffusion")
DATASETS = ("mnist", "fashion_mnist")


@dataclass(frozen=True)
class Size:
    """One size of the whole experiment; the same for all contenders of a family.

    Attributes:
        recipe: of the frames.
        training: of each family, by name; ``"prior"`` is the second stage of ``"vq"``.
        samples: images of each family that are judged.
        hvae: options of ``HVAE``.
        vq: options of ``VideoVQ``.
        prior: options of ``TokenPrior``.
        diffusion: options of ``VideoDiffusion`` and its network; ``patch`` is the side of the patches that the network
            sees as one site, 1 for pixels.
        average: decay of the average of weights from which diffusion draws.
        diffusion_steps: of a draw.
        chunk: videos that are drawn at once.
        reference: test images that are the reference.
        held: other test images, which are reconstructed.
        bound: images and draws of the importance-weighted bound.
        epochs: of the classifier on each data set.
        full: whether to read the whole data sets; otherwise those that ship.
    """

    recipe: Recipe
    training: dict[str, Training]
    samples: dict[str, int]
    hvae: dict[str, Any]
    vq: dict[str, Any]
    prior: dict[str, Any]
    diffusion: dict[str, Any]
    average: float
    diffusion_steps: int
    chunk: int
    reference: int = 5000
    held: int = 1000
    bound: tuple[int, int] = (300, 20)
    epochs: dict[str, int] = field(default_factory=lambda: {"mnist": 2, "fashion_mnist": 3})
    full: bool = True

    def changed(self, steps: int | None = None, autocast: bool = False) -> Size:
        """With another number of steps for all, or in mixed precision."""
        training = {
            name: replace(one, steps=steps or one.steps, autocast=autocast) for name, one in self.training.items()
        }
        return replace(self, training=training)


#: A minute or so a contender on one core, the whole about an hour on two.
SMALL = Size(
    recipe=Recipe(),
    training={
        "hvae": Training(2000, 16, 3e-3),
        "vq": Training(600, 32, 2e-3),
        "prior": Training(1200, 32, 2e-3),
        "diffusion": Training(600, 16, 2e-3),
    },
    samples={"hvae": 2000, "vq": 2000, "diffusion": 500},
    hvae={"latent_dim": 16, "hidden": 128, "width": 4},
    vq={"patch_size": 14, "dim": 64, "num_heads": 4, "num_codes": 128, "code_dim": 16},
    prior={"dim": 64, "num_heads": 4, "depth": 3},
    diffusion={"patch": 4, "num_steps": 200, "channels": (16, 32), "attention_side": 7},
    average=0.99,
    diffusion_steps=20,
    chunk=250,
)
#: Real networks, eight frames: hours on an accelerator.
LARGE = Size(
    recipe=Recipe(num_frames=8),
    training={
        "hvae": Training(40_000, 256, 5e-4),
        "vq": Training(20_000, 64, 3e-4),
        "prior": Training(40_000, 64, 3e-4),
        "diffusion": Training(40_000, 64, 3e-4),
    },
    samples={"hvae": 5000, "vq": 5000, "diffusion": 5000},
    hvae={"latent_dim": 32, "hidden": 512, "width": 48},
    vq={"patch_size": 4, "dim": 192, "num_heads": 6, "num_codes": 512, "code_dim": 32},
    prior={"dim": 256, "num_heads": 8, "depth": 8},
    diffusion={"patch": 1, "num_steps": 1000, "channels": (48, 96, 192), "num_blocks": 2, "attention_side": 14},
    average=0.9995,
    diffusion_steps=100,
    chunk=500,
    bound=(1000, 200),
    epochs={"mnist": 8, "fashion_mnist": 12},
)
#: Does it run?
SMOKE = replace(
    SMALL,
    recipe=Recipe(num_frames=4),
    training={name: Training(2, 16) for name in SMALL.training},
    samples=dict.fromkeys(FAMILIES, 40),
    hvae={"latent_dim": 2, "hidden": 8, "width": 2},
    vq={"patch_size": 14, "dim": 8, "num_heads": 2, "num_codes": 8, "code_dim": 4, "spatial_depth": 1},
    prior={"dim": 8, "num_heads": 2, "depth": 1},
    diffusion={"patch": 4, "num_steps": 10, "channels": (8,), "attention_side": 7},
    diffusion_steps=2,
    chunk=40,
    reference=200,
    held=50,
    bound=(10, 2),
    epochs={"mnist": 1, "fashion_mnist": 1},
    full=False,
)
SIZES = {"small": SMALL, "large": LARGE, "smoke": SMOKE}
