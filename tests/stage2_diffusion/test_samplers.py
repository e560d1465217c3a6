import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from stage2_diffusion import samplers
from stage2_diffusion.samplers import (
    SeededNoise,
    ab2,
    ab3,
    consistency,
    ddim,
    ddpm,
    dpmpp,
    dpmpp3,
    dpmpp_sde,
    heun,
    unipc,
)  # fmt: skip
from stage2_diffusion.schedule import CURVES, NoiseSchedule

SAMPLERS = [ddim, dpmpp, dpmpp3, unipc, heun, ab2, ab3]
SHAPE = (2, 1, 1)
MEANS = torch.tensor([[-0.9, 0.3], [0.5, 0.9], [0.4, -1.1]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
WIDTH = 0.35


def exact_denoiser(schedule, means=MEANS, weights=WEIGHTS, width=WIDTH):
    """E[x_0 | x_t] when x_0 is drawn from a mixture of isotropic Gaussians: the closed form."""

    def denoise(x_t, t):
        alpha, sigma = (a.flatten(1) for a in schedule(t.double()))
        x = x_t.flatten(1)[:, None]
        variance = (alpha * width) ** 2 + sigma**2
        log_weight = weights.log() - ((x - alpha[..., None] * means) ** 2).sum(-1) / (2 * variance)
        posterior = means + (alpha * width**2 / variance)[..., None] * (x - alpha[..., None] * means)
        return (log_weight.softmax(1)[..., None] * posterior).sum(1).reshape(x_t.shape).to(x_t.dtype)

    return denoise


def fixed_noise(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(n, *shape, generator=generator, dtype=dtype)


def arbitrary_denoiser(x_t, t):
    """No one's posterior mean: enough to compare two implementations of a step."""
    return torch.tanh(x_t * 0.7 + 0.1) * (1.1 - t.reshape(-1, 1, 1, 1)) + 0.05 * x_t.flip(1)


# ------------------------------------------------------------------------------------------------- seeds


def test_a_seed_gives_its_noise_wherever_it_stands_in_the_batch():
    alone, together = SeededNoise([7]), SeededNoise([3, 7, 2**32 - 1])
    for _ in range(3):
        assert torch.equal(alone((4, 5, 6))[0], together((4, 5, 6))[1])


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_sde, consistency, *SAMPLERS])
def test_a_sample_does_not_depend_on_its_batch(sampler):
    schedule = NoiseSchedule("cosine")
    run = lambda seeds: sampler(exact_denoiser(schedule), schedule, SeededNoise(seeds), SHAPE, 10)  # noqa: E731
    together = run([5, 6, 7, 8])
    torch.testing.assert_close(run([7])[0], together[2], rtol=0, atol=1e-6)
    assert together.std(0).min() > 0.1


def test_streams_of_one_seed_and_seeds_of_one_stream_differ():
    draws = torch.stack([SeededNoise([seed], stream=stream)((64,))[0] for seed in range(4) for stream in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(16)).abs().max() < 0.6
    assert torch.equal(SeededNoise([0])((64,))[0], draws[0])


def test_seeds_beyond_the_generators_32_bits_are_refused():
    with pytest.raises(ValueError, match="got 4294967296"):
        SeededNoise([1, 2**32])
    with pytest.raises(ValueError, match="got -1"):
        SeededNoise([-1])


# ------------------------------------------------------------------------------------------- convergence


def error(sampler, schedule, steps, reference, times=None):
    out = sampler(exact_denoiser(schedule), schedule, fixed_noise(64), SHAPE, steps, times=times)
    return (out - reference).square().mean().sqrt().item()


@cache
def solution(name):
    """Where the noise of `fixed_noise(64)` ends between log-SNR -8 and 8."""
    schedule = NoiseSchedule(name)
    times = even_in_log_snr(schedule, 600)
    return ab3(exact_denoiser(schedule), schedule, fixed_noise(64), SHAPE, times=times)


@pytest.fixture(scope="module")
def truth():
    """Where the noise of `fixed_noise(64)` ends: the same for every zero-terminal schedule."""
    schedule = NoiseSchedule("flow")
    return ab2(exact_denoiser(schedule), schedule, fixed_noise(64), SHAPE, 2000)


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "flow"])
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (ab2, 2), (heun, 2)])
def test_order_of_convergence(name, sampler, order, truth):
    schedule = NoiseSchedule(name)
    coarse, fine = error(sampler, schedule, 80, truth), error(sampler, schedule, 320, truth)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.25)
    assert fine < (0.03 if order == 1 else 2e-3)


