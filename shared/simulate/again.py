"""The images of a simulated data set made again, with what they were made of: the clean light, other exposures."""

import numpy as np
import torch
from torch import Tensor

from shared.data.cache import LensImages
from shared.errors import UserError
from shared.simulate.images import observe, render
from shared.simulate.preset import Preset, draw_parameters

AGAIN = 1 << 31  # between the seeds of the noise that images have, and that of other exposures of them


def preset_of(images: LensImages) -> Preset | None:
    """The preset that a data set was simulated with; None of one that was not. UserError if it cannot be read."""
    source = images.index["source"]
    if not isinstance(source, dict) or source.get("kind") != "simulation":
        return None
    try:
        preset = dict(source["preset"])
        if source.get("classes"):  # their order decides who is who
            preset["classes"] = {name: preset["classes"][name] for name in source["classes"]}
        return Preset(**preset)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the preset of the simulation of {images.path} cannot be read ({reason})") from error


class Simulation:
    """Makes the images of a simulated data set again, with the clean ones beside them."""

    def __init__(self, reference: LensImages) -> None:
        """UserError, one line that says why, if the data set does not know how it was simulated."""
        preset = preset_of(reference)
        if preset is None:
            raise UserError("no clean truth: these images were not simulated by `lens-ldm simulate`")
        source = reference.index["source"]
        try:
            self.preset, self.seed = preset, int(source["seed"])
            self.first = int(source.get("part", {}).get("start", 0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"no clean truth: {reference.path} does not say its simulation's seed ({error})") from error
        self.tolerance = 1e-3 * (reference.transform.high - reference.transform.low)

    def __call__(self, indices: np.ndarray, images: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the data set (n,), and the images there (n, C, H, W) -> their clean light, and other exposures of it.

        UserError if an image is not what the simulation makes at its place: then its truth would be another lens's.
        """
        places = [int(i) + self.first for i in indices]
        parameters = draw_parameters(self.preset, self.seed, places)
        light, exposure = render(self.preset, parameters), parameters.get("exposure")
        observed, clean = observe(self.preset, light, self.seed, places, exposure)
        # Of one made on another device, the rounding of some photon counts may differ.
        same = observed.shape == images.shape and (
            ((observed - images).abs() > self.tolerance).flatten(1).double().mean(1) < 0.01
        )
        if not torch.as_tensor(same).all():
            raise UserError("no clean truth: images are not those that the data set's simulation makes at their places")
        again = observe(self.preset, light, self.seed ^ AGAIN, places, exposure)[0]
        return clean, again
