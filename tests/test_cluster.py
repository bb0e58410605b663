"""The cluster files: valid for KubeRay, Ray's launcher and Ray Serve, one Ray version, and jobs that exist."""

import functools
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from gretfound import config as configuration
from jobs import console, pretrain_encoder
from serve.protocol import Arguments

ROOT = Path(__file__).parents[1]
CRDS_PATH = ROOT.parent / "shared" / "crds"
KUBERAY_PATH = ROOT / "cluster" / "kuberay"
IMAGE_ROOT = "/opt/gretfound/"
CRD_NAMES = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
CUSTOM_RESOURCES = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
SCALES = ["laptop.yaml", "gpu_1.yaml", "gpus_8.yaml", "gpus_32.yaml"]


def read_manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((KUBERAY_PATH / name).read_text()))


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    match manifest["kind"]:
        case "RayJob":
            spec = spec["rayClusterSpec"]
        case "RayService":
            spec = spec["rayClusterConfig"]
    return dict(spec)


def node_groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@functools.cache
def crd_schema(kind: str) -> dict[str, Any]:
    """Returns the OpenAPI schema of a custom resource's version v1."""
    path = CRDS_PATH / f"ray.io_{CRD_NAMES[kind]}.yaml"
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return dict(version["schema"]["openAPIV3Schema"])


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yields the fields that the API server would drop silently: those that a closed schema does not name."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[{index}]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    known = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for key, item in value.items():
        place = f"{path}.{key}"
        if key in known:
            yield from unknown_fields(item, known[key], place)
        elif isinstance(others, dict):
            yield from unknown_fields(item, others, place)
        elif not others and place.split(".")[1] not in ("apiVersion", "kind", "metadata"):
            yield place


needs_crds = pytest.mark.skipif(not CRDS_PATH.is_dir(), reason=f"the KubeRay schemas are not at {CRDS_PATH}")


@needs_crds
@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_kuberay__valid_against_the_schema(name: str) -> None:
    manifest = read_manifest(name)
    schema = crd_schema(manifest["kind"])
    assert manifest["apiVersion"] == "ray.io/v1"
    # Kubernetes' own keywords (x-kubernetes-..., formats) are passed over; int-or-string fields carry an anyOf.
    jsonschema.Draft202012Validator(schema).validate(manifest)
    assert list(unknown_fields(manifest, schema)) == []


@needs_crds
def test_unknown_fields__a_misspelt_and_a_misplaced_field_are_found() -> None:
    manifest = read_manifest("rayjob.yaml")
    manifest["spec"]["backofLimit"] = 1
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["gpus"] = 8
    assert list(unknown_fields(manifest, crd_schema("RayJob"))) == [
        ".spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].gpus",
        ".spec.backofLimit",
    ]