def even_in_log_snr(schedule, steps):
    """Times between log-SNR -8 and 8 with every step alike, as DPM-Solver's theory has them."""
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    alpha, sigma = (a.flatten() for a in schedule(t))
    half_log_snr = (alpha / sigma).log().numpy()
    return torch.from_numpy(np.interp(np.linspace(4, -4, steps + 1), half_log_snr[::-1], t.numpy()[::-1]).copy()).flip(
        0
    )


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp, 2), (ab2, 2), (heun, 2), (dpmpp3, 3), (ab3, 3)])
def test_order_of_convergence_between_finite_log_snrs(name, sampler, order):
    schedule = NoiseSchedule(name)
    coarse, fine = (error(sampler, schedule, 0, solution(name), times=even_in_log_snr(schedule, n)) for n in (30, 120))
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "flow"])
def test_dpmpp_keeps_its_order_on_the_default_grid_up_to_a_logarithm(name, truth):
    """Next to an infinite log-SNR no step is small, which costs log(n); a solver of first order would show 1."""
    schedule = NoiseSchedule(name)
    coarse, fine = error(dpmpp, schedule, 80, truth), error(dpmpp, schedule, 320, truth)
    assert math.log(coarse / fine, 4) > 1.5


def test_ab2_takes_uneven_steps(truth):
    """Step sizes that jump by half and back: a solver that took them for equal would fall to first order."""
    schedule = NoiseSchedule("flow")

    def uneven(steps):
        widths = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).repeat(steps // 3)
        return 1 - torch.cat([torch.zeros(1, dtype=torch.float64), widths.cumsum(0) / widths.sum()]).clamp(max=1)

    coarse, fine = (error(ab2, schedule, 0, truth, times=uneven(n)) for n in (90, 360))
    assert math.log(coarse / fine, 4) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedules_agree_on_the_straight_path(sampler):
    """The fast samplers see c = sigma / (alpha + sigma) alone, so zero-terminal schedules give one result."""
    results = []
    for name in ("cosine", "sigmoid", "flow"):
        schedule = NoiseSchedule(name)
        results.append(sampler(exact_denoiser(schedule), schedule, fixed_noise(8), SHAPE, 6))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-8)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-8)


def test_the_corrector_of_unipc_makes_its_predictor_more_exact(truth):
    """Between finite log-SNRs by a factor of 2 to 4, for no evaluation more."""
    schedule = NoiseSchedule("cosine")
    reference = solution("cosine")
    for n in (30, 60):
        times = even_in_log_snr(schedule, n)
        assert error(unipc, schedule, 0, reference, times) < error(dpmpp3, schedule, 0, reference, times) / 2


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("sampler", [ddpm, *SAMPLERS])
def test_steps_are_evaluations(sampler, steps):
    schedule, asked = NoiseSchedule("flow"), []
    exact = exact_denoiser(schedule)
    sampler(lambda x_t, t: asked.append(t[0].item()) or exact(x_t, t), schedule, fixed_noise(2), SHAPE, steps)
    assert len(asked) == steps
    assert asked[0] == 1
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] > 0


