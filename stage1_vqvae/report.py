"""What `evaluate-vqvae` shows: its pictures, its table of single numbers, its page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from shared.data.normalise import PixelTransform
from shared.evaluation.tables import physics_rows, score_rows, spectra
from shared.report import Report, colour, colour_of, grid, loss_curves, panels, rasterise, sheet

SHOWN = 8  # images a row
SIGMAS = 5.0  # the range of residuals


def draw(metrics: dict[str, Any], found: dict[str, Any]) -> dict[str, Image.Image]:
    """The pictures by name, in the order of the report."""
    transform = PixelTransform.from_config(metrics)
    real, clean, observed, _ = found["shown"]
    rows = transform.unit(torch.cat([real, observed, clean]))
    title = "test images, none picked; their reconstructions, observed; the same, clean"
    pictures = {"reconstructions": grid(rows, len(real), title=title)}
    real, clean, _, variance = found["worst"]
    sigma = variance.clamp_min(1e-60).sqrt()
    columns = min(SHOWN, len(real))
    parts = []
    for start in range(0, len(real) - columns + 1, columns):  # whole rows: each below its own image
        part = slice(start, start + columns)
        parts += [colour(transform.unit(images[part])) for images in (real, clean)]
        # Purple and orange: told apart by whoever cannot tell red from green.
        parts.append(colour(((real - clean) / sigma)[part], (-SIGMAS, SIGMAS), "PuOr_r"))
    chi2 = ", ".join(f"{value:.2f}" for value in metrics["worst"]["chi2_lit"][:SHOWN])
    title = f"image, clean reconstruction, residual +-{SIGMAS:g} sigma; chi2 per lit pixel {chi2}, ..."
    pictures["worst"] = sheet(np.concatenate(parts), columns, title)
    pictures["noise"] = noise_figure(metrics["noise"])
    pictures["spectra"] = spectra(found["sets"])
    if metrics["codes"]:
        pictures["codes"] = codes_figure(found["codes"], metrics["codes"])
    return pictures


def noise_figure(noise: dict[str, Any]) -> Image.Image:
    """Variance against signal, its ratio to the law, and correlations of the residuals."""
    figure, (variance, ratio, correlation) = panels(3, width=4.4)
    sets = {"residuals": ("residuals", "correlation", colour_of(0)), "true noise": ("true", "true_correlation", "k")}
    for name, (curve, pairs, style) in sets.items():
        if curve not in noise:
            continue
        c = {key: np.asarray(values, float) for key, values in noise[curve].items()}
        few = c["pixels"] > 30
        variance.plot(c["signal"][few], c["variance"][few], "o-", ms=3, lw=1, color=style, label=name)
        ratio.plot(c["signal"][few], (c["variance"] / c["law"])[few], "o-", ms=3, lw=1, color=style, label=name)
        if name == "residuals":
            variance.plot(c["signal"][few], c["law"][few], "--", color=colour_of(1), label="the law")
        for where, marker in (("all", "o"), ("lit", "s")):
            for axis, line in (("x", "-"), ("y", ":")):
                values = noise[pairs][where][axis]
                lags = range(1, len(values) + 1)
                label = f"{name}, {where} pixels, {axis}"
                correlation.plot(lags, np.asarray(values, float), marker + line, ms=3, lw=1, color=style, label=label)
    variance.set(title="variance of a pixel", xlabel="signal above the background", xscale="log", yscale="log")
    ratio.set(title="over the law", xlabel="signal above the background", xscale="log")
    ratio.axhline(1, color=colour_of(1), ls="--", lw=1)
    correlation.set(title="correlation with neighbours", xlabel="pixels apart", xticks=lags)
    correlation.axhline(0, color="k", lw=0.6)
    for axes in (variance, ratio, correlation):
        axes.legend(fontsize=6, framealpha=0.4)
    return rasterise(figure)


def codes_figure(counts: list[np.ndarray], codes: dict[str, Any]) -> Image.Image:
    figure, (axes,) = panels(1, width=6)
    if "levels_used" in codes:
        for k, (count, used) in enumerate(zip(counts, codes["levels_used"], strict=True)):
            axes.plot(np.arange(len(count)), count, ".-", ms=3, lw=1, label=f"channel {k + 1}, {used:.0%} used")
        axes.set(yscale="symlog", xlabel="level", ylabel="times used")
        axes.legend(fontsize=8)
        return rasterise(figure)
    for k, head in enumerate(counts):
        label = f"head {k + 1}" if len(counts) > 1 else None
        axes.plot(np.arange(1, len(head) + 1), head, ".-", ms=3, lw=1, label=label)
    axes.axvline(codes["codes"], color="k", ls=":", lw=1, label=f"all {codes['codes']:.0f} codes")
    axes.set(xscale="log", yscale="log", xlabel="code, by use", ylabel="times used")
    axes.set_title(f"{codes['codes_used']:.1%} used, perplexity {codes['perplexity']:.0f}", fontsize=10)
    axes.legend(fontsize=8)
    return rasterise(figure)


def quality_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """The table of single numbers, header first; what is not known is left out."""
    rows = [["what", "value"]]

    def row(what: str, value: float | None, form: str) -> None:
        if value is not None:
            rows.append([what, format(value, form)])

    for against, what in (("truth", "the clean truth"), ("observed", "the observed images")):
        if scores := metrics[against]:
            row(f"PSNR to {what} [dB]", scores["psnr"], ".2f")
            row(f"SSIM to {what}", scores["ssim"], ".4f")
    if truth := metrics["truth"]:
        row(f"clean error / noise, lit ({truth['lit_share']:.1%})", truth["lit_error_over_noise"], ".4f")
        row("clean error / noise, dark", truth["dark_error_over_noise"], ".4f")
    row("clean error / noise, without truth", metrics["observed"]["clean_error_over_noise"], ".4f")
    drawn, real = (metrics["noise"]["dark"][name] for name in ("reconstructions", "real"))
    ratios = [f"{ours / theirs:.3f}" if theirs else "-" for ours, theirs in zip(drawn, real, strict=True)]
    rows.append([f"noise of dark pixels over real{', by band' * (len(ratios) > 1)}", ", ".join(ratios)])
    if codes := metrics["codes"]:
        row("perplexity", codes["perplexity"], ".1f")
        if "levels_used" in codes:
            rows.append(["levels used, by channel", ", ".join(f"{share:.0%}" for share in codes["levels_used"])])
        else:
            row("codes used", codes["codes_used"], ".1%")
            row("codes never used", codes["dead"], "d")
    for name in ("real", "reconstructions"):
        if fits := metrics.get("lens_fits"):
            row(f"lenses at the noise level, {name} (n = {fits['n']})", fits[name]["share"], ".1%")
    for name, form in (("encode_gflop", ".3f"), ("decode_gflop", ".3f"), ("encoded_per_second", ".0f"),
                       ("decoded_per_second", ".0f")):  # fmt: skip
        row(name.replace("_", " ").replace("gflop", "GFLOP"), metrics["cost"][name], form)
    return rows


def report(metrics: dict[str, Any], pictures: dict[str, Image.Image], config: dict[str, Any], model: Path) -> Report:
    """The one-file report."""
    transform, codes = PixelTransform.from_config(metrics), metrics["codes"]
    page = Report(
        f"lens-ldm, stage 1: {config['training']['name']}",
        f"{metrics['n']} test images of {metrics['reference']} through the autoencoder and back, beside {metrics['n']} others; "
        f"latents {' x '.join(map(str, metrics['latent_shape']))}. All pictures are on one scale, {transform.low:g} to "
        f"{transform.high:g}, {transform.stretched}.",
    )
    page.section("Reconstructions").picture(pictures["reconstructions"], "images and reconstructions")
    header, *rows = score_rows(metrics)
    page.section(
        "Distances",
        "Fréchet distance of observed reconstructions, with pixel noise, of one half of the test images to the other half. "
        "The floor is that of real images to real images. Truth is the clean light of the same lenses, with the noise that "
        "this model draws and with noise of the simulator: what no autoencoder can beat.",
    ).table(header, rows)
    header, *rows = quality_rows(metrics)
    page.section(
        "Quality",
        "Lit pixels are a tenth of full scale above the background. The error of the clean light is over the variance of "
        "the noise: 0.1 hides in a single image, and a fit of ten parameters sees it.",
    ).table(header, rows)
    page.section(
        "The worst", f"By chi² per lit pixel: {', '.join(f'{x:.2f}' for x in metrics['worst']['chi2_lit'])}."
    ).picture(pictures["worst"], "the worst reconstructions")
    page.section(
        "Noise",
        "Residuals are images less their clean reconstructions. If they are noise and nothing else they follow the law, and "
        "neighbours are not correlated.",
    ).picture(pictures["noise"], "variance against signal, correlation of residuals")
    page.section("Spectra").picture(pictures["spectra"], "power spectra and pixel values")
    if codes:
        page.section("Codes").picture(pictures["codes"], "how often each code is used")
    header, *rows = physics_rows(metrics["physics"])
    page.section(
        "Physics",
        "Wasserstein-1 distance of each quantity to real images, and how many times that between real images it is: 1 is "
        "perfect. Lengths in pixels, brightness in the data's range.",
    ).table(header, rows)
    if curves := loss_curves({"stage 1": model / "metrics.csv"}):
        page.section("Training").picture(curves, "loss curves")
    shown = {key: value for key, value in metrics.items() if key not in ("physics", "spectrum", "noise")}
    page.section("How it was made").listing(json.dumps(shown, indent=1))
    page.section("Configuration of stage 1").listing(yaml.safe_dump(config["training"], sort_keys=False))
    return page
