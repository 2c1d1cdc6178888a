"""infra/kuberay: every document valid to the letter, every rule of the review able to refuse, every name the code's."""

import copy
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.end_to_end.small_run import ROOT
from tests.infra.manifests import FOLDER, RULES, UNCHECKED, Doc, clusters, pods, refused

DOCS: dict[str, Doc] = {
    f"{path.name}:{doc['kind']}:{doc['metadata']['name']}": doc
    for path in sorted(FOLDER.glob("*.yaml"))
    for doc in yaml.safe_load_all(path.read_text())
    if doc["kind"] != "Kustomization"
}
JOB, CLUSTER, SERVICE, MLFLOW = (
    next(doc for doc in DOCS.values() if doc["kind"] == kind)
    for kind in ("RayJob", "RayCluster", "RayService", "Deployment")
)


@pytest.mark.parametrize("name", DOCS)
def test_every_document_passes(name: str) -> None:
    assert refused(DOCS[name]) == {}


def head(doc: Doc) -> Doc:
    return next(iter(clusters(doc)))["headGroupSpec"]["template"]["spec"]


def _literal(doc: Doc) -> None:
    head(doc)["containers"][0]["env"][1] = {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}


def _without_keys(doc: Doc) -> None:
    text = doc["spec"]["serveConfigV2"]
    doc["spec"]["serveConfigV2"] = re.sub(r" *- serving\.key_hashes.*\n", "", text)


def _tag(doc: Doc) -> None:
    head(doc)["containers"][0]["image"] = "example.org/raydiffusion-cpu:latest"


# the rule that must refuse it -> documents with one thing wrong
MUTATIONS: list[tuple[str, Doc, Callable[[Doc], Any]]] = [
    ("schema", CLUSTER, lambda d: d["spec"]["workerGroupSpecs"][0].update(groupname="feed")),
    ("schema", JOB, lambda d: d["spec"].update(backofLimit=3)),
    ("schema", SERVICE, lambda d: head(d)["containers"][0].update(imagePullPolice="Always")),
    ("schema", SERVICE, lambda d: d["spec"].update(serveConfigV2={"applications": []})),
    ("schema", MLFLOW, lambda d: d["spec"].update(replica=1)),
    ("schema", MLFLOW, lambda d: d["spec"]["template"]["spec"]["containers"][0].update(port=[])),
    ("schema", MLFLOW, lambda d: d["spec"].update(replicas="one")),
    ("limits", CLUSTER, lambda d: head(d)["containers"][0]["resources"].pop("limits")),
    ("limits", MLFLOW, lambda d: d["spec"]["template"]["spec"]["initContainers"][0].pop("resources")),
    ("limits", JOB, lambda d: next(iter(clusters(d)))["autoscalerOptions"]["resources"].pop("limits")),
    ("confined", JOB, lambda d: head(d)["securityContext"].update(runAsUser=0)),
    ("confined", JOB, lambda d: head(d)["securityContext"].update(runAsNonRoot=False)),
    ("confined", MLFLOW, lambda d: d["spec"]["template"]["spec"]["containers"][0].pop("securityContext")),
    ("confined", SERVICE, lambda d: head(d)["containers"][0]["securityContext"].update(privileged=True)),
    ("by digest", CLUSTER, _tag),
    ("secrets by reference", SERVICE, _literal),
    (
        "secrets by reference",
        JOB,
        lambda d: d["spec"].update(entrypoint="x root=s3://b tracking.uri=http://u:p@h:5000"),
    ),
    ("keys where others listen", SERVICE, _without_keys),
    ("keys where others listen", CLUSTER, lambda d: d["spec"].pop("authOptions")),
    ("keys where others listen", JOB, lambda d: next(iter(clusters(d))).update(authOptions={"mode": "disabled"})),
    ("shared memory", CLUSTER, lambda d: head(d)["volumes"].pop(0)),
    ("shared memory", CLUSTER, lambda d: head(d)["volumes"][0].update(emptyDir={})),
    ("time to save", JOB, lambda d: head(d).pop("terminationGracePeriodSeconds")),
    ("head stays", JOB, lambda d: head(d)["nodeSelector"].update({"karpenter.sh/capacity-type": "spot"})),
    ("head stays", CLUSTER, lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].pop("num-cpus")),
    ("job ends", JOB, lambda d: d["spec"].pop("backoffLimit")),
    ("job ends", JOB, lambda d: d["spec"].pop("activeDeadlineSeconds")),
    ("job ends", JOB, lambda d: d["spec"].update(shutdownAfterJobFinishes=False)),
    ("job ends", JOB, lambda d: d["spec"].update(entrypoint="python -m jobs.train x.yaml")),
    ("probes", MLFLOW, lambda d: d["spec"]["template"]["spec"]["containers"][0].pop("readinessProbe")),
]