def wasserstein(samples):
    """Distance in the first coordinate to the mixture, in its own units (its standard deviation is about 0.8)."""
    rng = np.random.default_rng(0)
    truth = MEANS[:, 0].numpy()[rng.choice(3, 100_000, p=WEIGHTS.numpy())] + WIDTH * rng.standard_normal(100_000)
    levels = (np.arange(len(samples)) + 0.5) / len(samples)
    return np.abs(np.sort(samples.flatten(1)[:, 0].numpy()) - np.quantile(truth, levels)).mean()


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [(ddpm, 150, {}), (ddim, 100, {"eta": 1.0}), (ddim, 60, {}), (dpmpp, 20, {}), (dpmpp_sde, 30, {}), (ab2, 12, {})],
)
def test_the_right_distribution_comes_out(name, sampler, steps, options):
    schedule = NoiseSchedule(name)
    samples = sampler(exact_denoiser(schedule), schedule, fixed_noise(2000, seed=1), SHAPE, steps, **options)
    assert wasserstein(samples) < 0.05  # the floor of 2,000 true draws is 0.01 to 0.03


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_keeps_the_distribution_at_any_number_of_steps(name, steps):
    """Of correlated normal data, whose paths end at mean + S^½ (alpha² S + sigma²)^-½ (x_t - alpha mean)."""
    schedule = NoiseSchedule(name)
    mean, covariance = torch.tensor([0.7, -0.4]).double(), torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double()
    eigenvalues, basis = torch.linalg.eigh(covariance)

    def end(x_t, t):
        alpha, sigma = (a.flatten(1) for a in schedule(t))
        scale = (eigenvalues / (alpha**2 * eigenvalues + sigma**2)).sqrt()
        return (mean + ((x_t.flatten(1) - alpha * mean) @ basis * scale) @ basis.T).reshape(x_t.shape)

    samples = consistency(end, schedule, fixed_noise(20_000), SHAPE, steps).flatten(1)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=0.04)


@pytest.mark.parametrize("zero_terminal", [True, False])
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("sampler", [ddpm, dpmpp_sde, consistency, *SAMPLERS])
def test_infinite_log_snr_at_both_ends_does_no_harm(sampler, steps, name, zero_terminal):
    schedule = NoiseSchedule(name, zero_terminal)
    out = sampler(exact_denoiser(schedule), schedule, fixed_noise(2, dtype=torch.float32), SHAPE, steps)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.abs().max() < 4


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_sde, consistency, *SAMPLERS])
def test_one_step_from_pure_noise_is_the_estimate_itself(sampler):
    schedule = NoiseSchedule("flow")
    out = sampler(exact_denoiser(schedule), schedule, fixed_noise(3), SHAPE, 1)
    torch.testing.assert_close(out.flatten(1), (WEIGHTS @ MEANS).expand(3, 2))


# ------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_ddpm_step_is_the_posterior_of_ho_et_al(name):
    """Ho et al. 2020, Eq. 6 and 7, in their symbols. An exact denoiser could not tell a wrong noise of the step."""
    schedule = NoiseSchedule(name)
    times = torch.tensor([0.6, 0.55], dtype=torch.float64)
    alpha_bar, alpha_bar_last = (schedule(times)[0].flatten() ** 2).tolist()
    alpha = alpha_bar / alpha_bar_last
    beta = 1 - alpha
    x_0 = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
    x_t, z = torch.full_like(x_0, 1.7), torch.full_like(x_0, -0.8)
    draws = iter([x_t / schedule(times[:1])[1], z])

    out = ddpm(lambda *_: x_0, schedule, lambda _: next(draws), SHAPE, times=times)

    mean = math.sqrt(alpha_bar_last) * beta / (1 - alpha_bar) * x_0
    mean = mean + math.sqrt(alpha) * (1 - alpha_bar_last) / (1 - alpha_bar) * x_t
    variance = (1 - alpha_bar_last) / (1 - alpha_bar) * beta
    torch.testing.assert_close(out, mean + math.sqrt(variance) * z)


def test_a_ddim_step_is_that_of_song_et_al():
    """Song et al. 2021, Eq. 12 and 16, whose alpha is alpha² here."""
    schedule = NoiseSchedule("cosine")
    times = torch.tensor([0.7, 0.4], dtype=torch.float64)
    a_t, a_s = (schedule(times)[0].flatten() ** 2).tolist()
    x_0 = torch.full((1, *SHAPE), -0.4, dtype=torch.float64)
    x_t, z, eta = torch.full_like(x_0, 0.9), torch.full_like(x_0, 1.3), 0.6
    draws = iter([x_t / schedule(times[:1])[1], z])

    out = ddim(lambda *_: x_0, schedule, lambda _: next(draws), SHAPE, eta=eta, times=times)

    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    eps = (x_t - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
    torch.testing.assert_close(out, math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s - sigma**2) * eps + sigma * z)


