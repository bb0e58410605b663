import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from gretfound import fundus, storage
from gretfound.errors import StorageError
from gretfound.evaluation import metrics, protocol

OPTIONS = {"num_folds": 4, "min_patients_per_class": 4, "seed": 0, "is_named_by_set": False}


def photographs(cells, *, features=None, image_ids=None, name="dune"):
    features = np.zeros((len(cells), 2), np.float32) if features is None else features
    return protocol.Photographs(
        name=name,
        row_numbers=tuple(range(2, len(cells) + 2)),
        image_ids=tuple(image_ids or (f"{name}-{index}" for index in range(len(cells)))),
        cells=tuple(cells),
        features=dict.fromkeys(protocol.ENCODERS, features.astype(np.float32)),
    )


def glaucoma_cells(num, *, photographs_per_patient=1):
    return [
        {"glaucoma": index // photographs_per_patient % 2 == 0, "patient": f"p{index // photographs_per_patient}"}
        for index in range(num)
    ]


def test_tasks_for__labels_follow_the_cells():
    cells = {"dr": 2, "dr_present": True, "dme": 1, "glaucoma": False, "sex": "male", "age": 61.0}
    labels = {task.key: task.label(cells) for task in protocol.tasks_for([cells, {"age": 40.0}])}
    known = {key: label for key, label in labels.items() if label is not None}
    assert known == {
        "any_dr": 1,
        "referable_dr": 1,
        "dr_grade": 2,
        "dme": 1,
        "glaucoma": 0,
        "sex": 1,
        "age_over_median": 1,
    }


def test_tasks_for__ungraded_retinopathy_counts_as_any_only():
    labels = {task.key: task.label({"dr_present": True}) for task in protocol.tasks_for([{}])}
    assert labels["any_dr"] == 1 and labels["referable_dr"] is None and labels["dr_grade"] is None


def test_plan__no_patient_is_in_two_folds():
    cells = glaucoma_cells(60, photographs_per_patient=3)
    (assessment,), skipped = protocol.plan(photographs(cells), **OPTIONS)
    assert (assessment.name, assessment.task.key, skipped) == ("glaucoma", "glaucoma", [])
    folds_by_patient = {}
    for row, fold in zip(assessment.rows, assessment.folds, strict=True):
        folds_by_patient.setdefault(cells[row]["patient"], set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_by_patient.values()) and len(folds_by_patient) == 20
    assert len(np.unique(assessment.folds)) == 4


def test_plan__blank_patients_are_their_own_and_identical_photographs_are_one():
    cells = [{"amd": index % 2 == 0} for index in range(24)]
    image_ids = [f"i{index}" for index in range(22)] + ["i0", "i1"]
    (assessment,), _ = protocol.plan(photographs(cells, image_ids=image_ids), **OPTIONS)
    assert len(np.unique(assessment.patients)) == 22
    assert assessment.folds[22] == assessment.folds[0] and assessment.folds[23] == assessment.folds[1]


def test_plan__identical_photographs_join_two_patients():
    cells = glaucoma_cells(20)
    image_ids = [f"i{index}" for index in range(19)] + ["i3"]
    (assessment,), _ = protocol.plan(photographs(cells, image_ids=image_ids), **OPTIONS)
    assert assessment.patients[19] == assessment.patients[3]


def test_plan__one_class_is_skipped_with_the_reason():
    planned, skipped = protocol.plan(photographs([{"glaucoma": True}] * 15), **OPTIONS)
    assert planned == []
    (entry,) = skipped
    assert entry["task"] == "glaucoma" and "no glaucoma: 0, glaucoma: 1" in entry["reason"]


def test_plan__rare_grade_is_left_out_and_noted():
    grades = [0] * 10 + [1] * 2 + [2] * 10 + [4] * 8
    planned, _ = protocol.plan(photographs([{"dr": grade, "dr_present": grade > 0} for grade in grades]), **OPTIONS)
    grading = next(assessment for assessment in planned if assessment.task.key == "dr_grade")
    assert grading.task.classes == ("ICDR 0", "ICDR 2", "ICDR 4")
    assert np.bincount(grading.labels).tolist() == [10, 10, 8]
    assert grading.notes == ("ICDR 1 is left out: 2 patient(s), required 4",)
    assert protocol.describe(grading)["classes"]["ICDR 4"] == {"num_images": 8, "num_patients": 8}


def test_plan__external_set_is_not_split():
    tested, fitted = photographs(glaucoma_cells(10)), photographs(glaucoma_cells(12), name="aster")
    (assessment,), _ = protocol.plan(tested, **OPTIONS, fitted=fitted)
    assert assessment.name == "aster->dune/glaucoma" and assessment.fitted_on == "aster"
    assert (assessment.folds == 0).all() and len(assessment.fitted_rows) == 12


def test_plan_sets__each_by_itself_and_as_an_external_set():
    options = {name: value for name, value in OPTIONS.items() if name != "is_named_by_set"}
    dune, cedar, aster = (photographs(glaucoma_cells(12), name=name) for name in ("dune", "cedar", "aster"))
    names = [
        [assessment.name for assessment in protocol.plan_sets(tested, fitted, **options)[0]]
        for tested, fitted in (([dune], None), ([dune, cedar], None), ([dune, cedar], aster))
    ]
    assert names[0] == ["glaucoma"]
    assert names[1] == ["dune/glaucoma", "cedar/glaucoma"]
    assert names[2] == ["dune/glaucoma", "aster->dune/glaucoma", "cedar/glaucoma", "aster->cedar/glaucoma"]
    _, skipped = protocol.plan_sets([dune, photographs([{"amd": True}] * 9, name="cedar")], None, **options)
    assert [(entry["set"], entry["task"]) for entry in skipped] == [("cedar", "amd")]


def drawn(seed, num, strength):
    random = np.random.default_rng(seed)
    cells = glaucoma_cells(num)
    feature_ND = random.normal(0, 1, (num, 12))
    feature_ND[:, 0] += strength * np.array([row["glaucoma"] for row in cells])
    return photographs(cells, features=feature_ND)


def assess(found, num_resamples=100):
    (assessment,), _ = protocol.plan(found, **OPTIONS)
    return assessment, protocol.assess(assessment, found.features["pretrained"], num_resamples=num_resamples, seed=0)


def test_assess__finds_what_is_there():
    _, outcome = assess(drawn(0, 120, 3.0))
    for name in protocol.METRICS:
        assert outcome.figures[name].low > 0.7
        assert outcome.figures[name].low <= outcome.figures[name].value <= outcome.figures[name].high


def test_assess__noise_is_chance_without_the_bias_of_pooled_folds():
    # Scores pooled over folds put noise below 0.5: a fold that holds more positives is fitted on fewer of them.
    values = [assess(drawn(seed, 24, 0.0), num_resamples=100)[1].figures["auroc"].value for seed in range(8)]
    assert np.mean(values) == pytest.approx(0.5, abs=3 * 0.16 / 8**0.5)


def test_assess__external_set_equals_its_own_reference():
    tested, fitted = drawn(1, 60, 1.5), drawn(2, 80, 1.5)
    (assessment,), _ = protocol.plan(tested, **OPTIONS, fitted=fitted)
    outcome = protocol.assess(
        assessment, tested.features["pretrained"], fitted.features["pretrained"], num_resamples=100, seed=0
    )
    reference = roc_auc_score(assessment.labels, outcome.scores["linear"][:, 1])
    assert outcome.figures["auroc"].value == pytest.approx(reference, abs=1e-12)
    assert reference > 0.7


def test_difference__is_paired():
    _, strong = assess(drawn(3, 80, 2.0))
    same = protocol.difference(strong, strong, "auroc")
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    _, weak = assess(drawn(3, 80, 0.0))
    gain = protocol.difference(strong, weak, "auroc")
    assert gain.low > 0
    assert gain.value == pytest.approx(strong.figures["auroc"].value - weak.figures["auroc"].value)


def test_group_figures__equal_scikit_learn_and_name_the_worst():
    random = np.random.default_rng(5)
    sexes = np.array(["female", "male", "female", "male", "other"] * 40)
    cells = [{**row, "sex": sex} for row, sex in zip(glaucoma_cells(200), sexes, strict=True)]
    cells[3].pop("sex")
    labels = np.array([row["glaucoma"] for row in cells])
    noise = np.where(sexes == "male", 3.0, 0.5)
    feature_ND = np.stack([labels + random.normal(0, 1, 200) * noise, random.normal(0, 1, 200)], axis=1)
    tested = photographs(cells, features=feature_ND)
    fitted = photographs(cells, features=feature_ND, name="aster")
    planned, _ = protocol.plan(tested, **OPTIONS, fitted=fitted)
    assessment = next(each for each in planned if each.task.key == "glaucoma")
    outcome = protocol.assess(
        assessment, tested.features["pretrained"], fitted.features["pretrained"], num_resamples=100, seed=0
    )
    found = protocol.group_figures(
        assessment, outcome, tested.cells, min_patients_per_class=4, num_resamples=100, seed=0
    )["sex"]
    assert found["worst_group"] == "male" and set(found["groups"]) == {"female", "male", "other"}
    score_N = outcome.scores["linear"][:, 1]
    for group, entry in found["groups"].items():
        rows = np.array([row.get("sex") == group for row in cells])
        assert entry["auroc"]["value"] == pytest.approx(roc_auc_score(labels[rows], score_N[rows]), abs=1e-12)
        assert entry["num_images"] == rows.sum()
    values = [entry["auroc"]["value"] for entry in found["groups"].values()]
    overall = outcome.figures["auroc"].value
    assert found["gap"] == pytest.approx(max(values) - min(values))
    assert found["equity_scaled_auroc"] == pytest.approx(overall / (1 + sum(abs(value - overall) for value in values)))


def test_group_figures__small_groups_are_counted_not_measured():
    cells = [{**row, "country": "India" if index < 90 else "Chile"} for index, row in enumerate(glaucoma_cells(93))]
    found = photographs(cells)
    (assessment,), _ = protocol.plan(found, **OPTIONS)
    outcome = protocol.assess(assessment, found.features["pretrained"], num_resamples=100, seed=0)
    options = {"min_patients_per_class": 4, "num_resamples": 100, "seed": 0}
    assert protocol.group_figures(assessment, outcome, found.cells, **options) == {}


def test_summarise__verdict_counts_disjoint_intervals():
    found = drawn(0, 100, 3.0)
    weak = drawn(0, 100, 0.0)
    (assessment,), _ = protocol.plan(found, **OPTIONS)
    outcomes = {
        (assessment.name, encoder): protocol.assess(
            assessment,
            (found if encoder == "pretrained" else weak).features[encoder],
            num_resamples=100,
            seed=0,
        )
        for encoder in protocol.ENCODERS
    }
    options = {"min_patients_per_class": 4, "num_resamples": 100, "seed": 0}
    content = protocol.summarise([assessment], outcomes, {"dune": found}, **options)
    assert content["verdict"]["against"]["untrained"]["num_above"] == 1
    assert content["verdict"]["sentence"].startswith("The pretrained encoder beats both baselines on every task")
    assert set(content["encoders"]) == set(protocol.ENCODERS)
    assert set(content["encoders"]["pretrained"]["glaucoma"]) == set(protocol.METRICS)
    assert set(content["encoders"]["pretrained"]["glaucoma"]["auroc"]) == {"value", "low", "high"}
    swapped = {
        (name, {"pretrained": "untrained", "untrained": "pretrained"}.get(encoder, encoder)): outcome
        for (name, encoder), outcome in outcomes.items()
    }
    verdict = protocol.summarise([assessment], swapped, {"dune": found}, **options)["verdict"]
    assert verdict["against"]["untrained"]["num_below"] == 1
    assert "not shown to beat either baseline" in verdict["sentence"] and "wholly below" in verdict["sentence"]


def write_folder(path, num=3):
    (path / "traindata").mkdir(parents=True)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (20, 30, 3)).astype(np.uint8) for _ in range(num)]
    for index, image in enumerate(images):
        (path / "traindata" / f"a{index}.png").write_bytes(fundus.encode_png(image))
    (path / "traindata" / "broken.jpg").write_bytes(b"no photograph")
    lines = ["Image,DR,Sex", *[f"a{index}.png,{index},female" for index in range(num)]]
    lines += ["broken.jpg,mild dr or so,F", "gone.png,R0,m", "../metadata.csv,R0,m"]
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return images


