"""What was measured of sets of images, compared with real ones: each score beside its floor."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from shared.data.cache import LensImages
from shared.evaluation import protocols
from shared.evaluation.measure import ImageSet, Measure, Measured, features_of, measure, source
from shared.evaluation.protocols import Protocol
from shared.metrics import fid, physics, two_sample

TOLD_APART, FEWEST = 500, 20  # images a side that the classifier learns from, at most and at least


def compare(reference: Measured, real: Measured, candidates: Mapping[str, Measured]) -> dict[str, Any]:
    """Scores of each candidate beside the floor, that of the other half of the real images, as plain types:

    distances   {metric: {candidate: Score}}
    physics     {candidate: {quantity: {w1, floor, ratio}}}
    """
    transform, distances = reference.transform, {}
    for network in reference.networks:
        found = {name: one.features[network.metric] for name, one in candidates.items()}
        near, far = (one.features[network.metric] for one in (reference, real))
        value_range = (transform.low, transform.high)
        scores = fid.score(near, far, found, network, value_range, stretch=transform.stretched)
        distances[network.metric] = {name: score.to_dict() for name, score in scores.items()}
    pairs = reference.summaries, real.summaries
    compared = {name: physics.compare(*pairs, one.summaries) for name, one in candidates.items()}
    return {"distances": distances, "physics": compared}


def told_apart(reference: ImageSet, real: ImageSet, candidates: Mapping[str, ImageSet]) -> dict[str, Any]:
    """Whether a classifier can tell sets from `reference`: {set: {n_a, n_b, auc, auc_interval, ...}}, `real` among them, which
    it should not."""
    n = min(TOLD_APART, len(reference))
    base = reference.first(n)
    return {
        name: two_sample.classifier_two_sample(one.first(n), base).__dict__
        for name, one in {"real": real, **candidates}.items()
    }


def under_protocol(
    protocol: Protocol,
    reference: LensImages,
    candidates: Mapping[str, ImageSet],
    networks: list[fid.Network],
) -> dict[str, Any]:
    """{about, n, against, distances: {metric: {candidate: Score}}} of the first images of each candidate."""
    near, far = protocol.sets(reference)
    first = np.arange(protocol.n)
    sets = {"reference": near, "real": far, **{name: one.subset(first) for name, one in candidates.items()}}
    transform, distances = reference.transform, {}

    for network in networks:
        native = features_of(network, transform)
        identity = f"{protocol.name} {native.identity} {source(protocols)}"

        def call(images: Tensor, network: fid.Network = network) -> dict[str, np.ndarray]:
            return {
                "features": fid.features(network, protocol.view(transform.unit(images)), (0.0, 1.0)).astype(np.float32)
            }

        one = Measure(f"{native.name}, {protocol.name}", identity, call)
        features = {}
        with tqdm(total=protocol.n * len(sets), desc=protocol.name, unit="image", disable=None, leave=False) as bar:
            for name, images in sets.items():
                features[name] = measure(images, [one], bar.update)[one.name]["features"]
        found = {name: features[name] for name in candidates}
        value_range = (transform.low, transform.high)
        scores = fid.score(features["reference"], features["real"], found, network, value_range)
        distances[network.metric] = {name: score.to_dict() for name, score in scores.items()}
    return {"about": protocol.about, "n": protocol.n, "against": protocol.against, "distances": distances}
