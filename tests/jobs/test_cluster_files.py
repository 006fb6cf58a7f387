"""The cluster files: Ray's own checks accept them, and they keep the promises that their comments make."""

import copy
import json
import re
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.runtime_env import packaging
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
RAYJOB = yaml.safe_load((REPOSITORY / "conf" / "kuberay_rayjob.yaml").read_text())
GPU_TYPES = ("gpu_spot", "gpu_on_demand")


def prepared(cluster: dict) -> dict:
    """What `ray up` makes of the file before it asks the cloud anything; raises on what it would refuse."""
    config = prepare_config(copy.deepcopy(cluster))
    validate_config(config)
    return config


# ray_cluster.yaml


def test_rays_schema_check_accepts_the_cluster_file():
    assert prepared(CLUSTER)["cluster_name"] == "otprune"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "max_worker"),
        (("docker",), "imagee"),
        (("available_node_types", "gpu_spot"), "resource"),
        (("auth",), "user"),
    ],
)
def test_rays_schema_check_finds_a_typo(path, key):
    broken = copy.deepcopy(CLUSTER)
    place = broken
    for step in path:
        place = place[step]
    place[key] = {}
    with pytest.raises(jsonschema.ValidationError, match=key):
        prepared(broken)


def test_the_head_is_one_of_the_node_types_and_runs_no_work():
    head = CLUSTER["available_node_types"][CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    broken = copy.deepcopy(CLUSTER)
    broken["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        prepared(broken)


def test_every_node_type_says_what_it_has_and_where_its_price_is_found():
    for name, node in CLUSTER["available_node_types"].items():
        spot = node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert node["resources"], name
        assert node["labels"] == {
            "instance-type": node["node_config"]["InstanceType"],
            "ray.io/market-type": "spot" if spot else "on-demand",
            "ray.io/availability-region": CLUSTER["provider"]["region"],
        }
    assert "InstanceMarketOptions" in CLUSTER["available_node_types"]["gpu_spot"]["node_config"]


def test_ray_gives_the_labels_of_the_file_to_its_nodes(monkeypatch):
    labels = CLUSTER["available_node_types"]["gpu_spot"]["labels"]
    monkeypatch.setenv("RAY_OVERRIDE_LABELS", json.dumps(labels))
    spec = ResourceAndLabelSpec(num_cpus=8, num_gpus=0, memory=2**30, object_store_memory=2**28)
    spec.resolve(is_head=False, node_ip_address="127.0.0.1")
    assert labels.items() <= spec.labels.items()


def _launched(availability: dict[str, float]) -> set[str]:
    """Node types that Ray's autoscaler starts for an encode and a generate actor."""
    config = AutoscalingConfig(prepared(CLUSTER), skip_content_hash=True)
    actors = [ResourceRequestUtil.make({"GPU": share, "CPU": 1}) for share in (0.2, 0.8)]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(actors),
        recoverable_resource_availabilities=availability,
    )
    launches = ResourceDemandScheduler().schedule(request).to_launch
    return {launch.instance_type for launch in launches} - {CLUSTER["head_node_type"]}


def test_the_autoscaler_prefers_spot_falls_back_to_on_demand_and_returns():
    assert _launched({}) == {"gpu_spot"}
    assert _launched({"gpu_spot": 0.0}) == {"gpu_on_demand"}  # a launch just failed
    assert _launched({"gpu_spot": 1.0}) == {"gpu_spot"}  # that was a while ago


def test_the_gpu_types_are_the_same_but_for_the_market():
    spot, on_demand = (copy.deepcopy(CLUSTER["available_node_types"][name]) for name in GPU_TYPES)
    del spot["node_config"]["InstanceMarketOptions"], spot["priority"], spot["labels"], on_demand["labels"]
    assert spot == on_demand


def test_the_dashboard_is_not_open_to_the_world():
    start = " ".join(CLUSTER["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in (REPOSITORY / "ray_cluster.yaml").read_text()


def test_the_object_store_has_shared_memory():
    assert any(option.startswith("--shm-size=") for option in CLUSTER["docker"]["worker_run_options"])


# Both files


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "conf/kuberay_rayjob.yaml"])
def test_images_hold_the_ray_and_python_that_the_package_pins(name):
    text = (REPOSITORY / name).read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    images = re.findall(r"rayproject/ray:([\d.]+)-py(\d)(\d+)", text)
    assert images
    for ray_version, major, minor in images:
        assert ray_version == version("ray")
        assert f"ray[data,default]=={ray_version.rsplit('.', 1)[0]}.*" in project["dependencies"]
        assert f">={major}.{minor}" == project["requires-python"]


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "conf/kuberay_rayjob.yaml"])
def test_the_files_that_the_commands_name_exist(name):
    text = (REPOSITORY / name).read_text()
    files = re.findall(r"(?<![\w.-])(?:/home/ray/otprune/)?((?:jobs|conf)/\w+\.\w+|requirements\.lock)", text)
    assert {"jobs/caption_corpus.py", "conf/llava15_7b.yaml", "requirements.lock"} <= set(files)
    for file in files:
        assert (REPOSITORY / file).is_file(), file


