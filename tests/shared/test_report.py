"""Figures of the report."""

from pathlib import Path

import pytest

from shared import report

ROWS = "step,train/loss,validation/psnr,validation/x0_error\n1,3.0,,\n2,1.0,40.0,0.5\n3,0.5,41.0,0.4\n"


def test_the_legend_names_every_curve_and_covers_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_text(ROWS)
    drawn = []
    rasterise = report.rasterise
    monkeypatch.setattr(report, "rasterise", lambda figure: drawn.append(figure) or rasterise(figure))
    assert report.loss_curves({"none": tmp_path / "none.csv"}) is None
    picture = report.loss_curves({"one": tmp_path / "metrics.csv", "two": tmp_path / "metrics.csv"})
    assert picture is not None
    assert picture.width > 900
    legends = [axis.get_legend() for axis in drawn[0].axes if axis.get_legend()]
    assert len(legends) == 2
    for legend in legends:
        assert [text.get_text() for text in legend.get_texts()] == [
            "train/loss",
            "validation/x0_error",
            "validation/psnr",
        ]
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.get_window_extent()) for axis in drawn[0].axes)
        assert not any(box.overlaps(axis.xaxis.label.get_window_extent()) for axis in drawn[0].axes)
        assert box.ymin >= 0
        assert 0 <= box.xmin < box.xmax <= picture.width