def test_read_evaluation_set__names_absent_files_by_an_empty_uri(tmp_path):
    write_folder(tmp_path / "dune")
    found = protocol.read_evaluation_set(str(tmp_path / "dune"))
    assert found.name == "dune" and found.num_cells_not_understood == 1
    assert [row.number for row in found.rows] == [2, 3, 4, 5, 6, 7]
    assert [bool(row.uri) for row in found.rows] == [True, True, True, True, False, False]
    assert found.rows[1].cells == {"dr": 1, "dr_present": True, "sex": "female"}
    (tmp_path / "dune" / "traindata" / "a9.png").write_bytes(b"")
    assert protocol.read_evaluation_set(str(tmp_path / "dune")).digest != found.digest


def test_read_evaluation_set__from_a_bucket(tmp_path, s3_hub):
    write_folder(tmp_path / "dune")
    uri = storage.join(s3_hub, "evaluation", "dune")
    for path, _, _ in storage.describe_folder(tmp_path / "dune"):
        storage.upload_file(path, storage.join(uri, str(path.relative_to(tmp_path / "dune"))))
    found = protocol.read_evaluation_set(uri)
    assert found.digest == protocol.read_evaluation_set(str(tmp_path / "dune")).digest
    image = fundus.decode_photograph(storage.read_bytes(found.rows[0].uri))
    assert image.shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("", "no table"), ("Image,DR\n", "no rows"), ("a,b\n", "Image")]
)
def test_read_evaluation_set__unusable_table_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(StorageError, match=message):
        protocol.read_evaluation_set(str(tmp_path))


