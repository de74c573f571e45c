"""The files for clusters: what Ray and Kubernetes say of them, and what we want of every one of them."""

import copy
import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from acsr_ray.cli import ENTRY_POINTS
from acsr_ray.config import parse_job
from acsr_ray.corpus.stopping import GRACE_S
from acsr_ray.distributed.joining import OLDEST_RAY
from acsr_ray.operations.nightly import RepurifyNightlySettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "jobs/deploy"
KUBERNETES = ("1.28", "1.34")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = "2.60.0"
STOP_S = 30
"""How long a clean stop may take."""


@functools.cache
def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


MANIFESTS = sorted(path.name for path in DEPLOY.glob("*.yaml") if path.name != "kustomization.yaml")
DOCUMENTS = [(name, number) for name in MANIFESTS for number in range(len(documents(name)))]


def cluster_of(name: str) -> dict[str, Any]:
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


def templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pod templates of a manifest by what they are for."""
    spec, kind = document.get("spec", {}), document["kind"]
    if kind == "CronJob":
        return {"cron": spec["jobTemplate"]["spec"]["template"]}
    if kind not in ("RayJob", "RayCluster"):
        return {}
    cluster = spec.get("rayClusterSpec", spec)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {f"workers {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    return found | ({"submitter": spec["submitterPodTemplate"]} if "submitterPodTemplate" in spec else {})


PODS = [(name, number, what) for name, number in DOCUMENTS for what in templates(documents(name)[number])]


def pod(name: str, number: int, what: str) -> dict[str, Any]:
    return templates(documents(name)[number])[what]["spec"]


def leaves(node: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every scalar of a document with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, path)
    else:
        yield path, node


def size(text: str) -> float:
    """Return a Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi|)", str(text)).groups()
    return float(number) * {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in container["env"]}


# Kubernetes' own schemas


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(("name", "number"), DOCUMENTS)
def test_kubernetes_accepts_it(name, number, version):
    document = documents(name)[number]
    if not document["apiVersion"].startswith("ray.io"):
        kubernetes_validate.validate(document, version, strict=True)
    for what, template in templates(document).items():
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        body["metadata"] |= template["metadata"]
        assert "restartPolicy" not in template["spec"] or template["spec"]["restartPolicy"] == "Never", what
        kubernetes_validate.validate(body, version, strict=True)


def test_the_schemas_are_strict():
    document = copy.deepcopy(documents("cronjob.yaml")[-1])
    document["spec"]["jobTemplate"]["spec"]["backofLimit"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(document, KUBERNETES[0], strict=True)


# Who gets in


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_token_authentication_is_on_everywhere(name):
    assert cluster_of(name)["authOptions"] == {"mode": "token", "secretName": "acsr-ray-token"}
    for what, template in templates(documents(name)[0]).items():
        for container in template["spec"]["containers"]:
            variables = environment(container)
            assert variables["RAY_AUTH_MODE"]["value"] == "token", what
            # The key that KubeRay reads.
            reference = variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "acsr-ray-token", "key": "auth_token"}, what


SECRET_NAME = re.compile(r"(?i)(token|secret|passw|credential|(access|api|private)_?key)")


@pytest.mark.parametrize(("name", "number", "what"), PODS)
def test_secrets_are_references(name, number, what):
    for container in pod(name, number, what)["containers"]:
        for entry in container.get("env", []):
            if SECRET_NAME.search(entry["name"]):
                assert "value" not in entry
                assert "secretKeyRef" in entry["valueFrom"]


@pytest.mark.parametrize(
    "path",
    [ROOT / "cluster.yaml", *sorted(path for path in DEPLOY.rglob("*") if path.is_file())],
    ids=lambda path: path.name,
)
def test_no_secret_and_no_open_door_in_any_text(path):
    text = path.read_text()
    assert not re.search(r"\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}|-----BEGIN", text)
    assert not re.search(r"LoadBalancer|NodePort|kind: Ingress|hostNetwork|hostPort|privileged: true", text)
    assert "RAY_AUTH_MODE=disabled" not in text
    assert ":latest" not in text


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_nothing_is_open_to_the_outside(name):
    head = cluster_of(name)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False


def test_the_network_policy_lets_in_whom_it_must():
    deny, ray = documents("networkpolicy.yaml")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    chosen = ray["spec"]["podSelector"]["matchLabels"]
    sources = [entry for rule in ray["spec"]["ingress"] for entry in rule["from"]]
    assert all(entry for entry in sources), "an empty peer is everybody"
    assert all("from" in rule for rule in ray["spec"]["ingress"])
    inside = [entry["podSelector"]["matchLabels"] for entry in sources if "namespaceSelector" not in entry]
    for name in ("rayjob.yaml", "raycluster.yaml"):
        for what, template in templates(documents(name)[0]).items():
            labels = template["metadata"]["labels"]
            assert (chosen.items() <= labels.items()) == (what != "submitter")
            assert any(wanted.items() <= labels.items() for wanted in inside), what
    unlimited = [rule for rule in ray["spec"]["ingress"] if "ports" not in rule]
    assert [rule["from"][0]["podSelector"]["matchLabels"] for rule in unlimited] == [chosen]


