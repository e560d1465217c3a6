"""Guidance with the exact denoisers of Gaussians, where the guided distribution is known."""

import pytest
import torch

from stage2_diffusion.guidance import autoguidance, classifier_free
from stage2_diffusion.samplers import SeededNoise, ab2
from stage2_diffusion.schedule import NoiseSchedule

WIDTH = 0.5


def exact(schedule, x_t, t, mean):
    """E[x_0 | x_t] of N(mean, WIDTH²)."""
    alpha, sigma = schedule(t)
    return mean + alpha * WIDTH**2 / (alpha**2 * WIDTH**2 + sigma**2) * (x_t - alpha * mean)


class Exact:
    """N(cond, WIDTH²) under a condition, N(-1, WIDTH²) without; counts what it is asked."""

    def __init__(self, schedule):
        self.schedule, self.sizes = schedule, []

    def __call__(self, x_t, t, cond):
        self.sizes.append(len(x_t))
        mean = cond.nan_to_num(-1.0).reshape(-1, 1, 1, 1)
        return exact(self.schedule, x_t, t, mean)


def draw(denoise, schedule, n=2000):
    return ab2(denoise, schedule, SeededNoise(range(n)), (1, 1, 1), 64).flatten()


@pytest.mark.parametrize("name", ["flow", "cosine"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5, 3.0])
def test_of_gaussians_as_wide_as_each_other_guidance_moves_the_mean_and_nothing_else(name, weight):
    schedule, n = NoiseSchedule(name), 2000
    cond, null = torch.full((n, 1), 0.7), torch.full((n, 1), torch.nan)
    expected = -1 + weight * (0.7 + 1)
    for denoise in (
        classifier_free(Exact(schedule), schedule, cond, null, weight),
        autoguidance(
            lambda x, t: exact(schedule, x, t, 0.7), lambda x, t: exact(schedule, x, t, -1.0), schedule, weight
        ),
    ):
        samples = draw(denoise, schedule)
        assert samples.mean().item() == pytest.approx(expected, abs=0.04)
        assert samples.std().item() == pytest.approx(WIDTH, rel=0.05)


def test_a_weight_of_1_is_the_denoiser_and_costs_what_it_costs():
    schedule = NoiseSchedule("flow")
    denoiser, cond, null = Exact(schedule), torch.full((3, 1), 0.7), torch.full((3, 1), torch.nan)
    x_t, t = torch.randn(3, 1, 1, 1), torch.full((3,), 0.5)
    plain = classifier_free(denoiser, schedule, cond, null, 1.0)(x_t, t)
    assert torch.equal(plain, Exact(schedule)(x_t, t, cond))
    assert denoiser.sizes == [3]
    mine = lambda x, t: x  # noqa: E731
    assert autoguidance(mine, lambda x, t: pytest.fail("asked the guide"), schedule, 1.0) is mine


@pytest.mark.parametrize(("name", "shift"), [("flow", 1.0), ("cosine", 1.0), ("flow", 3.0)])
def test_the_interval_is_of_the_share_of_noise_whatever_the_schedule(name, shift):
    schedule = NoiseSchedule(name, shift=shift)
    cond, null = torch.full((2, 1), 0.7), torch.full((2, 1), torch.nan)
    for share in (0.05, 0.19, 0.21, 0.5, 0.69, 0.71, 0.99):
        times = torch.linspace(1, 0, 10001)
        alpha, sigma = schedule(times)
        t = times[((sigma / (alpha + sigma)).flatten() - share).abs().argmin()].expand(2)
        denoiser = Exact(schedule)
        x_t = torch.randn(2, 1, 1, 1)
        x_0 = classifier_free(denoiser, schedule, cond, null, 2.0, (0.2, 0.7))(x_t, t)
        inside = 0.2 < share < 0.7
        assert denoiser.sizes == [4 if inside else 2]  # both in one batch
        good, weak = (exact(schedule, x_t, t, mean) for mean in (0.7, -1.0))
        torch.testing.assert_close(x_0, 2 * good - weak if inside else good)
