"""What was measured of sets of images, compared with real ones: each score beside its floor."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from shared.data import symmetries
from shared.data.cache import LensImages
from shared.evaluation import protocols
from shared.evaluation.measure import ImageSet, Measure, Measured, features_of, measure, of_data, source
from shared.evaluation.protocols import Protocol
from shared.metrics import distribution, fid, physics, two_sample, use
from shared.metrics.memorisation import Memorisation, memorisation

TOLD_APART, FEWEST = 500, 20  # images a side that the classifier learns from, at most and at least


def compare(reference: Measured, real: Measured, candidates: Mapping[str, Measured]) -> dict[str, Any]:
    """Scores of each candidate beside the floor, that of the other half of the real images, as plain types:

    distances   {metric: {candidate: Score}}
    physics     {candidate: {quantity: {w1, floor, ratio, p, p_holm}}}
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


def distributions(reference: Measured, real: Measured, candidates: Mapping[str, Measured]) -> dict[str, Any]:
    """{metric of a distance: what `distribution.scores` finds in the features of its network}."""
    found = {}
    for network in reference.networks:
        features = {name: one.features[network.metric] for name, one in candidates.items()}
        near, far = (one.features[network.metric] for one in (reference, real))
        logits = getattr(network, "logits", None)
        found[network.metric] = distribution.scores(near, far, features, logits=logits)
    return found


def curves(real: Measured, candidates: Mapping[str, Measured]) -> dict[str, Any]:
    """What is a function, beside that of real images, as plain types:

    spectrum  {k, candidate: {mean, mean_low, mean_high, sd, ...}}: power over that of real images, with 95 % intervals
    noise     {set: {signal, variance, pixels}}, `real` among them, where there are pixels, in units of the range
    """
    spectra: dict[str, Any] = {"k": real.k.tolist()}
    for name, one in candidates.items():
        ratio = physics.spectrum_ratio(real.power, one.power)
        spectra[name] = {field.name: getattr(ratio, field.name).tolist() for field in fields(ratio)}
    noise = {}
    for name, one in {"real": real, **candidates}.items():
        curve = one.noise
        some = curve.pixels > 0
        noise[name] = {key: getattr(curve, key)[some].tolist() for key in ("signal", "variance", "pixels")}
    return {"spectrum": spectra, "noise": noise}


def told_apart(reference: ImageSet, real: ImageSet, candidates: Mapping[str, ImageSet]) -> dict[str, Any]:
    """Whether a classifier can tell sets from `reference`: {set: {n_a, n_b, auc, auc_interval, ...}}, `real` among them, which
    it should not."""
    return {name: asdict(_told_apart(one, reference)) for name, one in {"real": real, **candidates}.items()}


@lru_cache(maxsize=4)  # of several judgements by the same real images
def _told_apart(one: ImageSet, reference: ImageSet) -> two_sample.Classified:
    n = min(TOLD_APART, len(reference))
    return two_sample.classifier_two_sample(one.first(n), reference.first(n))


def memory(reference: LensImages, samples: ImageSet) -> dict[str, Memorisation]:
    """Whether training images are among the samples: in the places that the data's symmetries allow, or as they are where
    those are not known, and turned in all ways."""
    known, whole = symmetries.allowed(reference), symmetries.group(*reference.image_shape[1:])
    places = {"as allowed" if known else "as they are": known or ("identity",), "turned": whole}
    transform = reference.transform
    sets = [samples, *(of_data(reference, reference.split(name)) for name in ("train", "test"))]
    seen = [one.changed("seen", lambda images, _: transform.unit(images)) for one in sets]
    with tqdm(total=sum(map(len, sets)), desc="copies", unit="image", disable=None, leave=False) as bar:
        return memorisation(*seen, places=places, progress=bar.update)


def usefulness(
    reference: LensImages, far: np.ndarray, samples: ImageSet, kinds: np.ndarray
) -> dict[str, dict[str, Any]]:
    """What a classifier of the data's classes learns from samples (N,) that were asked to be of `kinds`, names, and how it
    judges them: {training → test: Classifier}, real → real being the ceiling. `far`: places of test images."""
    classes = list(reference.index["classes"])
    labels = np.asarray(reference.index["labels"])
    train = reference.split("train")
    asked = np.array([classes.index(kind) for kind in kinds])
    found = use.use(
        (of_data(reference, train), labels[train]),
        (of_data(reference, far), labels[far]),
        (samples, asked),
        classes,
        elements=symmetries.allowed(reference) or ("identity",),
    )
    return {name: asdict(one) for name, one in found.items()}


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