@pytest.mark.parametrize(("name", "number", "what"), PODS)
def test_containers_have_few_rights(name, number, what):
    spec = pod(name, number, what)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    # The head's account is the operator's affair, for its autoscaler.
    if what not in ("head", "cron"):
        assert spec["automountServiceAccountToken"] is False


def test_the_schedule_may_create_ray_jobs_and_no_more():
    account, role, binding, cron = documents("cronjob.yaml")
    assert role["kind"] == "Role"
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert binding["roleRef"]["kind"] == "Role"
    name = account["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [name]
    assert cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"] == name


# Versions


def test_versions_agree():
    floor = next(line for line in PROJECT["dependencies"] if line.startswith("ray["))
    low, high = re.search(r">=([0-9.]+),<([0-9.]+)", floor).groups()
    numbers = [tuple(map(int, text.split("."))) for text in (low, RAY, high)]
    assert numbers == sorted(numbers)
    assert tuple(map(int, low.split("."))) == OLDEST_RAY
    ours = f"registry.example.com/acsr-ray:{PROJECT['version']}-ray{RAY}"
    text = (ROOT / "cluster.yaml").read_text()
    assert f"acsr_ray@v{PROJECT['version']}" in text
    assert f"rayproject/ray:{RAY}-py311-gpu" in text
    container = (DEPLOY / "Containerfile").read_text()
    assert f"ARG RAY_VERSION={RAY}" in container
    for name in ("rayjob.yaml", "raycluster.yaml"):
        assert cluster_of(name)["rayVersion"] == RAY
        for template in templates(documents(name)[0]).values():
            assert [entry["image"] for entry in template["spec"]["containers"]] == [ours]
    for path in (DEPLOY / "README.md", DEPLOY / "Containerfile"):
        assert ours in path.read_text()


@pytest.mark.parametrize(("name", "number", "what"), PODS)
def test_images_are_pinned(name, number, what):
    for container in pod(name, number, what)["containers"]:
        assert re.search(r":v?\d+\.\d+\.\d+|@sha256:", container["image"])


def test_the_image_is_ours_and_not_roots():
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("USER")][-1] == "1000"
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).split("=")[1].split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys() - {"attacks", "dev"}
    body = "\n".join(line for line in lines if not line.startswith("#"))
    assert "torchattacks" not in body
    copied = [line.split()[2:-1] for line in lines if line.startswith("COPY")]
    assert all((ROOT / source).exists() for sources in copied for source in sources)


# Deadlines, stops, sizes


