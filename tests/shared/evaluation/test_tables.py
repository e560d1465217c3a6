import json

from shared.evaluation.tables import finite, physics_rows


def test_a_quantity_without_scatter_among_real_images_has_no_ratio() -> None:
    scores = {
        "reconstructions": {"peak": {"w1": 0.02, "floor": 0.0, "ratio": float("inf")}},
        "samples": {"peak": {"w1": 0.034, "floor": 0.0, "ratio": float("inf")}},
    }
    assert physics_rows(scores)[1:] == [["peak", "0", "0.02", "0.034"]]
    scores = {k: {"flux": {"w1": 0.03, "floor": 0.02, "ratio": 1.5}} for k in scores}
    header, *rows = physics_rows(scores)
    assert header == ["quantity", "real", "reconstructions", "samples"]
    assert rows == [["flux", "0.02", "0.03 (× 1.50)", "0.03 (× 1.50)"]]


def test_metrics_stay_json_where_a_number_is_infinite() -> None:
    assert json.loads(json.dumps(finite({"a": {"b": float("inf")}, "c": 1.5}), allow_nan=False)) == {
        "a": {"b": None},
        "c": 1.5,
    }
