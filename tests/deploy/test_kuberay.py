"""KubeRay's resources: the fields that the manifests use, with types and values of KubeRay 1.6's reference.

A field that is not listed is an error, so that one which is new here is looked up first. Templates of pods
are checked by Kubernetes' own schemas, in `test_manifests.py`.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.runtime_env import RuntimeEnv

DEPLOY = Path(__file__).parents[2] / "jobs/deploy"
Schema = dict[str, Any]


def fields(required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Schema = {"type": "string", "minLength": 1}
SWITCH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
POSITIVE: Schema = {**COUNT, "minimum": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
TEMPLATE: Schema = {"type": "object", "required": ["spec"]}
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}

AUTOSCALER = fields(
    version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
)
HEAD = fields(
    ("rayStartParams", "template"),
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    enableIngress=SWITCH,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
RAY_CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
RAY_JOB = fields(
    ("rayClusterSpec",),
    entrypoint=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=POSITIVE,
    preRunningDeadlineSeconds=POSITIVE,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=fields(backoffLimit=COUNT),
    submitterPodTemplate=TEMPLATE,
    runtimeEnvYAML=TEXT,
    rayClusterSpec=RAY_CLUSTER,
)
METADATA = {**fields(name=TEXT, generateName=TEXT, namespace=TEXT, labels=TEXTS), "minProperties": 1}


def schema(kind: str, spec: Schema) -> Schema:
    head = {"apiVersion": one_of("ray.io/v1"), "kind": one_of(kind), "metadata": METADATA}
    return fields(("apiVersion", "kind", "metadata", "spec"), **head, spec=spec)


SCHEMAS: Mapping[str, Schema] = {
    "rayjob.yaml": schema("RayJob", RAY_JOB),
    "raycluster.yaml": schema("RayCluster", RAY_CLUSTER),
}


def document(name: str) -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load((DEPLOY / name).read_text()))


@pytest.mark.parametrize("name", SCHEMAS)
def test_kuberay_accepts_it(name):
    found = document(name)
    jsonschema.Draft202012Validator(SCHEMAS[name]).validate(found)
    spec = found["spec"]
    for group in spec.get("rayClusterSpec", spec)["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if name == "rayjob.yaml":
        # Its controller refuses the one without the other.
        assert not spec["ttlSecondsAfterFinished"] or spec["shutdownAfterJobFinishes"]
        RuntimeEnv(**yaml.safe_load(spec["runtimeEnvYAML"]))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("rayjob.yaml", "apiVersion", "ray.io/v1alpha1"),
        ("rayjob.yaml", "spec.submissionMode", "K8sJobMod"),
        ("rayjob.yaml", "spec.backoffLimit", "2"),
        ("rayjob.yaml", "spec.backofLimit", 2),
        ("rayjob.yaml", "spec.activeDeadlineSeconds", 0),
        ("rayjob.yaml", "spec.shutdownAfterJobFinishes", "true"),
        ("rayjob.yaml", "spec.submitterConfig.backoffLimit", -1),
        ("rayjob.yaml", "spec.rayClusterSpec.autoscalerOptions.version", "v3"),
        ("raycluster.yaml", "spec.authOptions", "token"),
        ("raycluster.yaml", "spec.authOptions.mode", "tokens"),
        ("raycluster.yaml", "spec.authOptions.secretName", ["acsr-ray-token"]),
        ("raycluster.yaml", "spec.autoscalerOptions.upscalingMode", "x"),
        ("raycluster.yaml", "spec.autoscalerOptions.idleTimeoutSeconds", "600"),
        ("raycluster.yaml", "spec.headGroupSpec.serviceType", "clusterIP"),
        ("raycluster.yaml", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.maxReplicas", 1.5),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.template", None),
    ],
)
def test_what_kuberay_would_refuse(name, path, value):
    broken = document(name)
    *way, last = path.split(".")
    node = broken
    for step in way:
        node = node[int(step)] if isinstance(node, list) else node[step]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(broken)
