"""Fidelity: what it refuses, what it says of small groups, and that usefulness follows how generated rows were made."""

from dataclasses import replace

import numpy as np
import pytest

from gretfound import fundus
from gretfound.errors import LineageError
from gretfound.evaluation import distances, fidelity
from gretfound.evaluation.fidelity import Sample

TRAINED_ON = tuple(f"trained-{row}" for row in range(50))


def sample(name: str, num: int, *, mean: float = 0.0, width: int = 4, seed: int = 0, **stated) -> Sample:
    features = np.random.default_rng(seed).normal(mean, 1.0, (num, width)).astype(np.float32)
    return Sample(features=features, image_ids=tuple(f"{name}-{row}" for row in range(num)), **stated)


def test_compare__gives_the_distances_of_the_features():
    real = sample("real", 60, patients=tuple(f"patient-{row // 2}" for row in range(60)))
    generated = sample("generated", 70, mean=0.5, seed=1)
    found = fidelity.compare(real, generated, trained_on=TRAINED_ON, num_resamples=50, seed=3)
    assert tuple(found) == fidelity.FIGURES
    patients = np.arange(60) // 2, np.arange(70)
    arguments = {"patients": patients, "num_resamples": 50, "seed": 3}
    assert found["kid"] == distances.kid(real.features, generated.features, **arguments)
    assert found["fid"] == distances.fid(real.features, generated.features, **arguments)
    assert found["coverage"] == distances.neighbourhoods(real.features, generated.features, **arguments)["coverage"]


def test_compare__better_samples_are_better_in_every_figure():
    real = sample("real", 300)
    near, far = (
        fidelity.compare(real, sample("generated", 300, mean=mean, seed=1), trained_on=TRAINED_ON)
        for mean in (0.1, 2.0)
    )
    for figure in ("kid", "fid"):
        assert far[figure].is_above(near[figure])
    for figure in ("precision", "recall", "density", "coverage"):
        assert near[figure].is_above(far[figure])


@pytest.mark.parametrize("is_predicate", [False, True])
def test_compare__photographs_of_the_training_are_refused_with_their_number(is_predicate):
    real = sample("real", 40)
    known = {*TRAINED_ON, "real-3", "real-17", "real-39"}
    trained_on = known.__contains__ if is_predicate else sorted(known)
    for measure in (fidelity.compare, fidelity.compare_by_condition):
        with pytest.raises(LineageError, match=r"found 3 of 40 reference photographs .* required none"):
            measure(real, sample("generated", 40, seed=1), trained_on=trained_on)


def test_compare__no_ids_of_the_training_is_an_error():
    with pytest.raises(ValueError, match="no image id"):
        fidelity.compare(sample("real", 40), sample("generated", 40), trained_on=())


def test_compare__too_few_photographs_for_a_figure_says_which_and_how_many():
    real, generated = sample("real", 25, width=30), sample("generated", 40, width=30)
    with pytest.raises(ValueError, match=r"real: found 25 .* required 31 \(30 features and one more\) of 10 for fid$"):
        fidelity.compare(real, generated, trained_on=TRAINED_ON)
    assert set(fidelity.compare(real, generated, trained_on=TRAINED_ON, figures=["kid"])) == {"kid"}


@pytest.mark.parametrize(
    ("generated", "figures", "message"),
    [
        (sample("real", 40, seed=1), ("kid",), "40 photographs both real and generated"),
        (sample("generated", 40, width=5), ("kid",), "4 features of real and 5 of generated"),
        (sample("generated", 40), ("kid", "psnr"), r"\['psnr'\]"),
        (sample("generated", 40, mean=np.inf), ("kid",), "not finite"),
    ],
)
def test_compare__what_cannot_be_compared_is_an_error(generated, figures, message):
    with pytest.raises(ValueError, match=message):
        fidelity.compare(sample("real", 40), generated, trained_on=TRAINED_ON, figures=figures)


def test_compare_by_condition__equals_comparing_the_rows_and_names_small_groups():
    asked = ("glaucoma",) * 30 + ("healthy",) * 40 + ("amd",) * 6 + (None,) * 24
    real = sample("real", 100, conditions=asked)
    generated = sample("generated", 90, mean=0.4, seed=1, conditions=("glaucoma", "healthy", "cataract") * 30)
    found = fidelity.compare_by_condition(real, generated, trained_on=TRAINED_ON, figures=("kid", "recall"))
    assert list(found) == ["amd", "cataract", "glaucoma", "healthy", fidelity.NOT_STATED]
    assert {name: (group.num_real, group.num_generated) for name, group in found.items()} == {
        "amd": (6, 0),
        "cataract": (0, 30),
        "glaucoma": (30, 30),
        "healthy": (40, 30),
        fidelity.NOT_STATED: (24, 0),
    }
    rows = np.arange(90)[0::3]
    expected = distances.kid(real.features[:30], generated.features[rows])
    assert found["glaucoma"].figures["kid"] == expected and not found["glaucoma"].too_few
    assert not found["amd"].figures
    assert found["amd"].too_few["kid"] == (
        "real: found 6 photographs of 6 patients; required 20 of 10 for kid; "
        "generated: found 0 photographs of 0 patients; required 20 of 10 for kid"
    )
    assert found["cataract"].too_few["recall"].startswith("real: found 0 photographs")


