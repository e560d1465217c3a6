"""Train stage 2 on the frozen latents of stage 1, and publish the generator.

python stage2_diffusion/train.py --config configs/stage2/unet.yaml --data.path data/lenses --autoencoder checkpoints/vqvae
The same command again goes on where it stopped. `--backbone.name dit` swaps the backbone.
"""

from shared.cli import guard
from shared.config import parse_arguments
from shared.schema import Stage2


def main(argv: list[str] | None = None) -> None:
    config, options = parse_arguments(argv, Stage2, __doc__)
    from stage2_diffusion.pipeline import (
        train,  # after the config is known to be right: torch takes its seconds to import
    )

    train(config, options.resume)


if __name__ == "__main__":
    guard(main)