def test_runs_have_deadlines_and_a_number_of_attempts():
    job = documents("rayjob.yaml")[0]["spec"]
    assert 1 <= job["backoffLimit"] <= 10
    assert 1 <= job["submitterConfig"]["backoffLimit"] <= 10
    assert 0 < job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"] <= 24 * 3600
    # Not by rules: none of them is for a job that was stopped, whose cluster would stay.
    assert job["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in job
    cron = documents("cronjob.yaml")[-1]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["startingDeadlineSeconds"] > 0
    assert cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
    assert 1 <= cron["jobTemplate"]["spec"]["backoffLimit"] <= 10


def test_a_clean_stop_has_its_time():
    assert GRACE_S < STOP_S
    job = documents("rayjob.yaml")[0]["spec"]
    waits = [yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]]
    for name in ("rayjob.yaml", "raycluster.yaml"):
        for template in templates(documents(name)[0]).values():
            container = template["spec"]["containers"][0]
            if "lifecycle" in container:
                waits.append(environment(container)["RAY_JOB_STOP_WAIT_TIME_S"]["value"])
        head = templates(documents(name)[0])["head"]["spec"]
        command = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "acsr_ray.distributed.stop_jobs"]
        assert callable(import_module(command[2]).main)
        assert int(waits[0]) < int(command[3]) < head["terminationGracePeriodSeconds"]
    text = (ROOT / "cluster.yaml").read_text() + (DEPLOY / "Containerfile").read_text()
    waits += re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", text)
    assert len(waits) == 7
    assert {int(wait) for wait in waits} == {40}
    assert int(waits[0]) > STOP_S


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_a_worker_that_ends_is_drained_first(name):
    spec = templates(documents(name)[0])["workers gpu"]["spec"]
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, rest = command[2].split(";")
    from ray.scripts.scripts import drain_node

    options = {flag for option in drain_node.params for flag in option.opts}
    given = [token.split("=")[0] for token in shlex.split(drain)[2:]]
    assert given
    assert set(given) <= options
    assert int(rest.split()[1]) < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_the_object_store_fits(name):
    cluster = cluster_of(name)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        store = int(group["rayStartParams"]["object-store-memory"])
        (shm,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert store < size(shm["sizeLimit"])
        assert size(shm["sizeLimit"]) < size(container["resources"]["limits"]["memory"]) / 2


def test_a_night_without_news_starts_no_worker():
    """Workers come when the job asks for GPUs, which it does when there is something to purify."""
    cluster = cluster_of("rayjob.yaml")
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 0
    asked = nightly().ray
    per_pod = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert asked.gpus == group["maxReplicas"] * per_pod
    assert asked.gpus_wait_s < documents("rayjob.yaml")[0]["spec"]["activeDeadlineSeconds"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_heads_stay_and_workers_may_go(name):
    found = templates(documents(name)[0])
    assert cluster_of(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, workers = found["head"]["spec"], found["workers gpu"]["spec"]
    assert "tolerations" not in head
    affinity = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    spot = {entry["key"] for entry in term["matchExpressions"]}
    assert all(entry["operator"] in ("NotIn", "DoesNotExist") for entry in term["matchExpressions"])
    tolerated = {entry["key"] for entry in workers["tolerations"]}
    assert tolerated - {"nvidia.com/gpu"} <= spot
    assert "nvidia.com/gpu" in tolerated
    resources = workers["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]


# Commands


def parsed(words: list[str]) -> Any:
    """Return the settings that a command of ours has, as `acsr-ray` reads them."""
    assert words[0] == "acsr-ray"
    job = words[1].replace("-", "_")
    module, settings, _ = ENTRY_POINTS[job]
    return parse_job(getattr(import_module(module), settings), job, words[2:])


def nightly() -> RepurifyNightlySettings:
    """Return the settings of the night's job."""
    return parsed(shlex.split(documents("rayjob.yaml")[0]["spec"]["entrypoint"]))


def test_the_jobs_command_is_one_of_ours():
    settings = nightly()
    # The night's job, which keeps what an input that is suddenly empty would take away.
    assert isinstance(settings, RepurifyNightlySettings)
    assert settings.max_removed_share == 0.5
    assert settings.input.startswith("s3://")
    assert settings.output.startswith("s3://")


COMMAND = re.compile(r"acsr-ray submit .*? --input \S+ --output \S+(?: --ray\.gpus \d+)?")


@pytest.mark.parametrize("name", ["cluster.yaml", "jobs/deploy/raycluster.yaml", "jobs/deploy/README.md"])
def test_the_commands_in_the_text_are_ours(name):
    found = COMMAND.findall((ROOT / name).read_text())
    assert found
    for text in found:
        submission = parsed(shlex.split(text))
        assert submission.attempts == 3
        job = parsed(["acsr-ray", submission.job, *submission.arguments])
        assert job.ray.gpus == 8


def test_the_schedule_creates_what_is_there():
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    assert all((DEPLOY / name).exists() for name in kustomization["resources"])
    (generated,) = kustomization["configMapGenerator"]
    spec = pod("cronjob.yaml", len(documents("cronjob.yaml")) - 1, "cron")
    (volume,) = [entry for entry in spec["volumes"] if "configMap" in entry]
    assert volume["configMap"]["name"] == generated["name"]
    (container,) = spec["containers"]
    (mount,) = [entry for entry in container["volumeMounts"] if entry["name"] == volume["name"]]
    file = next(word.split("=")[1] for word in container["args"] if word.startswith("--filename="))
    assert file in [f"{mount['mountPath']}/{name}" for name in generated["files"]]
    # `create` needs no name of its own, so that every night has one.
    assert container["args"][0] == "create"
    metadata = documents("rayjob.yaml")[0]["metadata"]
    assert "name" not in metadata
    assert metadata["generateName"].endswith("-")
    spaces = {doc["metadata"].get("namespace") for name in MANIFESTS for doc in documents(name)}
    assert spaces == {kustomization["namespace"]}


# `ray up`


@pytest.fixture
def launched():
    """cluster.yaml as `ray up` sees it after Ray has filled in its defaults."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_ray_up_accepts_cluster_yaml(launched):
    assert launched["available_node_types"]["head"]["max_workers"] == 0
    broken = {**launched, "available_node_tpyes": {}}
    with pytest.raises(Exception, match="available_node_tpyes"):
        validate_config(broken)


def test_the_launched_cluster_grows_and_its_head_has_no_tasks(launched):
    types = launched["available_node_types"]
    head, workers = types[launched["head_node_type"]], types["gpu_worker"]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert workers["resources"]["GPU"] == 1
    assert 1 <= workers["min_workers"] < workers["max_workers"] <= launched["max_workers"]
    assert launched["idle_timeout_minutes"] > 0


def test_the_launched_cluster_lets_nobody_in(launched):
    for commands in (launched["head_start_ray_commands"], launched["worker_start_ray_commands"]):
        starts = [line for line in commands if "ray start" in line]
        assert starts
        assert all(line.startswith("RAY_AUTH_MODE=token ray start") for line in starts)
    (head,) = [line for line in launched["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    assert "--env RAY_AUTH_MODE=token" in launched["docker"]["run_options"]
    assert launched["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for kind in launched["available_node_types"].values():
        # With a group of their own, Ray makes none, which would open port 22 to all.
        assert kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["IamInstanceProfile"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
