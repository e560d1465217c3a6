"""Train stage 1, fit its noise law and the statistics of its latents, and publish it.

python stage1_vqvae/train.py --config configs/stage1/vqvae.yaml --data.path data/lenses
The same command again goes on where it stopped.
"""

from shared.cli import guard
from shared.config import parse_arguments
from shared.schema import Stage1


def main(argv: list[str] | None = None) -> None:
    config, options = parse_arguments(argv, Stage1, __doc__)
    from stage1_vqvae.pipeline import train  # after the config is known to be right: torch takes its seconds to import

    train(config, options.resume)


if __name__ == "__main__":
    guard(main)
