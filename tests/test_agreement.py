"""Agreement: a site whose labels are the other way round is named, in each of several draws, and no other ever is."""

from dataclasses import replace

import numpy as np
import pytest

from gretfound import agreement
from gretfound.agreement import Collection

SITES = ("aster", "birch", "cedar", "dune")


def draw(
    seed: int, *, sites: tuple[str, ...] = SITES, num_patients: int = 60, is_real: bool = True
) -> list[Collection]:
    """Draws features in which glaucoma shows, below what a camera does to them; two photographs a patient."""
    random = np.random.default_rng(seed)
    collections = []
    for site_id in sites:
        has_glaucoma = np.repeat(random.random(num_patients) < 0.4, 2)
        feature_ND = random.normal(0.0, 1.0, (2 * num_patients, 10)) + np.outer(has_glaucoma, np.r_[1.2, np.zeros(9)])
        camera_D = random.normal(0.0, 5.0, 10)
        collections.append(
            Collection(
                site_id=site_id,
                features=(feature_ND + camera_D).astype(np.float32),
                is_real=np.full(2 * num_patients, is_real),
                image_ids=tuple(f"{site_id}-{row}" for row in range(2 * num_patients)),
                patients=tuple(f"p{row // 2}" if is_real else "" for row in range(2 * num_patients)),
                cells=tuple({"glaucoma": bool(each)} for each in has_glaucoma),
            )
        )
    return collections


def flipped(site: Collection) -> Collection:
    return replace(site, cells=tuple({"glaucoma": not each["glaucoma"]} for each in site.cells))


def compare(collections: list[Collection], seed: int = 0) -> dict:
    return agreement.compare(collections, num_resamples=200, seed=seed)


@pytest.mark.parametrize("place", range(4))
def test_compare__names_the_flipped_site_alone(place: int) -> None:
    collections = draw(place)
    collections[place] = flipped(collections[place])
    found = compare(collections, seed=place)
    assert found["contradicting"] == {SITES[place]: ["glaucoma"]}
    sites = found["tasks"]["glaucoma"]["sites"]
    assert sites[SITES[place]]["agreement"]["auroc"]["high"] < 0.4
    assert all(each["agreement"]["auroc"]["low"] > 0.5 for name, each in sites.items() if name != SITES[place])
    assert sites[SITES[place]]["influence"]["difference"]["value"] < 0
    (words,) = agreement.describe(found)
    assert f"site {SITES[place]} contradict" in words and "glaucoma (AUROC 0." in words


def test_compare__names_nobody_where_all_are_honest_or_labels_mean_nothing() -> None:
    for seed in range(3):
        collections = draw(seed)
        assert compare(collections, seed)["contradicting"] == {}
        random = np.random.default_rng(seed)
        collections[0] = replace(
            collections[0], cells=tuple({"glaucoma": bool(random.random() < 0.4)} for _ in range(120))
        )
        assert compare(collections, seed)["contradicting"] == {}, "labels without a meaning are not flipped ones"


def test_compare__one_of_three_is_named_and_not_its_neighbours() -> None:
    for seed in range(3):
        collections = draw(seed, sites=SITES[:3])
        collections[2] = flipped(collections[2])
        assert list(compare(collections, seed)["contradicting"]) == ["cedar"]


def test_compare__a_second_flipped_site_is_found_once_the_first_is_out() -> None:
    collections = draw(0, sites=(*SITES, "elm"))
    for place in (1, 3):
        collections[place] = flipped(collections[place])
    assert sorted(compare(collections)["contradicting"]) == ["birch", "dune"]


def test_compare__of_two_that_contradict_each_other_both_are_named() -> None:
    collections = draw(0, sites=SITES[:2])
    collections[1] = flipped(collections[1])
    found = compare(collections)
    assert list(found["contradicting"]) == ["aster", "birch"] and len(agreement.describe(found)) == 2


def test_compare__drawn_photographs_alone_are_enough_to_name_a_site_and_nothing_is_tested_on_them() -> None:
    collections = draw(0, is_real=False)
    collections[3] = flipped(collections[3])
    found = compare(collections)
    assert list(found["contradicting"]) == ["dune"]
    sites = found["tasks"]["glaucoma"]["sites"]
    assert all(each["influence"] is None and "held-out real photographs" in each["missing"] for each in sites.values())


def test_compare__sites_that_do_not_agree_among_themselves_contradict_nobody() -> None:
    # As weak generators draw: at each site a label goes with something else, which by chance means the contrary here.
    effects = {"aster": (-1.2, -1.2), "birch": (1.6, 0.0), "cedar": (0.0, 1.6)}
    for seed in range(3):
        random = np.random.default_rng(100 + seed)
        collections = []
        for site in draw(seed, sites=SITES[:3]):
            effect_D = np.r_[effects[site.site_id], np.zeros(8)]
            shift_ND = np.outer([cells["glaucoma"] for cells in site.cells], effect_D)
            feature_ND = random.normal(0.0, 1.0, shift_ND.shape) + shift_ND
            collections.append(replace(site, features=feature_ND.astype(np.float32)))
        found = compare(collections, seed)
        held = found["tasks"]["glaucoma"]["sites"]["aster"]["agreement"]
        assert held["auroc"]["value"] < 0.4 and held["auroc"]["high"] < 0.5, "it would have been named"
        assert not held["is_judged"] and held["taught"]["value"] < 0.65
        assert found["contradicting"] == {}


def test_compare__too_few_patients_say_so() -> None:
    found = compare([*draw(0), *draw(0, sites=("elm",), num_patients=8)])
    elm = found["tasks"]["glaucoma"]["sites"]["elm"]
    assert elm["agreement"] is None and elm["missing"].startswith("required 10 patients of each class")


def test_influences__a_site_without_labels_of_use_adds_nothing_and_no_patient_is_on_both_sides() -> None:
    collections = draw(1)
    (task,) = [each for each in agreement.protocol.tasks_for([{"glaucoma": True}]) if each.key == "glaucoma"]
    found = agreement.influences(collections, task, trusted=frozenset(SITES), num_resamples=200, seed=0)
    assert all(each.p > 0.001 and abs(each.difference.value) < 0.05 for each in found.values())
    for site in collections:
        labelled = agreement._labelled(site, task, 0)
        tested = set(labelled.patients[labelled.is_tested].tolist())
        assert tested and not tested & set(labelled.patients[~labelled.is_tested].tolist())