def discrete(schedule, n=1000):
    """The betas by which a thousand-step implementation follows our schedule, and its times."""
    times = torch.arange(1, n + 1, dtype=torch.float64) / n
    alpha_bar = schedule(times)[0].flatten() ** 2
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return betas.numpy(), times


def walk(scheduler, x_t, times, **options):
    """diffusers' loop, its timesteps counted from 0 where our times count from 1/1000."""
    for k in scheduler.timesteps:
        x_0 = arbitrary_denoiser(x_t, times[k].expand(len(x_t)).to(x_t.dtype))
        x_t = scheduler.step(x_0, k, x_t, **options).prev_sample
    return x_t


@pytest.mark.parametrize("name", ["linear", "sigmoid"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_against_diffusers(name, eta):
    schedule = NoiseSchedule(name, zero_terminal=False)
    betas, times = discrete(schedule)
    oracle = DDIMScheduler(trained_betas=betas, clip_sample=False, prediction_type="sample")
    oracle.set_timesteps(50)
    grid = torch.cat([times[oracle.timesteps], torch.zeros(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(0)
    start = schedule(grid[:1])[1].float() * torch.randn(3, *SHAPE, generator=generator)
    expected = walk(oracle, start, times, eta=eta, generator=generator)
    out = ddim(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE, eta=eta, times=grid)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_ddpm_against_diffusers():
    schedule = NoiseSchedule("linear")
    betas, times = discrete(schedule)
    oracle = DDPMScheduler(
        trained_betas=betas, clip_sample=False, prediction_type="sample", variance_type="fixed_small"
    )
    oracle.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    start = schedule(times[-1:])[1].float() * torch.randn(3, *SHAPE, generator=generator)
    expected = walk(oracle, start, times, generator=generator)
    out = ddpm(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("sampler", "algorithm"), [(dpmpp, "dpmsolver++"), (dpmpp_sde, "sde-dpmsolver++")])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [8, 25])
def test_dpmpp_against_diffusers(name, steps, sampler, algorithm):
    schedule = NoiseSchedule(name, zero_terminal=False)
    betas, times = discrete(schedule)
    oracle = DPMSolverMultistepScheduler(
        trained_betas=betas,
        prediction_type="sample",
        algorithm_type=algorithm,
        solver_order=2,
        final_sigmas_type="zero",
        timestep_spacing="leading",
    )
    oracle.set_timesteps(steps)
    grid = torch.cat([times[oracle.timesteps], torch.zeros(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(0)
    start = schedule(grid[:1])[1].float() * torch.randn(3, *SHAPE, generator=generator)
    expected = walk(oracle, start, times, generator=generator)
    out = sampler(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE, times=grid)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("sampler", "order", "corrected"), [(dpmpp, 2, False), (dpmpp3, 3, False), (unipc, 3, True)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [3, 8, 25])
def test_unipc_against_diffusers(name, steps, sampler, order, corrected):
    """Our exponential solvers are UniPC with its corrector or without."""
    schedule = NoiseSchedule(name, zero_terminal=False)
    betas, times = discrete(schedule)
    oracle = UniPCMultistepScheduler(
        trained_betas=betas,
        prediction_type="sample",
        solver_order=order,
        solver_type="bh2",
        final_sigmas_type="zero",
        timestep_spacing="leading",
        disable_corrector=[] if corrected else list(range(steps)),
    )
    oracle.set_timesteps(steps)
    grid = torch.cat([times[oracle.timesteps], torch.zeros(1, dtype=torch.float64)])
    start = schedule(grid[:1])[1].float() * fixed_noise(3, dtype=torch.float32)(SHAPE)
    expected = walk(oracle, start, times)
    out = sampler(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE, times=grid)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-5)


def test_the_third_order_against_that_of_diffusers_and_lu_et_al(monkeypatch):
    """Theirs is ours with half the bend of the parabola, and of second order."""
    exact = samplers._mean

    def halved(value, nodes, moments):
        if len(nodes) < 2:
            return exact(value, nodes, moments)
        (a, f), (b, g) = nodes
        bend = ((g - value) / b - (f - value) / a) / (b - a)
        return exact(value, nodes, moments) - moments[1] * bend / 2

    monkeypatch.setattr(samplers, "_mean", halved)
    schedule = NoiseSchedule("cosine", zero_terminal=False)
    betas, times = discrete(schedule)
    oracle = DPMSolverMultistepScheduler(
        trained_betas=betas,
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=3,
        final_sigmas_type="zero",
        timestep_spacing="leading",
    )
    oracle.set_timesteps(8)
    grid = torch.cat([times[oracle.timesteps], torch.zeros(1, dtype=torch.float64)])
    start = schedule(grid[:1])[1].float() * fixed_noise(3, dtype=torch.float32)(SHAPE)
    expected = walk(oracle, start, times)
    out = dpmpp3(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE, times=grid)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)

    coarse, fine = (
        error(dpmpp3, NoiseSchedule("cosine"), 0, solution("cosine"), even_in_log_snr(NoiseSchedule("cosine"), n))
        for n in (30, 120)
    )
    assert math.log(coarse / fine, 4) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("steps", [3, 9])
def test_heun_against_diffusers(steps):
    schedule = NoiseSchedule("flow")
    oracle = FlowMatchHeunDiscreteScheduler()
    oracle.set_timesteps((steps + 1) // 2)
    x_t = fixed_noise(3, dtype=torch.float32)(SHAPE)
    for k in oracle.timesteps:
        sigma = k / 1000
        x_t = oracle.step((x_t - arbitrary_denoiser(x_t, sigma.expand(3))) / sigma, k, x_t).prev_sample
    nodes = oracle.timesteps[::2].double() / 1000  # each but the last twice
    middles = (nodes[:-1] + nodes[1:]) / 2  # which heun passes over
    grid = torch.cat([torch.stack([nodes[:-1], middles], 1).flatten(), nodes[-1:], torch.zeros(1)])
    out = heun(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE, steps, times=grid)
    torch.testing.assert_close(out, x_t, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_against_diffusers(shift):
    """On the straight path DDIM is Euler's method."""
    schedule = NoiseSchedule("flow", shift=shift)
    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(sigmas=np.linspace(1, 0, 11)[:-1])
    x_t = fixed_noise(3, dtype=torch.float32)(SHAPE)
    for k, sigma, t in zip(oracle.timesteps, oracle.sigmas, schedule.times(10), strict=False):
        assert sigma.item() == pytest.approx(schedule(t)[1].item(), abs=1e-6)
        x_0 = arbitrary_denoiser(x_t, t.float().expand(3))
        x_t = oracle.step((x_t - x_0) / sigma, k, x_t).prev_sample
    out = ddim(arbitrary_denoiser, schedule, fixed_noise(3, dtype=torch.float32), SHAPE, 10)
    torch.testing.assert_close(out, x_t, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_sde, consistency, *SAMPLERS])
def test_on_step_sees_every_state_and_estimate(sampler):
    schedule, seen = NoiseSchedule("sigmoid"), []
    denoise = exact_denoiser(schedule)
    sampler(denoise, schedule, fixed_noise(2), SHAPE, 5, on_step=lambda *state: seen.append(state))
    assert [i for i, *_ in seen] == [0, 1, 2, 3, 4]
    assert all(earlier[1] > later[1] or sampler is heun for earlier, later in pairwise(seen))
    for _, t, x_t, x_0 in seen:
        torch.testing.assert_close(x_0, denoise(x_t, torch.full((2,), t)))
    assert torch.equal(seen[0][2], fixed_noise(2)(SHAPE))


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_sde, consistency, *SAMPLERS])
def test_times_that_do_not_fall_are_refused(sampler):
    schedule = NoiseSchedule("flow")
    with pytest.raises(ValueError, match="fall at every step"):
        sampler(exact_denoiser(schedule), schedule, fixed_noise(1), SHAPE, times=torch.tensor([1.0, 1.0, 0.0]))