@needs_crds
def test_kuberay__a_wrong_type_is_refused_by_the_schema() -> None:
    manifest = read_manifest("rayjob.yaml")
    manifest["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = 2
    with pytest.raises(jsonschema.ValidationError, match="2"):
        jsonschema.Draft202012Validator(crd_schema("RayJob")).validate(manifest)


@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_kuberay__ray_version_is_the_locked_and_the_installed_one(name: str) -> None:
    version = cluster_spec(read_manifest(name))["rayVersion"]
    locked = re.search(r"^ray(?:\[[^]]*\])?==([0-9.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert version == locked[1] == ray.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = next(found for found in map(Requirement, project["dependencies"]) if found.name == "ray")
    assert version in required.specifier


@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_kuberay__every_container_is_confined_and_has_shared_memory(name: str) -> None:
    manifest = read_manifest(name)
    assert cluster_spec(manifest)["authOptions"]["mode"] == "token"
    for group in node_groups(manifest):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsUser"] == 1000
        shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["runAsNonRoot"] and not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            limits = container["resources"]["limits"]
            assert limits == container["resources"]["requests"]
            # Ray's object store is 30% of the memory, at most 200 GB, and must fit into /dev/shm.
            assert gib(shm["sizeLimit"]) >= min(0.3 * gib(limits["memory"]), 200e9 / 2**30)
            assert "ephemeral-storage" in limits


def gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_kuberay__no_task_runs_on_the_head(name: str) -> None:
    assert cluster_spec(read_manifest(name))["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_kuberay__resources_are_declared_in_one_place_only(name: str) -> None:
    # KubeRay's operator refuses a group that sets them in both; its schema does not say so.
    for group in node_groups(read_manifest(name)):
        assert not group.get("resources") or not {"num-cpus", "num-gpus", "memory", "resources"} & set(
            group["rayStartParams"]
        )
        assert "labels" not in group["rayStartParams"]


def test_rayjob__its_nodes_are_those_of_the_standing_cluster() -> None:
    assert cluster_spec(read_manifest("rayjob.yaml")) == cluster_spec(read_manifest("raycluster.yaml"))


def test_rayjob__gives_up_in_finite_time_and_deletes_its_cluster() -> None:
    spec = read_manifest("rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["backoffLimit"] >= 1


def test_rayjob__the_driver_has_a_node_group_that_offers_its_resources() -> None:
    manifest = read_manifest("rayjob.yaml")
    wanted = json.loads(manifest["spec"]["entrypointResources"])
    offered = [group.get("resources", {}) for group in node_groups(manifest)]
    assert any(all(float(group.get(name, 0)) >= amount for name, amount in wanted.items()) for group in offered)


def test_rayjob__the_cluster_holds_the_scale_that_it_runs() -> None:
    manifest = read_manifest("rayjob.yaml")
    scale = yaml.safe_load((ROOT / "conf" / "scale" / "gpus_32.yaml").read_text())["cluster"]
    gpu = next(group for group in node_groups(manifest) if group.get("groupName") == "gpu")
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) * gpu["maxReplicas"] == scale["num_workers"] * scale["gpus_per_worker"]
    needed_cpus = scale["num_workers"] * scale["cpus_per_worker"] + scale["data_cpus"]
    assert int(limits["cpu"]) * gpu["maxReplicas"] >= needed_cpus


def shipped_commands() -> list[str]:
    """Returns every `python -m jobs.NAME ...` of the cluster files and of docs/operating.md."""
    entrypoint = read_manifest("rayjob.yaml")["spec"]["entrypoint"]
    texts = [entrypoint]
    for path in [*KUBERAY_PATH.glob("*.yaml"), *(ROOT / "cluster").glob("*.*"), ROOT / "docs" / "operating.md"]:
        unwrapped = re.sub(r"\\\n#?\s*", "", path.read_text())
        texts.extend(re.findall(r"python -m jobs\.[^\n`]*", unwrapped))
    return texts


def test_shipped_commands__name_jobs_and_layers_that_exist() -> None:
    commands = shipped_commands()
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command, comments=True)
        module = words[words.index("-m") + 1]
        if module != "jobs.NAME":
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), command
        for word in words:
            if word.endswith(".yaml") and "=" not in word:
                assert (ROOT / word.removeprefix(IMAGE_ROOT)).is_file(), command


def test_rayjob__its_entrypoint_is_a_whole_configuration() -> None:
    words = shlex.split(read_manifest("rayjob.yaml")["spec"]["entrypoint"])
    arguments = [
        str(ROOT / word.removeprefix(IMAGE_ROOT)) if word.startswith(IMAGE_ROOT) else word for word in words[3:]
    ]
    loaded = configuration.load(pretrain_encoder.Config, arguments)
    assert loaded.cluster.num_workers == 32


def test_rayservice__its_application_is_a_serve_configuration() -> None:
    deployed = ServeDeploySchema(**yaml.safe_load(read_manifest("rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = deployed.applications
    assert application.import_path == "serve.app:app"
    Arguments(**application.args)
    app = importlib.import_module("serve.app")
    for deployment in application.deployments:
        assert isinstance(getattr(app, deployment.name), type)


def test_network_policy__selects_the_pods_of_every_cluster_and_opens_no_port_to_all() -> None:
    policies = list(yaml.safe_load_all((KUBERAY_PATH / "network-policy.yaml").read_text()))
    planes = {policy["spec"]["podSelector"]["matchLabels"]["gretfound-plane"] for policy in policies}
    for name in CUSTOM_RESOURCES:
        for group in node_groups(read_manifest(name)):
            assert group["template"]["metadata"]["labels"]["gretfound-plane"] in planes
    for policy in policies:
        assert policy["apiVersion"] == "networking.k8s.io/v1"
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        assert all(rule["from"] for rule in policy["spec"]["ingress"])


def test_launcher__valid_for_ray() -> None:
    launcher = yaml.safe_load((ROOT / "cluster" / "launcher.yaml").read_text())
    jsonschema.validate(
        launcher, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    )
    prepared = prepare_config(launcher)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "data", "gpu"}
    assert prepared["max_workers"] >= sum(
        kind["max_workers"] for name, kind in launcher["available_node_types"].items() if name != "head"
    )


def test_launcher__the_head_is_closed_and_on_demand() -> None:
    launcher = yaml.safe_load((ROOT / "cluster" / "launcher.yaml").read_text())
    assert "--env=RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert "InstanceMarketOptions" not in launcher["available_node_types"]["head"]["node_config"]
    ranges = launcher["provider"]["security_group"]["IpPermissions"][0]["IpRanges"]
    assert all(not entry["CidrIp"].endswith("/0") for entry in ranges)


def test_cluster__nodes_of_jobs_keep_their_workers_as_a_laptop_does() -> None:
    launcher = yaml.safe_load((ROOT / "cluster" / "launcher.yaml").read_text())
    for name, value in console.KEEPS_WORKERS.items():
        assert f"--env={name}={value}" in launcher["docker"]["run_options"]
        for manifest in ("raycluster.yaml", "rayjob.yaml"):
            for group in node_groups(read_manifest(manifest)):
                (container,) = group["template"]["spec"]["containers"]
                assert {"name": name, "value": value} in container["env"]


@pytest.mark.parametrize("name", SCALES)
def test_scale__loads_into_the_pretraining_job_and_leaves_the_recipe_alone(name: str) -> None:
    path = ROOT / "conf" / "scale" / name
    loaded = configuration.load(pretrain_encoder.Config, [str(path), "hub_uri=runs/x", "corpus_id=x"])
    assert loaded.fit.batch_size == pretrain_encoder.FitConfig().batch_size
    layer = yaml.safe_load(path.read_text())
    assert set(layer) == {"fit", "cluster"}
    assert set(layer["fit"]) <= {"accumulation", "precision", "zero_stage"}


@pytest.mark.parametrize("name", SCALES)
def test_scale__opens_with_hardware_command_and_hours(name: str) -> None:
    opening = (ROOT / "conf" / "scale" / name).read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in ("Hardware:", "Command:", "Hours:", "Source:"):
        assert word in opening


@pytest.mark.parametrize(
    "path", [*KUBERAY_PATH.glob("*.yaml"), ROOT / "cluster" / "launcher.yaml"], ids=lambda path: path.name
)
def test_cluster__every_file_opens_with_what_it_is_and_its_commands(path: Path) -> None:
    opening = [line for line in path.read_text().split("\n") if line.startswith("#")]
    assert len(opening) >= 4
    assert any(re.match(r"#   (kubectl|ray) ", line) for line in opening)
