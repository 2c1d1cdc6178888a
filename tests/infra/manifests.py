"""What a Kubernetes document of ours must be: strict schemas, and the rules of a review.

`kuberay_schemas.json.gz` holds the OpenAPI schemas (version v1) of KubeRay 1.7.0's resource definitions without their
descriptions: github.com/ray-project/kuberay, Apache License 2.0.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from tests.end_to_end.small_run import ROOT

FOLDER = ROOT / "infra" / "kuberay"
SCHEMAS = Path(__file__).parent / "kuberay_schemas.json.gz"
KUBERNETES = "1.33"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
UNCHECKED = ("PodMonitor", "PrometheusRule", "Kustomization")  # definitions that we have not
CHECKPOINT_S = 120  # what infra/cluster.sh gives a job to save
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|KEY|CREDENTIAL|DATABASE|BACKEND_STORE_URI")
SECRET_VALUE = re.compile(r"://[^/\s:]+:[^@\s]+@|BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}")
Doc = dict[str, Any]


def strict(schema: Any) -> Any:
    """The same schema, no field allowed but those it names."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    closed = "properties" in made and "additionalProperties" not in made
    if closed and not made.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@cache
def ray_schemas() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(gzip.decompress(SCHEMAS.read_bytes()))
    for schema in loaded.values():
        schema["properties"]["metadata"] = {"type": "object"}  # checked with the core's own kinds
    return {kind: strict(schema) for kind, schema in loaded.items()}


def check_schema(doc: Doc) -> list[str]:
    """What its schema refuses."""
    kind = doc["kind"]
    if kind in UNCHECKED:
        return []
    if kind in RAY_KINDS:
        found = jsonschema.Draft7Validator(ray_schemas()[kind]).iter_errors(doc)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]
    import kubernetes_validate

    try:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)[:200]]
    return []


def pods(doc: Doc) -> Iterator[tuple[str, Doc]]:
    """Each pod specification in a document, with its role."""
    spec = doc.get("spec", {})
    if doc["kind"] == "Deployment":
        yield "deployment", spec["template"]["spec"]
    for cluster in clusters(doc):
        yield "head", cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            yield "worker", group["template"]["spec"]


def clusters(doc: Doc) -> Iterator[Doc]:
    spec = doc.get("spec", {})
    if doc["kind"] in RAY_KINDS:
        yield spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def containers(pod: Doc) -> list[Doc]:
    return [*pod.get("initContainers", []), *pod["containers"]]


# --- the review's rules: each returns what it refuses ----------------------------------------------------------------


def limits(doc: Doc) -> list[str]:
    """Every container says what it needs and at most takes."""
    found = [
        f"{c['name']}: resources.{kind}.{what}"
        for _, pod in pods(doc)
        for c in containers(pod)
        for kind in ("requests", "limits")
        for what in ("cpu", "memory")
        if what not in c.get("resources", {}).get(kind, {})
    ]
    autoscalers = [c["autoscalerOptions"] for c in clusters(doc) if c.get("enableInTreeAutoscaling")]
    return found + ["autoscalerOptions.resources" for options in autoscalers if "limits" not in options["resources"]]


def confined(doc: Doc) -> list[str]:
    """No root, no more rights, no capabilities."""
    found: list[str] = []
    for _, pod in pods(doc):
        security = pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            found.append("securityContext: may run as root")
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            found.append("securityContext.seccompProfile")
        for c in containers(pod):
            own = c.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
                found.append(f"{c['name']}: securityContext")
            if own.get("privileged") or own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
                found.append(f"{c['name']}: privileged")
    return found


def by_digest(doc: Doc) -> list[str]:
    """A tag may be moved."""
    images = [c["image"] for _, pod in pods(doc) for c in containers(pod)]
    return [image for image in images if not re.search(r"@sha256:[0-9a-f]{64}$", image)]