# conf/kuberay_rayjob.yaml, against the fields of KubeRay's v1 types; the CRD itself is not at hand here

FIELDS = {
    "spec": {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"},
    "cluster": {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions",
        "headGroupSpec", "workerGroupSpecs",
    },
    "head": {"rayStartParams", "template"},
    "worker": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "labels", "template"},
    "pod": {"serviceAccountName", "nodeSelector", "tolerations", "containers", "volumes"},
    "container": {"name", "image", "resources", "volumeMounts"},
}  # fmt: skip


def test_the_rayjob_has_only_fields_that_kuberay_knows():
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert RAYJOB["spec"].keys() <= FIELDS["spec"]
    assert cluster.keys() <= FIELDS["cluster"]
    assert cluster["headGroupSpec"].keys() <= FIELDS["head"]
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["worker"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod.keys() <= FIELDS["pod"]
        for container in pod["containers"]:
            assert container.keys() <= FIELDS["container"]
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_rayjob_cleans_up_retries_and_runs_nothing_on_its_head():
    spec = RAYJOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_workers_of_the_rayjob_are_on_spot_with_shared_memory():
    for group in RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert "spot" in pod["nodeSelector"].values()
        assert group["labels"]["ray.io/market-type"] == "spot"
        memory = {volume["name"] for volume in pod["volumes"] if volume["emptyDir"]["medium"] == "Memory"}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/dev/shm"] in memory


# .rayignore


def uploaded(folder: Path, target: Path, *, include_gitignore: bool) -> set[str]:
    """Names that `ray job submit --working-dir folder` would send."""
    packaging.create_package(str(folder), target, include_gitignore=include_gitignore, excludes=[])
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_environments_caches_and_runs_are_not_uploaded(tmp_path):
    folder = tmp_path / "checkout"
    kept, left = (
        ("jobs/job.py", "conf/a.yaml"),
        (".git/x", ".venv/x", ".venv-gpu/x", ".cache/x", "runs/x", "tests/x.py"),
    )
    for name in (*kept, *left):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / ".rayignore").write_text((REPOSITORY / ".rayignore").read_text())
    names = uploaded(folder, tmp_path / "package.zip", include_gitignore=False)
    assert names - {".rayignore"} == set(kept)


def test_the_upload_of_this_checkout_is_small_and_whole(tmp_path):
    """Ray refuses packages beyond 500 MiB; ours is the demo checkpoint and text."""
    names = uploaded(REPOSITORY, tmp_path / "package.zip", include_gitignore=True)
    assert {
        "jobs/caption_corpus.py",
        "conf/llava15_7b.yaml",
        "pipelines/images/decode.py",
        "otprune/select.py",
    } <= names
    assert any(name.startswith("demo/checkpoint/") for name in names)
    assert (tmp_path / "package.zip").stat().st_size < 20 * 2**20
