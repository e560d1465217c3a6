"""The pixel DDPM of most of the field, denoising-diffusion-pytorch at 128 pixels, trained for a time on a data set of ours.

python -m tests.stage2_diffusion.benchmark_pixels --data data/quickstart --minutes 12 --count 64 --out pixels.npz
lens-ldm evaluate pixels.npz --reference data/quickstart --fit 60

`lens-ldm benchmark` times that system; this says what it gives for the time that the quickstart takes. It learns the
square in the centre, as pixels of 0 to 1; beyond it the lenses are mirrored, as of `pixel-ddpm-128`. DDIM, whose steps are the
library's own, spares it nine tenths of its 1,000.
"""

import argparse
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from shared.autoencoder import Pixels
from shared.data.cache import LensImages
from shared.precision import autocast, resolve_precision
from stage2_diffusion.baselines.systems import PixelDDPM, Plan, endless

SIDE = 128


class Enough(Exception):
    """The time is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=64, help="lenses (default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of DDIM (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pixels.npz"))
    a = parser.parse_args()

    torch.manual_seed(0)
    images = LensImages(a.data)
    if images.image_shape[0] != 1:
        parser.error(f"{a.data} has images of several bands; that system is set up for one")
    square = Pixels(images.image_shape, images.transform, crop=SIDE)
    train = (square.to_raw(images.transform(images.batch(images.split("train")))) + 1) / 2
    precision = resolve_precision("auto", "cpu")
    system = PixelDDPM(Plan(model="", folder="", precision=precision, pixel_batch=a.batch), SIDE)
    started, steps = time.monotonic(), 0

    def between() -> None:
        nonlocal steps
        if time.monotonic() - started > 60 * a.minutes:
            raise Enough
        steps += 1

    with suppress(Enough):
        system.learn(endless(train, a.batch), between)
    print(
        f"{steps} steps of {a.batch} in {a.minutes:g} min, {precision}, {3 * system.gflop * steps * a.batch / 1e3:.1f} TFLOP"
    )

    drawer = system.ema.ema_model.eval()
    drawer.sampling_timesteps, drawer.is_ddim_sampling = a.steps, True
    drawn: list[torch.Tensor] = []
    started = time.monotonic()
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        while sum(map(len, drawn)) < a.count:
            left = a.count - sum(map(len, drawn))
            drawn.append(drawer.sample(batch_size=min(a.batch, left)).float())
            print(
                f"{sum(map(len, drawn))} of {a.count} lenses, {(time.monotonic() - started) / 60:.1f} min", flush=True
            )
    lenses, _ = square.from_raw(2 * torch.cat(drawn) - 1)
    np.savez(a.out, images=images.transform.inverse(lenses).numpy())
    print(f"{a.out}: {a.steps * system.gflop:.0f} GFLOP a lens")


if __name__ == "__main__":
    main()
