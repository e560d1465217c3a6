import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from shared.errors import UserError
from stage2_diffusion.denoiser import Denoiser, min_snr, of_velocity, similarity, target, to_x0
from stage2_diffusion.generator import build_denoiser
from stage2_diffusion.schedule import CURVES, NoiseSchedule

ALLOWED = [(p, s) for p in ("eps", "x0", "v", "velocity") for s in CURVES if p != "velocity" or s == "flow"]


class Recorder(nn.Module):
    """A backbone that answers as it is told and remembers what it was asked."""

    def __init__(self, answer=lambda x, t: torch.zeros_like(x), cond_dim=0):
        super().__init__()
        self.answer, self.cond_dim = answer, cond_dim
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        self.x, self.t, self.cond = x, t, cond
        return self.weight * self.answer(x, t)


def make(prediction="velocity", schedule="flow", answer=None, cond_dim=0, shift=1.0, **options):
    backbone = Recorder(cond_dim=cond_dim) if answer is None else Recorder(answer, cond_dim)
    return Denoiser(backbone, NoiseSchedule(schedule, prediction != "eps", shift), prediction, **options)


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_to_x0_inverts_target(prediction, schedule, shift):
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 9, 3, 4, 5).double()
    alpha, sigma = NoiseSchedule(schedule, prediction != "eps", shift)(torch.linspace(0, 0.99, 9).double())
    out = target(prediction, x_0, eps, alpha, sigma)
    torch.testing.assert_close(to_x0(prediction, out, alpha * x_0 + sigma * eps, alpha, sigma), x_0)


def test_targets_are_what_their_names_say():
    x_0, eps = torch.tensor([[[[2.0]]]]), torch.tensor([[[[-3.0]]]])
    alpha, sigma = torch.tensor([[[[0.8]]]]), torch.tensor([[[[0.6]]]])
    values = {p: target(p, x_0, eps, alpha, sigma).item() for p in ("eps", "x0", "v", "velocity")}
    assert values == pytest.approx({"eps": -3.0, "x0": 2.0, "v": 0.8 * -3 - 0.6 * 2, "velocity": -5.0})


def test_velocity_is_the_time_derivative_of_the_flow():
    x_0, eps, h = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.2, dtype=torch.float64), 1e-6
    alpha, sigma = NoiseSchedule("flow")(torch.tensor([0.4 - h, 0.4 + h], dtype=torch.float64))
    before, after = (alpha * x_0 + sigma * eps).flatten()
    assert ((after - before) / (2 * h)).item() == pytest.approx(
        target("velocity", x_0, eps, alpha, sigma).item(), rel=1e-6
    )


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
def test_the_loss_of_the_perfect_network_is_zero_and_of_a_silent_one_the_variance_of_the_target(prediction, schedule):
    """Data that is one point, mu, tells the noise exactly: eps = (x_t - alpha mu) / sigma."""
    mu = 0.7

    def perfect(x, t):
        alpha, sigma = denoiser.schedule(t)
        return target(prediction, torch.full_like(x, mu), (x - alpha * mu) / sigma.clamp(min=1e-6), alpha, sigma)

    denoiser = make(prediction, schedule, perfect)
    torch.manual_seed(0)
    x_0 = torch.full((512, 2, 3, 3), mu)
    loss = denoiser.loss(x_0)
    assert loss.shape == (512,)
    assert loss.max() < 1e-4

    alpha, sigma = denoiser.schedule(torch.linspace(0, denoiser.schedule.t_max, 4001).double())
    power = {"eps": 1.0, "x0": mu**2, "velocity": 1 + mu**2}.get(prediction, (alpha**2 + sigma**2 * mu**2).mean())
    assert make(prediction, schedule).loss(x_0).mean().item() == pytest.approx(float(power), rel=0.06)


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_errors_of_x_0_alike_whatever_is_predicted(prediction, schedule, gamma):
    """Two outputs that differ by delta differ in x_0 by as much as counts min(SNR, gamma) times there."""
    alpha, sigma = NoiseSchedule(schedule, prediction != "eps")(torch.linspace(0.01, 0.99, 50).double())
    x_t, out, delta = torch.randn(3, 50, 1, 1, 1).double()
    estimates = [to_x0(prediction, y, x_t, alpha, sigma) for y in (out, out + delta)]
    in_x0 = (alpha / sigma).square().clamp(max=gamma) * (estimates[1] - estimates[0]) ** 2
    torch.testing.assert_close(min_snr(prediction, alpha, sigma, gamma) * delta**2, in_x0)


