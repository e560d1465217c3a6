import numpy as np
import pytest
import torch

from stage2_diffusion.schedule import CURVES, NoiseSchedule

VARIANCE_PRESERVING = ["linear", "cosine", "sigmoid"]


def curve(schedule, t):
    alpha, sigma = schedule(torch.as_tensor(t, dtype=torch.float64).reshape(-1))
    return alpha.flatten(), sigma.flatten()


def log_snr(schedule, t):
    alpha, sigma = curve(schedule, t)
    return 2 * (alpha.log() - sigma.log())


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_every_curve_falls_from_data_to_noise(name, shift):
    schedule = NoiseSchedule(name, shift=shift)
    alpha, sigma = curve(schedule, torch.linspace(0, 1, 1001))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() < 0).all()
    # strictly, except where 1 - sigma is below float64
    assert (sigma.diff()[:-1] > 0).all()
    total = alpha + sigma if name == "flow" else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)


def test_linear_is_the_limit_of_the_1000_betas_of_ho_et_al():
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas))
    alpha, _ = curve(NoiseSchedule("linear"), torch.arange(1, 1001) / 1000)
    # the limit's error: log(1 - beta) against -beta is 0.7% at most, a sum against an integral 0.01 t
    torch.testing.assert_close((alpha**2).log(), alpha_bar.log(), rtol=0.01, atol=0.01)
    assert log_snr(NoiseSchedule("linear"), 1.0).item() == pytest.approx(-10.05, abs=0.01)


def test_cosine_is_nichol_and_dhariwals():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(curve(NoiseSchedule("cosine"), t)[0] ** 2, f / f[0], rtol=0, atol=1e-14)


def test_sigmoid_is_jabris():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    start, end = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=torch.float64))
    gamma = (end - torch.sigmoid(t * 6 - 3)) / (end - start)
    torch.testing.assert_close(curve(NoiseSchedule("sigmoid"), t)[0] ** 2, gamma, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "flow"])
def test_zero_terminal_schedules_end_in_pure_noise(name):
    alpha, sigma = curve(NoiseSchedule(name), 1.0)
    assert alpha.item() == 0
    assert sigma.item() == 1


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_without_zero_terminal_the_noisiest_time_is_ddpms(name, shift):
    schedule = NoiseSchedule(name, zero_terminal=False, shift=shift)
    assert schedule.times(10)[0] == schedule.t_max
    expected = -10.05 if name != "linear" else -10.05 - 2 * np.log(shift)
    assert log_snr(schedule, schedule.t_max).item() == pytest.approx(expected, abs=1e-3)
    assert (schedule.t_max == 1) == (name == "linear")


@pytest.mark.parametrize("name", CURVES)
def test_float32_times_lose_nothing_near_either_end(name):
    """Relative precision near t = 0, where 1 - alpha² cancels, and near t = 1, where alpha itself vanishes."""
    schedule = NoiseSchedule(name)
    t = torch.tensor([1e-6, 1e-4, 1e-2, 0.5, 1 - 2**-12, 1 - 2**-20])
    alpha, sigma = schedule(t)
    assert alpha.dtype == torch.float32
    assert alpha.shape == (6, 1, 1, 1)
    for single, double in zip((alpha, sigma), schedule(t.double()), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-7, atol=0)
    # closed forms of the leading order: sigma² = -2 dalpha/dt t
    slope = {"linear": 0.1, "cosine": np.pi / 1.008 * np.tan(np.pi / 2 * 0.008 / 1.008), "sigmoid": 0.2994}
    if name in slope:
        assert sigma[0].item() == pytest.approx(np.sqrt(slope[name] * 1e-6), rel=2e-4)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("zero_terminal", [True, False])
def test_times_are_even_on_the_straight_path(name, zero_terminal):
    schedule = NoiseSchedule(name, zero_terminal)
    times = schedule.times(8)
    assert times.shape == (9,)
    assert times[0] == schedule.t_max
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    alpha, sigma = curve(schedule, times)
    c = sigma / (alpha + sigma)
    torch.testing.assert_close(c, torch.linspace(c[0].item(), 0, 9, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_shifted_grid_steps_shorter_at_high_noise():
    t = torch.linspace(1, 0, 6, dtype=torch.float64)
    torch.testing.assert_close(NoiseSchedule("flow").times(5, shift=3.0), 3 * t / (1 + 2 * t))
    times = NoiseSchedule("cosine", zero_terminal=False).times(8, shift=3.0)
    assert times[0] == NoiseSchedule("cosine", zero_terminal=False).t_max
    assert times[-1] == 0
    assert (times.diff().diff() < 0).all()


def test_flow_walks_even_times():
    torch.testing.assert_close(NoiseSchedule("flow").times(5), torch.linspace(1, 0, 6, dtype=torch.float64))


def test_shift_of_flow_is_that_of_esser_et_al():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    _, sigma = curve(NoiseSchedule("flow", shift=3.0), t)
    torch.testing.assert_close(sigma, 3 * t / (1 + 2 * t))


@pytest.mark.parametrize("name", CURVES)
def test_shift_moves_the_log_snr_of_training_and_sampling_alike(name):
    plain, shifted = NoiseSchedule(name), NoiseSchedule(name, shift=2.0)
    t = torch.linspace(0.05, 0.95, 7)
    torch.testing.assert_close(
        log_snr(shifted, t), log_snr(plain, t) - 2 * torch.tensor(2.0).double().log(), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(shifted.times(6), plain.times(6))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; one of linear, cosine, sigmoid, flow"):
        NoiseSchedule("cosin")
    with pytest.raises(ValueError, match="positive, got 0"):
        NoiseSchedule("flow", shift=0)
    with pytest.raises(ValueError, match="at least one step"):
        NoiseSchedule("flow").times(0)
