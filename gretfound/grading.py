"""Grading: whether a drawn photograph shows what its row says, by graders that were fitted on the hub's real ones.

A grader of a column is a logistic regression on features, the probe of `gretfound.fine_tuning`, whose answers are as if
both values were alike often. It grades only where patients whom it had not seen say that it can. What was decided is
one JSON text in the run's folder, written before anything is drawn; every actor and every restart reads that one.

Legend of array suffixes: N photographs, D features.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gretfound import fine_tuning, lineage, storage
from gretfound.agreement import MIN_PATIENTS_PER_CLASS, Collection
from gretfound.evaluation import features
from gretfound.evaluation.fidelity import Space
from gretfound.fundus import Photograph
from gretfound.metadata import Cells

log = logging.getLogger(__name__)
MIN_AUROC = 0.75  # of patients not seen
NAME = "graders.json"
WORDS = ("no", "yes")


def fit(key: str, collections: Sequence[Collection], *, seed: int) -> dict[str, Any]:
    """Fits the grader of one column on real photographs, as plain values; ``missing`` says why it will not grade.

    A site counts where each value is of `MIN_PATIENTS_PER_CLASS` patients or more, and only photographs of one site are
    compared for the AUROC: who tells sites apart by their cameras shall not pass for one who sees disease.
    """
    rows = [
        (feature_D, WORDS[bool(cells[key])], f"{site.site_id}/{patient or image_id}", site.site_id)
        for site in collections
        for feature_D, is_real, cells, patient, image_id in zip(
            site.features, site.is_real, site.cells, site.patients, site.image_ids, strict=True
        )
        if is_real and cells.get(key) is not None
    ]
    num_patients = {
        (site.site_id, word): len({row[2] for row in rows if row[1] == word and row[3] == site.site_id})
        for site in collections
        for word in WORDS
    }
    kept = [row for row in rows if min(num_patients[row[3], word] for word in WORDS) >= MIN_PATIENTS_PER_CLASS]
    if not kept:
        return {"missing": f"no site has {MIN_PATIENTS_PER_CLASS} patients of each value"}
    feature_ND, (labels, patients, sites) = (
        np.stack([row[0] for row in kept]),
        ([r[i] for r in kept] for i in (1, 2, 3)),
    )
    head, found = fine_tuning.fit_head(
        feature_ND, labels, patients, label_column=key, release_id="", seed=seed, groups=sites
    )
    weight_D = head.weight[1].astype(np.float64) - head.weight[0]
    prior = np.log(labels.count("yes") / labels.count("no"))
    is_able = found.figure["value"] >= MIN_AUROC and found.figure["low"] > 0.5
    return {
        "missing": "" if is_able else f"required an AUROC of {MIN_AUROC:g} and an interval above 0.5",
        "auroc": found.figure,
        "num_images": len(kept),
        "num_patients": len(set(patients)),
        "weight": weight_D.tolist(),
        "bias": float(head.bias[1] - head.bias[0] - prior),
    }


def decide(uri: str, graders: Mapping[str, Mapping[str, Any]], *, encoder_id: str, min_agreement: float) -> None:
    """Writes what grades a run, unless it was decided before."""
    for key, grader in graders.items():
        log.info("%s: %s", key, grader["missing"] or f"graded, AUROC {grader['auroc']['value']:.2f}")
    content = {"encoder_id": encoder_id, "min_agreement": min_agreement, "graders": dict(graders)}
    storage.create_bytes(uri, lineage.canonical_json(content))


@dataclass(frozen=True, kw_only=True)
class Graders:
    """The graders of a run: linear functions on a space, and the least probability that a row's value must have."""

    space: Space
    min_agreement: float
    graders: Mapping[str, Mapping[str, Any]]

    def judge(self, images: Sequence[Photograph], cells: Sequence[Cells]) -> list[str | None]:
        """Returns why each photograph is left out, or None where no grader says that its row is wrong."""
        feature_ND = self.space(images).astype(np.float64)
        reasons: list[str | None] = [None] * len(images)
        for key, grader in self.graders.items():
            if grader["missing"]:
                continue
            logit_N = feature_ND @ np.array(grader["weight"]) + grader["bias"]
            for place, row in enumerate(cells):
                if row.get(key) is None:
                    continue
                probability = 1.0 / (1.0 + np.exp(-np.clip(logit_N[place] if row[key] else -logit_N[place], -50, 50)))
                if probability < self.min_agreement:
                    reasons[place] = reasons[place] or f"contradicts {key}"
        return reasons


def read(hub_uri: str, uri: str, *, device: str) -> Graders:
    """Reads what was decided for a run."""
    content = storage.read_json(uri)
    return Graders(
        space=features.space_of(hub_uri, content["encoder_id"], device=device),
        min_agreement=content["min_agreement"],
        graders=content["graders"],
    )