def test_min_snr_is_that_of_hang_et_al():
    """Their closed forms, for alpha² + sigma² = 1; and the flow's, whose errors of velocity are those of x_0 / sigma."""
    snr = torch.tensor([1e-4, 0.5, 5.0, 80.0, 1e6], dtype=torch.float64)
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    capped = snr.clamp(max=5.0)
    for prediction, expected in {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}.items():
        torch.testing.assert_close(min_snr(prediction, alpha, sigma, 5.0), expected)
    t = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 5 * 0.1**2, 1 * 0.5**2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr("velocity", 1 - t, t, 5.0), expected)


@pytest.mark.parametrize("prediction", ["x0", "v", "eps", "velocity"])
def test_errors_weighed_as_velocities_are_those_of_the_velocity_that_the_estimate_of_x_0_makes(prediction):
    """On the flow (x_t - x_0) / t is the velocity, whatever the network says; and below t = 0.05 none counts more."""
    t = torch.linspace(0.05, 0.99, 50).double()
    alpha, sigma = NoiseSchedule("flow", prediction != "eps")(t)
    x_t, out, delta = torch.randn(3, 50, 1, 1, 1).double()
    velocities = [(x_t - to_x0(prediction, y, x_t, alpha, sigma)) / sigma for y in (out, out + delta)]
    weight = of_velocity(prediction, alpha, sigma)
    torch.testing.assert_close(weight * delta**2, (velocities[1] - velocities[0]) ** 2)
    if prediction == "velocity":
        torch.testing.assert_close(weight, torch.ones_like(weight))  # as without weights
    low = torch.tensor([0.0, 0.001, 0.049], dtype=torch.float64)
    torch.testing.assert_close(of_velocity("x0", 1 - low, low), torch.full((3,), 400.0, dtype=torch.float64))


@pytest.mark.parametrize("weighting", ["min_snr", "velocity"])
@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
def test_the_loss_is_weighed_sample_by_sample(prediction, schedule, weighting):
    x_0 = torch.randn(64, 2, 3, 3)
    losses = []
    for by in ("uniform", weighting):
        denoiser = make(prediction, schedule, weighting=by, gamma=2.0)
        torch.manual_seed(0)
        losses.append(denoiser.loss(x_0))
    alpha, sigma = denoiser.schedule(denoiser.backbone.t)
    weights = (
        of_velocity(prediction, alpha, sigma) if weighting == "velocity" else min_snr(prediction, alpha, sigma, 2.0)
    )
    torch.testing.assert_close(losses[1], losses[0] * weights.flatten())
    assert losses[1].isfinite().all()


def images_of(n=3, side=14):
    """Of a range that is another for each."""
    torch.manual_seed(0)
    return (torch.randn(n, 2, side, side) * torch.tensor([0.5, 1.0, 20.0])[:n, None, None, None] + 3).double()


def test_similarity_is_torchmetrics_with_each_image_in_its_own_range():
    x_0 = images_of()
    estimate = x_0 + 0.3 * torch.randn_like(x_0)
    for estimated, x, value in zip(estimate, x_0, similarity(estimate, x_0), strict=True):
        moved = [(y - x.min())[None] for y in (estimated, x)]
        expected = structural_similarity_index_measure(*moved, data_range=float(x.max() - x.min()))
        assert float(value) == pytest.approx(float(expected), rel=1e-9)
    assert torch.allclose(similarity(x_0, x_0), torch.ones(3).double())
    assert similarity(x_0.float(), torch.full_like(x_0, 2.0).float()).isfinite().all()  # without any range


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
def test_ssim_is_added_with_its_weight_on_the_estimate_of_x_0(prediction, schedule):
    x_0, answer = images_of().float(), torch.randn(3, 2, 14, 14)
    losses = []
    for weight in (0.0, 0.7):
        denoiser = make(prediction, schedule, lambda x, t: answer, ssim=weight)
        torch.manual_seed(1)
        losses.append(denoiser.loss(x_0))
    net = denoiser.backbone
    alike = similarity(denoiser(net.x, net.t), x_0)
    torch.testing.assert_close(losses[1] - losses[0], 0.7 * (1 - alike), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
def test_the_gradient_of_ssim_is_that_of_finite_differences(prediction, schedule):
    x_0 = images_of(2)
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    alpha, sigma = NoiseSchedule(schedule, prediction != "eps")(t)
    eps = torch.randn_like(x_0)
    x_t, wanted = alpha * x_0 + sigma * eps, target(prediction, x_0, eps, alpha, sigma)
    out = (wanted + 0.3 * torch.randn_like(x_0)).requires_grad_()

    def term(y):
        return (1 - similarity(to_x0(prediction, y, x_t, alpha, sigma), x_0)).sum()

    (gradient,) = torch.autograd.grad(term(out), out)
    for direction in torch.randn(3, *out.shape, dtype=torch.float64):
        h = 1e-5
        slope = (term(out + h * direction) - term(out - h * direction)) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope.detach()), rel=1e-4, abs=1e-9)


