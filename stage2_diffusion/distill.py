"""Teach a trained model to sample in one or two evaluations, and publish the student.

python stage2_diffusion/distill.py --config configs/stage2/distill.yaml --teacher checkpoints/unet --name unet-few
The teacher makes what the student learns from; of a data set it needs what lenses to ask for, if it can be asked for any.
The same command again goes on where it stopped.
"""

from shared.cli import guard
from shared.config import parse_arguments
from shared.schema import Distill


def main(argv: list[str] | None = None) -> None:
    config, options = parse_arguments(argv, Distill, __doc__, default_config="stage2/distill.yaml")
    from stage2_diffusion.distillation import distill  # after the config is known to be right

    distill(config, options.resume)


if __name__ == "__main__":
    guard(main)