def secrets_by_reference(doc: Doc) -> list[str]:
    """No secret in clear, wherever it stands."""
    found = [
        f"{c['name']}: env {item['name']}"
        for _, pod in pods(doc)
        for c in containers(pod)
        for item in c.get("env", [])
        if SECRET_NAME.search(item["name"]) and "secretKeyRef" not in item.get("valueFrom", {})
    ]
    found += ["a Secret with its data"] if doc["kind"] == "Secret" else []
    return found + (["a password or key in clear"] if SECRET_VALUE.search(json.dumps(doc)) else [])


def keys_where_others_listen(doc: Doc) -> list[str]:
    """An endpoint on all addresses asks for keys; Ray's dashboard for a token."""
    import yaml

    found = ["authOptions.mode is not token" for c in clusters(doc) if c.get("authOptions", {}).get("mode") != "token"]
    if doc["kind"] == "RayService":
        serve = yaml.safe_load(doc["spec"]["serveConfigV2"])
        if serve["http_options"]["host"] not in ("127.0.0.1", "localhost"):
            for application in serve["applications"]:
                overrides = application["args"]["overrides"]
                if not any(re.match(r"serving\.key_hashes=\[\S+\]$", each) for each in overrides):
                    found.append("0.0.0.0 without serving.key_hashes")
    return found


def shared_memory(doc: Doc) -> list[str]:
    """Ray's object store has room of its own."""
    found: list[str] = []
    for role, pod in pods(doc):
        mounted = {m["mountPath"]: m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
        volumes = {v["name"]: v.get("emptyDir", {}) for v in pod.get("volumes", [])}
        shm = volumes.get(mounted.get("/dev/shm", ""), {})
        if role != "deployment" and not (shm.get("medium") == "Memory" and "sizeLimit" in shm):
            found.append(f"{role}: /dev/shm")
    return found


def time_to_save(doc: Doc) -> list[str]:
    """A pod that is asked to go has the time of a checkpoint."""
    return [
        f"{role}: terminationGracePeriodSeconds"
        for role, pod in pods(doc)
        if role != "deployment" and pod.get("terminationGracePeriodSeconds", 30) < CHECKPOINT_S
    ]


def head_stays(doc: Doc) -> list[str]:
    """The head lies on a node that is not taken away, and does no work."""
    found: list[str] = []
    for cluster in clusters(doc):
        head = cluster["headGroupSpec"]
        if "on-demand" not in head["template"]["spec"].get("nodeSelector", {}).values():
            found.append("head: on-demand")
        if head["rayStartParams"].get("num-cpus") != "0":
            found.append("head: num-cpus")
    return found


def job_ends(doc: Doc) -> list[str]:
    """A job is tried again, but not for ever, and gives its nodes back."""
    if doc["kind"] != "RayJob":
        return []
    spec = doc["spec"]
    wanted = {"backoffLimit": 1, "activeDeadlineSeconds": 1, "shutdownAfterJobFinishes": True}
    found = [key for key, least in wanted.items() if not spec.get(key) or spec[key] < least]
    return found + ([] if " root=s3://" in spec["entrypoint"] else ["entrypoint: nothing to go on from without root"])


def probes(doc: Doc) -> list[str]:
    """Ray's pods have KubeRay's own, which ask on loopback; any other says how it is found well."""
    return [
        f"{c['name']}: {probe}"
        for role, pod in pods(doc)
        if role == "deployment"
        for c in pod["containers"]
        for probe in ("readinessProbe", "livenessProbe")
        if probe not in c
    ]


RULES: dict[str, Callable[[Doc], list[str]]] = {
    "schema": check_schema,
    "limits": limits,
    "confined": confined,
    "by digest": by_digest,
    "secrets by reference": secrets_by_reference,
    "keys where others listen": keys_where_others_listen,
    "shared memory": shared_memory,
    "time to save": time_to_save,
    "head stays": head_stays,
    "job ends": job_ends,
    "probes": probes,
}


def refused(doc: Doc) -> dict[str, list[str]]:
    """Of each rule, what it refuses; empty where the document passes. The others read what its schema allows."""
    if found := check_schema(doc):
        return {"schema": found}
    return {name: found for name, rule in RULES.items() if (found := rule(doc))}
