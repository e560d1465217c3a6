"""Pictures and the one-file HTML report."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from shared.files import write_atomically


def colour(
    images: Tensor | np.ndarray, value_range: tuple[float, float] = (0.0, 1.0), cmap: str = "inferno"
) -> np.ndarray:
    """(N, C, H, W) -> (N, H, W, 3) uint8: `cmap` for one channel (the first of several, unless there are three)."""
    x = torch.as_tensor(np.asarray(images)).float()
    x = ((x - value_range[0]) / (value_range[1] - value_range[0])).clamp(0, 1)
    if x.shape[1] == 3:
        return (x.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return np.asarray(matplotlib.colormaps[cmap](x[:, 0].numpy(), bytes=True)[..., :3])


def grid(
    images: Tensor | np.ndarray, columns: int = 8, value_range: tuple[float, float] = (0.0, 1.0), title: str = ""
) -> Image.Image:
    """(N, C, H, W) -> a sheet of pictures, two pixels apart, with a line of text above."""
    return sheet(colour(images, value_range), columns, title)


def sheet(pictures: np.ndarray, columns: int = 8, title: str = "") -> Image.Image:
    """`grid` of pictures that have their colours, (N, H, W, 3) uint8."""
    n, height, width, _ = pictures.shape
    columns = min(columns, n)
    rows, gap, top = -(-n // columns), 2, 18 if title else 0
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap + top), (24, 24, 28))
    for i, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), ((i % columns) * (width + gap), top + (i // columns) * (height + gap)))
    if title:
        ImageDraw.Draw(page).text((4, 3), title, fill=(230, 230, 230))
    return page


def rows(named: Mapping[str, Tensor | np.ndarray], value_range: tuple[float, float] = (0.0, 1.0)) -> Image.Image:
    """{name: (N, C, H, W)} -> one row of pictures below the other, each under its name."""
    parts = [grid(images, len(images), value_range, title=name) for name, images in named.items()]
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), (24, 24, 28))
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def save_grid(
    path: Path, images: Tensor | np.ndarray, *, metadata: dict[str, Any] | None = None, **options: Any
) -> None:
    """`grid` as a PNG; metadata go into its text chunk `parameters` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text("parameters", json.dumps(metadata))
    save_picture(path, grid(images, **options), pnginfo=info)


