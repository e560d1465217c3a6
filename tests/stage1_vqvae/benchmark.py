"""How well a noise law draws noise, without a network: the true clean images of a simulation through it.

python -m tests.stage1_vqvae.benchmark deeplense --count 500
python -m tests.stage1_vqvae.benchmark model-1 --class no_sub --count 500

The laws are fitted to COUNT images and their truth; that of COUNT other images is observed anew by each and compared with
the first. `simulator` is the control: the same lenses with new noise of the simulator.
"""

import argparse

import torch

from shared.data.normalise import PixelTransform
from shared.evaluation.measure import Measured
from shared.evaluation.scores import compare
from shared.metrics.efficientnet import efficientnet_lite0
from shared.simulate.images import observe, render
from shared.simulate.preset import Preset, draw_parameters
from stage1_vqvae.noise import NoiseLaw

QUANTITIES = ("flux", "peak", "background", "noise", "radius", "axis_ratio", "ring_radius")


def main() -> None:
    parser = argparse.ArgumentParser("benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--class", dest="one", help="of the preset, if it has classes")
    parser.add_argument("--count", type=int, default=500)
    a = parser.parse_args()
    preset, n = Preset.load(a.preset), a.count
    preset = preset.select([a.one]) if a.one else preset
    parameters = draw_parameters(preset, 0, range(2 * n))
    light, exposure = render(preset, parameters), parameters.get("exposure")

    def observed(noise_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return observe(preset, light, noise_seed, range(2 * n), exposure)

    images, clean = observed(0)
    again, _ = observed(1)
    transform = PixelTransform(float(images.min()), float(images.max()))
    sets = {"reference": images[:n], "real": images[n:], "simulator": again[n:]}
    for law in ("affine", "image"):
        noise = NoiseLaw()
        noise.fit(images[:n], clean[:n], law)
        generators = [torch.Generator().manual_seed(k) for k in range(n)]
        sets[law] = noise(clean[n:], generators).clamp(transform.low, transform.high)
    measured = {name: Measured([efficientnet_lite0()], transform) for name in sets}
    for name, one in measured.items():
        for batch in sets[name].split(50):
            one.add(batch)
    scores = compare(measured.pop("reference"), measured.pop("real"), measured)
    print(f"| {a.preset}, n = {n} | excess FD | " + " | ".join(QUANTITIES) + " |")
    print("|---" * (2 + len(QUANTITIES)) + "|")
    for name in measured:
        score, physics = scores["distances"]["fd_efflite0"][name], scores["physics"][name]
        cells = [f"{physics[quantity]['ratio']:.1f}" for quantity in QUANTITIES]
        print(f"| {name} | {score['excess']:.2f} ± {score['floor_sd']:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