def test_sample__patients_are_numbered_and_the_unnamed_are_apart():
    named = sample("real", 5, patients=("b", "", "a", "b", ""))
    assert named.patient_numbers.tolist() == [0, 1, 2, 0, 3]
    assert sample("real", 3).patient_numbers.tolist() == [0, 1, 2]


def test_sample__not_one_of_each_for_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"found features of shape \(5, 4\) with \[5, 4, 5\] ids"):
        sample("real", 5, patients=("a",) * 4)


def test_describe__takes_ids_from_pixels_and_features_from_batches():
    photographs = [np.full((8, 8, 3), level, dtype=np.uint8) for level in range(7)]
    sizes = []

    def mean_colour(batch):
        sizes.append(len(batch))
        return np.stack([image.mean(axis=(0, 1)) for image in batch])

    found = fidelity.describe(iter(photographs), mean_colour, conditions="abcdefg", batch_size=3)
    assert sizes == [3, 3, 1]
    assert found.features.tolist() == [[level] * 3 for level in range(7)] and found.features.dtype == np.float32
    assert found.image_ids == tuple(fundus.pixel_digest(image) for image in photographs)
    assert found.conditions == tuple("abcdefg")
    with pytest.raises(ValueError, match="no photograph"):
        fidelity.describe([], mean_colour)


def labelled(name: str, num: int, seed: int, *, signal: float = 1.2, width: int = 8) -> tuple[Sample, np.ndarray]:
    """Two classes that differ in each feature by 0.6 `signal`."""
    drawn, label_N = sample(name, num, seed=seed, width=width), np.arange(num) % 2
    return replace(
        drawn, features=drawn.features + np.float32(0.6 * signal) * label_N[:, None].astype(np.float32)
    ), label_N


def worth(real, generated, tested, **arguments):
    return fidelity.usefulness(
        *real, *generated, *tested, trained_on=TRAINED_ON, num_classes=2, num_resamples=200, **arguments
    )


def test_usefulness__good_photographs_help_where_real_ones_are_few():
    found = worth(
        labelled("real", 12, 0, signal=0.6),
        labelled("generated", 400, 1, signal=0.6),
        labelled("t", 300, 2, signal=0.6),
    )
    assert set(found.figures) == {"real", "generated", "real_and_generated"}
    assert found.gain.low > 0.0 and found.gap.low > 0.0
    assert found.gain.value == pytest.approx(
        found.figures["real_and_generated"].value - found.figures["real"].value, abs=1e-12
    )


def test_usefulness__photographs_that_ignore_their_class_are_worth_nothing():
    real, tested = labelled("real", 100, 0), labelled("tested", 200, 2)
    found = worth(real, labelled("generated", 100, 1, signal=0.0), tested)
    assert found.gap.high < 0.0
    assert found.gain.high < 0.05


def test_usefulness__tested_photographs_and_patients_are_held_out():
    real, generated, tested = labelled("real", 40, 0), labelled("generated", 40, 1), labelled("tested", 40, 2)
    with pytest.raises(LineageError, match="found 1 of 40 reference photographs"):
        fidelity.usefulness(*real, *generated, *tested, trained_on=["tested-4"], num_classes=2)
    with pytest.raises(LineageError, match="found 40 tested photographs and 0 tested patients"):
        worth(real, generated, (replace(tested[0], image_ids=real[0].image_ids), tested[1]))
    ours = replace(real[0], patients=tuple(f"p{row // 2}" for row in range(40)))
    theirs = replace(tested[0], patients=("p3", "p5", *[""] * 38))
    with pytest.raises(LineageError, match="found 0 tested photographs and 2 tested patients"):
        worth((ours, real[1]), generated, (theirs, tested[1]))


def test_usefulness__too_few_patients_of_a_class_is_an_error():
    real, generated, tested = labelled("real", 40, 0), labelled("generated", 40, 1), labelled("tested", 40, 2)
    rare = (generated[0], (np.arange(40) < 3).astype(int))
    with pytest.raises(ValueError, match="found 3 patients of class 1 among the generated photographs; required 5"):
        worth(real, rare, tested)
    with pytest.raises(ValueError, match="required one of 0 to 1"):
        worth(real, (generated[0], np.full(40, 2)), tested)