def test_ssim_of_weight_0_is_not_computed_and_a_positive_one_keeps_float32_under_autocast(monkeypatch):
    x_0 = images_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert make(ssim=1.0).loss(x_0).dtype == torch.float32
    monkeypatch.setattr("stage2_diffusion.denoiser.similarity", None)
    make().loss(x_0)
    with pytest.raises(TypeError):
        make(ssim=1.0).loss(x_0)


def test_latents_too_small_for_the_window_of_ssim_are_refused():
    block = {"schedule": "flow", "prediction": "x0", "time": "uniform", "shift": 1.0, "ssim": 0.1}
    backbone = {"name": "unet", "width": 8, "heads": 1}
    build_denoiser(backbone, block, latent_shape=(1, 6, 6)).loss(torch.randn(2, 1, 6, 6))
    with pytest.raises(UserError, match=r"^diffusion\.ssim looks through a window that latents of 5 x 6 do not fill"):
        build_denoiser(backbone, block, latent_shape=(1, 5, 6))


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
def test_forward_turns_the_right_answer_into_x_0(prediction, schedule):
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 4, 2, 3, 3)
    denoiser: Denoiser = make(prediction, schedule, lambda x, t: target(prediction, x_0, eps, *denoiser.schedule(t)))
    t = torch.tensor([0.01, 0.3, 0.6, 0.9])
    alpha, sigma = denoiser.schedule(t)
    torch.testing.assert_close(denoiser(alpha * x_0 + sigma * eps, t), x_0, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("prediction", "expected"), [("velocity", lambda x, y: x - 0.01 * y), ("x0", lambda x, y: y)])