def test_sign__ids_of_the_readable(tmp_path):
    images = write_folder(tmp_path / "dune")
    signed = protocol.sign(protocol.read_evaluation_set(str(tmp_path / "dune")))
    assert set(signed["image_id"].to_pylist()) == {fundus.pixel_digest(image) for image in images}


def test_collect__order_of_the_workers_does_not_matter():
    rows = [("dune", protocol.EvaluationRow(number=place + 2, uri="", cells={"dr": place})) for place in range(5)]
    places = [np.array([3, 0]), np.array([4, 2, 1])]
    batches = [
        {
            "place": place,
            "image_id": np.array([f"i{each}" for each in place]),
            "reason": np.array(["TRUNCATED: too short" if each == 2 else "" for each in place]),
            **{name: np.repeat(place[:, None], 2, axis=1).astype(np.float32) for name in protocol.ENCODERS},
        }
        for place in places
    ]
    found, faults = protocol.collect(rows, batches)
    assert found["dune"].row_numbers == (2, 3, 5, 6) and found["dune"].image_ids == ("i0", "i1", "i3", "i4")
    assert found["dune"].features["untrained"][:, 0].tolist() == [0, 1, 3, 4]
    assert faults == {"dune": [{"row": 4, "reason": "TRUNCATED: too short"}]}


def test_without__leaves_out_what_is_tested():
    tested = photographs([{}] * 3, image_ids=["a", "b", "c"])
    fitted = photographs([{"dr": index} for index in range(4)], image_ids=["x", "b", "y", "c"], name="aster")
    left = protocol.without(fitted, [tested])
    assert left.image_ids == ("x", "y") and left.row_numbers == (2, 4) and left.cells == ({"dr": 0}, {"dr": 2})
    assert left.features["pretrained"].shape == (2, 2)


def test_interval_json__is_the_form_of_the_report():
    figure = metrics.Interval(value=0.5, low=0.4, high=0.6, num_resamples=10)
    assert protocol.interval_json(figure) == {"value": 0.5, "low": 0.4, "high": 0.6}
