"""How a model draws: what it is told, what its config.json says, and what holds where neither says anything."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import UserError

NOISY = ("ddpm", "dpmpp_sde", "consistency")  # samplers that draw noise at every step, on any grid

# What a model draws by, unless its config.json says otherwise.
SAMPLING: dict[str, Any] = {
    "sampler": "ddim", "steps": 50, "shift": 1.0, "eta": 0.0, "grids": {}, "guidance": 1.0, "guidance_interval": [0.0, 1.0],
}  # fmt: skip


def settings_of(
    own: Mapping[str, Any],
    sampler: str | None = None,
    steps: int | None = None,
    shift: float | None = None,
    eta: float | None = None,
    times: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What drawing makes of these, under their names: `own`, the model's SAMPLING, for those that are None.

    One of shift and times is None: a grid comes of either. Without both it is the model's fitted grid, if it has one
    for this sampler and number of steps. UserError for an eta that the sampler does not take.
    """
    sampler, steps = sampler or own["sampler"], steps or own["steps"]
    if eta and sampler != "ddim":
        raise UserError(f"eta is for sampler ddim, {sampler} takes none: leave it out, or take ddim")
    if eta is None:
        eta = own["eta"] if sampler == "ddim" else 0.0
    if times is None and shift is None and eta == 0:
        times = own["grids"].get(sampler, {}).get(str(steps))
    if times is not None:
        return {"sampler": sampler, "steps": len(times) - 1, "shift": None, "eta": eta, "times": list(times)}
    return {"sampler": sampler, "steps": steps, "shift": shift or own["shift"], "eta": eta, "times": None}