def save_picture(path: Path, picture: Image.Image, **options: Any) -> None:
    """A picture as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    write_atomically(path, buffer.getvalue())


# --- the report -------------------------------------------------------------------------------------------------------

STYLE = """
:root {color-scheme: light dark; --ink: #1b1b22; --soft: #5a5a66; --page: #fff; --card: #f3f3f6; --line: #c9c9d2;
  --good: #00603f; --bad: #9a3a00}
@media (prefers-color-scheme: dark) {:root {--ink: #e8e8ee; --soft: #a5a5b2; --page: #16161b; --card: #24242c;
  --line: #45454f; --good: #5fd3ac; --bad: #ffa15c}}
body {font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page)}
h1 {font-size: 1.7rem; margin-bottom: 0} h2 {font-size: 1.2rem; margin: 2.2rem 0 .4rem}
img {max-width: 100%; display: block; margin: .6rem 0; background: #fff; border-radius: 3px}
p {max-width: 52rem} small, .note {color: var(--soft)} .wide {overflow-x: auto}
table {border-collapse: collapse; margin: .6rem 0} th, td {padding: .25rem .9rem .25rem 0; text-align: left}
th {border-bottom: 1px solid var(--line); font-weight: 600} td.n {text-align: right}
td {font-variant-numeric: tabular-nums}
pre {background: var(--card); padding: .7rem; overflow-x: auto; font-size: .85rem}
.verdict {background: var(--card); border-left: 4px solid var(--line); padding: .6rem 1rem; margin: 1rem 0; list-style: none}
.verdict li {margin: .25rem 0} .verdict b {display: inline-block; min-width: 5.2rem}
.good b {color: var(--good)} .bad b {color: var(--bad)}
"""
MARKS = {True: "✓ as real", False: "✗ not so"}  # words beside the colours: not everybody tells those apart


class Report:
    """One HTML file with everything in it: opens from any file system, needs no server and no network."""

    def __init__(self, title: str, subtitle: str) -> None:
        self.title = title
        self.blocks = [f"<h1>{html.escape(title)}</h1>"]
        self.note(subtitle)

    def section(self, heading: str, text: str = "") -> "Report":
        self.blocks.append(f"<h2>{html.escape(heading)}</h2>" + (f"<p>{html.escape(text)}</p>" if text else ""))
        return self

    def verdict(self, lines: Sequence[tuple[bool, str]]) -> "Report":
        """What it comes to: whether each line is good news, and the line."""
        items = (
            f'<li class="{"good" if good else "bad"}"><b>{MARKS[good]}</b> {html.escape(text)}</li>'
            for good, text in lines
        )
        self.blocks.append(f'<ul class="verdict">{"".join(items)}</ul>')
        return self

    def note(self, text: str) -> "Report":
        self.blocks.append(f'<p class="note">{html.escape(text)}</p>')
        return self

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Report":
        def cell(value: Any) -> str:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            return f'<td class="n">{text}</td>' if number else f"<td>{html.escape(text)}</td>"

        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
        self.blocks.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')
        return self

    def picture(self, image: Image.Image, alt: str) -> "Report":
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._image(buffer.getvalue(), "png", alt)

    def film(self, frames: Sequence[Image.Image], alt: str) -> "Report":
        """Pictures one after the other, over and over, the last one longest."""
        return self._image(gif(frames), "gif", alt)

    def _image(self, content: bytes, kind: str, alt: str) -> "Report":
        data = base64.b64encode(content).decode()
        self.blocks.append(f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">')
        return self

    def listing(self, text: str) -> "Report":
        self.blocks.append(f"<pre>{html.escape(text)}</pre>")
        return self

    def write(self, path: Path) -> None:
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        head += f"<title>{html.escape(self.title)}</title><style>{STYLE}</style>"
        write_atomically(
            path, f"<!doctype html><html><head>{head}</head><body>{''.join(self.blocks)}</body></html>".encode()
        )


def gif(frames: Sequence[Image.Image], seconds: float = 0.4) -> bytes:
    """Pictures as an animation that starts over, the last one shown five times as long."""
    buffer, shown = io.BytesIO(), [1000 * seconds] * (len(frames) - 1) + [5000 * seconds]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0)
    return buffer.getvalue()


# Okabe and Ito's colours, which people of all kinds of sight tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def colour_of(j: int) -> str:
    """The colour of the j-th line of a figure."""
    return COLOURS[j % len(COLOURS)]


def style_of(j: int) -> dict[str, Any]:
    """Colour, dashes and marker of the j-th line of a figure with many."""
    return {"color": colour_of(j), "ls": ("-", "--")[j // len(COLOURS) % 2], "marker": "os^Dv<>P*X"[j % 10]}


def panels(count: int, width: float = 5.2, height: float = 3.2, columns: int | None = None) -> tuple[Any, list[Any]]:
    """A matplotlib figure with `count` axes, all side by side or in rows of `columns`, without pyplot's global state."""
    columns = min(columns or count, count)
    rows = -(-count // columns)
    figure = matplotlib.figure.Figure(figsize=(width * columns, height * rows), dpi=90, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_prop_cycle(color=COLOURS)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, list(axes[:count])


def rasterise(figure: Any) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def loss_curves(runs: dict[str, Path]) -> Image.Image | None:
    """Training loss and held-out metric against the step, from each run's metrics.csv; None where there is none."""
    found = {name: rows for name, path in runs.items() if (rows := read_metrics(path))}
    if not found:
        return None
    figure, axes = panels(len(found))
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        lines = []
        for column, style in (("train/loss", "-"), ("validation/x0_error", "o-"), ("validation/psnr", "s--")):
            points = [(row["step"], row[column]) for row in rows if column in row]
            if points:
                target = axis.twinx() if column.endswith("psnr") else axis
                lines += target.plot(
                    *zip(*points, strict=True),
                    style,
                    ms=4,
                    lw=1.2,
                    label=column,
                    color=colour_of(2) if "psnr" in column else None,
                )
                if column.endswith("psnr"):
                    target.set_ylabel("PSNR of held-out images [dB]", color=colour_of(2))
        axis.set(title=name, xlabel="step", yscale="log")
        # Below the panel: wherever in it, it would cover what some run has drawn there.
        axis.legend(handles=lines, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    return rasterise(figure)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """metrics.csv -> its rows, each with the numbers that it has."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