@pytest.mark.parametrize("at", range(len(MUTATIONS)), ids=[f"{rule}-{at}" for at, (rule, _, _) in enumerate(MUTATIONS)])
def test_one_thing_wrong_is_refused_by_its_rule(at: int) -> None:
    rule, doc, change = MUTATIONS[at]
    changed = copy.deepcopy(doc)
    change(changed)
    assert changed != doc
    assert rule in refused(changed)


def test_every_rule_has_been_seen_to_refuse() -> None:
    assert {rule for rule, _, _ in MUTATIONS} == set(RULES)
    assert {doc["kind"] for doc in DOCS.values()} & set(UNCHECKED) == {"PodMonitor", "PrometheusRule"}


def test_entrypoints_and_overrides_are_the_codes() -> None:
    from pipeline.config import load_config, with_champion

    def config(run_file: str, overrides: list[str]) -> Any:
        assert run_file.startswith("/app/"), "images hold the project at /app"
        filled = [each.replace("SHA256_OF_A_KEY", "a" * 64) for each in overrides]
        return load_config(str(ROOT / run_file.removeprefix("/app/")), filled)

    python, flag, module, run_file, *overrides = shlex.split(JOB["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    trained = config(run_file, overrides)
    assert trained.cluster.workers == (1, 8)

    serve = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    [application] = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    served = with_champion(config(application["args"]["run_file"], application["args"]["overrides"]))
    assert served.serving.host == serve["http_options"]["host"] == "0.0.0.0"
    assert served.serving.model == "models:/digits@champion"
    workers = max(group["maxReplicas"] for c in clusters(JOB) for group in c["workerGroupSpecs"])
    assert trained.cluster.most_workers <= workers


def test_serve_takes_the_configuration() -> None:
    with warnings.catch_warnings():  # Ray's own modules still use deprecated pydantic
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray.serve.schema import ServeDeploySchema

    made = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    assert made.http_options.port == 8000


def test_versions_ports_and_the_gate_are_those_of_the_project() -> None:
    import importlib.metadata

    for doc in (JOB, CLUSTER, SERVICE):
        assert {c["rayVersion"] for c in clusters(doc)} == {importlib.metadata.version("ray")}
    ports = {
        p["containerPort"]
        for doc in (JOB, CLUSTER, SERVICE)
        for _, pod in pods(doc)
        for c in pod["containers"]
        for p in c["ports"]
    }
    policies = [doc for doc in DOCS.values() if doc["kind"] == "NetworkPolicy"]
    opened = {p["port"] for doc in policies for way in doc["spec"].get("ingress", []) for p in way.get("ports", [])}
    assert opened - {52365} <= ports | {5000}
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    literals = dict(line.split("=", 1) for line in kustomization["configMapGenerator"][0]["literals"])
    module, _, name = literals["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert set(kustomization["resources"]) == {p.name for p in FOLDER.glob("*.yaml")} - {
        "kustomization.yaml",
        "rayjob.yaml",
    }


def test_network_is_closed_but_for_names_and_the_api_server() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in DOCS.values() if d["kind"] == "NetworkPolicy"}
    assert policies["deny-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    allowed = {(p["port"], p["protocol"]) for way in policies["names-and-api"]["egress"] for p in way["ports"]}
    assert {(53, "UDP"), (53, "TCP"), (443, "TCP"), (6443, "TCP")} == allowed
    for spec in policies.values():
        for way in spec.get("ingress", []):
            assert way.get("from"), "an ingress from anywhere"


def test_the_rules_are_those_of_monitoring() -> None:
    rule = next(doc for doc in DOCS.values() if doc["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "infra" / "monitoring" / "rules.yaml").read_text())
    monitor = next(doc for doc in DOCS.values() if doc["kind"] == "PodMonitor")["spec"]
    for doc in (JOB, CLUSTER, SERVICE):
        for cluster in clusters(doc):
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                labels = group["template"]["metadata"]["labels"]
                assert monitor["selector"]["matchLabels"].items() <= labels.items()
                names = {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
                assert {way["port"] for way in monitor["podMetricsEndpoints"]} <= names


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_what_passes() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {"RayCluster", "RayService", "Deployment", "ConfigMap", "NetworkPolicy"} <= {doc["kind"] for doc in rendered}
    assert "RayJob" not in {doc["kind"] for doc in rendered}
    for doc in rendered:
        assert doc["kind"] == "Namespace" or doc["metadata"]["namespace"] == "raydiffusion"
        assert refused(doc) == {}
