"""What an evaluation asks of the images it compares with."""

from pathlib import Path

import numpy as np
import pytest

from shared.data.cache import CacheWriter, LensImages
from shared.errors import UserError
from shared.evaluation.reference import check_count


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_images_of_bands_that_no_score_is_of_are_refused_before_anything_is_measured(
    tmp_path: Path, bands: int
) -> None:
    writer = CacheWriter(tmp_path / "data", 200, (bands, 8, 8), {"kind": "test"})
    for chunk in writer.pending():
        writer.write(chunk, np.random.default_rng(0).random((len(chunk), bands, 8, 8), np.float32))
    writer.finish()
    images = LensImages(tmp_path / "data")
    if bands in (1, 3):
        assert check_count(images, "data", 4) == 4
        return
    with pytest.raises(UserError, match=f"data has images of {bands} bands: scores are of one band, or of three"):
        check_count(images, "data", 4)
