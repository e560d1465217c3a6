"""What was measured of sets of images, compared with real ones: each score beside its floor."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from shared.data import symmetries
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation import protocols
from shared.evaluation.measure import (
    ImageSet,
    Measure,
    Measured,
    features_of,
    measure,
    of_data,
    remembered,
    short_hash,
    source,
)
from shared.evaluation.protocols import Protocol
from shared.metrics import distribution, fid, memorisation, physics, two_sample, use

TOLD_APART, FEWEST = 500, 20  # images a side that the classifier learns from, at most and at least
LEARNT = 2500  # samples that a classifier of classes learns from, at most: they are held in memory


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
    it should not. UserError if there are too few different images."""
    n = min(TOLD_APART, len(reference))

    def apart(one: ImageSet) -> dict[str, Any]:
        return asdict(two_sample.classifier_two_sample(one.first(n), reference.first(n)))

    what = f"told from {n} of {reference.key}, {source(two_sample)}"
    return {
        name: remembered(one, what, partial(apart, one))
        for name, one in tqdm({"real": real, **candidates}.items(), desc="two-sample", disable=None, leave=False)
    }


def memory(reference: LensImages, unseen: np.ndarray, samples: ImageSet) -> dict[str, Any]:
    """Whether training images are among the samples: {places: Memorisation as plain types}, in the places that the data's
    symmetries allow, or as they are where those are not known, and turned in all ways.

    unseen   places of images that neither the training nor the samples have to do with: how near chance brings samples
    """
    known, whole = symmetries.allowed(reference), symmetries.group(*reference.image_shape[1:])
    places = {"as allowed" if known else "as they are": known or ("identity",), "turned": whole}
    transform = reference.transform
    sets = [samples, of_data(reference, reference.split("train")), of_data(reference, unseen)]
    seen = [one.changed("seen", lambda images, _: transform.unit(images)) for one in sets]

    def search() -> dict[str, Any]:
        with tqdm(total=sum(map(len, sets)), desc="copies", unit="image", disable=None, leave=False) as bar:
            found = memorisation.memorisation(*seen, places=places, progress=bar.update)
        return {name: one.to_dict() for name, one in found.items()}

    code = source(memorisation, two_sample)
    what = f"copies from {reference.fingerprint} {_digest(unseen)} {places} {transform.to_config()} {code}"
    return remembered(samples, what, search)


def usefulness(reference: LensImages, unseen: np.ndarray, samples: ImageSet, kinds: np.ndarray) -> dict[str, Any]:
    """What a classifier of the data's classes learns from samples (N,) that were asked to be of `kinds`, names, and how it
    judges them: {training → test: Classifier}, real → real being the ceiling. `unseen`: places of test images whose parameters
    no sample was asked for.

    UserError if the data have no classes, or too few images of one.
    """
    classes = list(reference.index.get("classes") or [])
    chosen = np.flatnonzero(np.isin(kinds, classes))[:LEARNT]  # others were asked for nothing, or for what is not here
    labels, train = np.asarray(reference.index.get("labels") or []), reference.split("train")
    elements = symmetries.allowed(reference) or ("identity",)

    def learn() -> dict[str, Any]:
        if len(classes) < 2 or not len(chosen):
            raise UserError("the data have no classes that the samples were asked to be of")
        asked = np.array([classes.index(kind) for kind in kinds[chosen]])
        found = use.use(
            (of_data(reference, train), labels[train]), (of_data(reference, unseen), labels[unseen]),
            (samples.get(chosen), asked), classes, elements=elements,
        )  # fmt: skip
        return {name: asdict(one) for name, one in found.items()}

    what = (
        f"use for {reference.fingerprint} {_digest(labels)} {_digest(unseen)} {_digest(kinds)} {elements} {source(use)}"
    )
    return remembered(samples, what, learn)


def _digest(values: np.ndarray) -> str:
    return short_hash(repr(values.tolist()))


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
            seen = protocol.view((images - transform.low) / (transform.high - transform.low))
            return {"features": fid.features(network, seen, (0.0, 1.0)).astype(np.float32)}

        one = Measure(f"{native.name}, {protocol.name}", identity, call)
        features = {}
        with tqdm(total=protocol.n * len(sets), desc=protocol.name, unit="image", disable=None, leave=False) as bar:
            for name, images in sets.items():
                features[name] = measure(images, [one], bar.update)[one.name]["features"]
        found = {name: features[name] for name in candidates}
        value_range = (transform.low, transform.high)
        rule = f"{protocol.name}: {protocol.rule}"
        scores = fid.score(features["reference"], features["real"], found, network, value_range, stretch=rule)
        distances[network.metric] = {name: score.to_dict() for name, score in scores.items()}
    return {"about": protocol.about, "n": protocol.n, "against": protocol.against, "distances": distances}