def test_conversions_stay_float32_whatever_the_network_computes_in(prediction, expected):
    """Near t = 0 the estimate is x_t less a little: bfloat16 arithmetic would round it to three digits."""
    x_t = torch.randn(4, 2, 3, 3)
    denoiser = make(prediction, "flow", lambda x, t: x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out = denoiser(x_t, torch.full((4,), 0.01))
        loss = denoiser.loss(x_t)
    assert out.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(out, expected(x_t, x_t.bfloat16().float()), rtol=0, atol=1e-6)


def times_seen(n=4000, **options):
    torch.manual_seed(0)
    denoiser = make(**options)
    denoiser.loss(torch.zeros(n, 1, 1, 1))
    return denoiser.backbone.t, denoiser.schedule


def kolmogorov(values, cdf):
    grid = (np.arange(len(values)) + 0.5) / len(values)
    return np.abs(cdf(np.sort(values.numpy())) - grid).max()


@pytest.mark.parametrize("schedule", CURVES)
def test_uniform_times_fill_the_range_of_the_schedule(schedule):
    t, process = times_seen(prediction="eps", schedule=schedule)
    assert kolmogorov(t / process.t_max, lambda u: u) < 1e-3
    assert process.t_max * 0.999 < t.max() <= process.t_max


def test_logit_normal_times_are_normal_under_the_logit():
    t, _ = times_seen(time_distribution="logit_normal", time_mean=0.4, time_std=1.3)
    normal = torch.distributions.Normal(0.4, 1.3)
    assert kolmogorov(t.logit(), lambda x: normal.cdf(torch.from_numpy(x)).numpy()) < 1e-3


def test_on_the_flow_logit_normal_is_the_log_normal_of_edm():
    t, process = times_seen(time_distribution="logit_normal", time_mean=-1.2, time_std=1.2)
    alpha, sigma = (a.flatten() for a in process(t.double()))
    normal = torch.distributions.Normal(-1.2, 1.2)
    assert kolmogorov((sigma / alpha).log(), lambda x: normal.cdf(torch.from_numpy(x)).numpy()) < 1e-3


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_every_place_of_a_batch_sees_all_times(distribution):
    """The strata are shuffled: a batch sorted by class must not tie a class to a noise level."""
    torch.manual_seed(0)
    denoiser = make(time_distribution=distribution)
    seen = []
    for _ in range(2000):
        denoiser.loss(torch.zeros(4, 1, 1, 1))
        seen.append(denoiser.backbone.t)
    t = torch.stack(seen)
    cdf = (lambda u: u) if distribution == "uniform" else (lambda u: torch.special.ndtr(torch.from_numpy(u).logit()))
    for place in range(4):
        assert kolmogorov(t[:, place], lambda u: np.asarray(cdf(u))) < 0.04


def test_stratified_times_quieten_the_loss_of_a_batch():
    torch.manual_seed(0)
    denoiser = make("x0", "flow", lambda x, t: (1 - t[:, None, None, None]).expand_as(x))
    means = torch.stack([denoiser.loss(torch.zeros(64, 1, 1, 1)).mean() for _ in range(200)])
    independent = (1 - torch.rand(200, 64)).square().mean(1)
    assert means.mean().item() == pytest.approx(1 / 3, abs=0.005)
    assert means.std() < independent.std() / 10


def test_the_loss_is_the_global_generators():
    denoiser, x_0, cond = make(cond_dim=3, answer=lambda x, t: 0.5 * x), torch.randn(8, 2, 3, 3), torch.randn(8, 2)
    torch.manual_seed(3)
    first = denoiser.loss(x_0, cond)
    torch.manual_seed(3)
    assert torch.equal(denoiser.loss(x_0, cond), first)
    assert not torch.equal(denoiser.loss(x_0, cond), first)


def test_a_condition_carries_its_flag_and_none_is_all_zeros():
    denoiser = make(cond_dim=3)
    x, t = torch.zeros(2, 1, 1, 1), torch.full((2,), 0.5)
    denoiser(x, t, torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert denoiser.backbone.cond.tolist() == [[0, 0, 1], [1, -2, 1]]
    denoiser(x, t)
    assert denoiser.backbone.cond.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_an_unconditional_backbone_gets_no_condition():
    denoiser = make()
    denoiser(torch.zeros(2, 1, 1, 1), torch.full((2,), 0.5))
    assert denoiser.backbone.cond is None
    with pytest.raises(ValueError, match=r"\(2, 0\), got \(2, 3\)"):
        denoiser(torch.zeros(2, 1, 1, 1), torch.full((2,), 0.5), torch.zeros(2, 3))


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_conditions_drop_out_sample_by_sample_in_training_alone(dropout):
    torch.manual_seed(0)
    denoiser = make(cond_dim=2, cond_dropout=dropout)
    cond = torch.full((4000, 1), 5.0)
    denoiser.loss(torch.zeros(4000, 1, 1, 1), cond)
    seen = denoiser.backbone.cond
    assert (seen[:, 0] == 5 * seen[:, 1]).all()
    assert 1 - seen[:, 1].mean().item() == pytest.approx(dropout, abs=0.02)
    denoiser.eval().loss(torch.zeros(4000, 1, 1, 1), cond)
    assert denoiser.backbone.cond[:, 1].all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_velocity_is_for_the_flow(schedule):
    with pytest.raises(ValueError, match=f"velocity needs schedule flow, got {schedule}; eps, x0 and v go with any"):
        make("velocity", schedule)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid", "flow"])
def test_eps_refuses_pure_noise_and_says_what_to_do(schedule):
    with pytest.raises(ValueError, match=f"pure noise of schedule {schedule}.*zero_terminal=False"):
        Denoiser(Recorder(), NoiseSchedule(schedule), "eps")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown prediction 'noise'; one of eps, x0, v, velocity"):
        make("noise")
    with pytest.raises(ValueError, match="unknown weighting 'snr'; one of uniform, min_snr, velocity"):
        make(weighting="snr")
    with pytest.raises(ValueError, match="unknown time distribution 'normal'"):
        make(time_distribution="normal")
