"""The manifests of examples/deploy/kubernetes: they build, fit the schemas, and their settings are the server's."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

import vqserve_server
from support import kustomize

KUBERNETES = Path(__file__).parents[2] / "examples" / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (KUBERNETES / "components").glob("*/kustomization.yaml"))
# The oldest has preStop's sleep without a feature gate.
VERSIONS = ("1.32", "1.35", "1.37")
LABELS = {"app.kubernetes.io/name": "vqserve"}


def strict(properties, *, required=()):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
METADATA = strict({"name": TEXT, "labels": {"type": "object", "additionalProperties": TEXT}}, required=["name"])
# The fields that are used, as the custom resource definitions of KEDA 2 and of the Prometheus operator have them.
CUSTOM = {
    ("keda.sh/v1alpha1", "ScaledObject"): strict(
        {
            "scaleTargetRef": strict({"name": TEXT}, required=["name"]),
            "minReplicaCount": NUMBER,
            "maxReplicaCount": NUMBER,
            "pollingInterval": NUMBER,
            "advanced": strict(
                {
                    "horizontalPodAutoscalerConfig": strict(
                        {"behavior": strict({"scaleDown": strict({"stabilizationWindowSeconds": NUMBER})})}
                    )
                }
            ),
            "fallback": strict(
                {"failureThreshold": NUMBER, "replicas": NUMBER}, required=["failureThreshold", "replicas"]
            ),
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": strict(
                    {
                        "type": {"const": "prometheus"},
                        "metricType": {"enum": ["AverageValue", "Value"]},
                        # All values are texts.
                        "metadata": strict(
                            {"serverAddress": TEXT, "query": TEXT, "threshold": TEXT},
                            required=["serverAddress", "query", "threshold"],
                        ),
                    },
                    required=["type", "metadata"],
                ),
            },
        },
        required=["scaleTargetRef", "triggers"],
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): strict(
        {
            "selector": strict({"matchLabels": {"type": "object", "additionalProperties": TEXT}}),
            "endpoints": {
                "type": "array",
                "minItems": 1,
                "items": strict(
                    {
                        "port": TEXT,
                        "path": TEXT,
                        "interval": {"type": "string", "pattern": r"^\d+s$"},
                        "scrapeTimeout": {"type": "string", "pattern": r"^\d+s$"},
                    },
                    required=["port"],
                ),
            },
        },
        required=["selector", "endpoints"],
    ),
}


@pytest.fixture(params=[*OVERLAYS, *(f"cpu with {name}" for name in COMPONENTS)])
def folder(request, tmp_path):
    """An overlay, or the one for CPUs with one component, in a copy of the manifests."""
    overlay, _, component = request.param.partition(" with ")
    manifests = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, manifests)
    if not component:
        return manifests / "overlays" / overlay
    target = manifests / "overlays" / "this"
    target.mkdir()
    content = {"resources": [f"../{overlay}"], "components": [f"../../components/{component}"]}
    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    (target / "kustomization.yaml").write_text(yaml.safe_dump(kind | content))
    return target


@pytest.fixture
def objects(folder):
    """The objects of such a kustomization."""
    return kustomize.build(folder)


def of(objects, kind):
    return [one for one in objects if one["kind"] == kind]


def server(objects):
    """Return the pod, its container and what the container sees as environment."""
    [deployment] = of(objects, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container, {one["name"]: one["value"] for one in container["env"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_a_strict_schema(objects, version):
    for one in objects:
        custom = CUSTOM.get((one["apiVersion"], one["kind"]))
        if custom is None:
            assert kubernetes_validate.validate(one, version, strict=True) == version
        else:
            top = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": custom}
            jsonschema.validate(one, strict(top, required=top))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_notice_a_misspelt_field(version):
    [deployment] = of(kustomize.build(KUBERNETES / "overlays" / "cpu"), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(deployment, version, strict=True)


def test_kustomize_builds_the_same(folder, objects):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which has kustomize, is not installed")
    version = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True, check=False).stdout
    if not re.search(r"Kustomize Version: v([5-9]|\d\d)", version):
        pytest.skip("this kubectl has a kustomize that is too old")
    built = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True).stdout
    # Without the hash of the list's name.
    theirs = list(yaml.safe_load_all(re.sub(r"\b(vqserve-codebooks)-[a-z0-9]{10}\b", r"\1", built)))
    assert comparable(theirs) == comparable(objects)


def comparable(value):
    """Return objects so that the order of lists, which says nothing here but in commands, does not matter."""
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return sorted(map(comparable, value), key=functools.partial(json.dumps, sort_keys=True))
    return value


def test_every_file_belongs_to_an_overlay_or_a_component(tmp_path):
    read = set()
    for overlay in OVERLAYS:
        read |= kustomize.files_of(KUBERNETES / "overlays" / overlay)
    # The one component that no overlay has.
    read |= set((KUBERNETES / "components" / "image-volume").iterdir())
    assert {path for path in KUBERNETES.rglob("*") if path.is_file()} == read


def test_the_server_understands_its_settings(objects, settings):
    pod, container, environment = server(objects)
    sources, config = settings(container["args"], environment)
    assert config.rpc.host == "0.0.0.0"  # noqa: S104
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    expected = {"grpc": config.rpc.port, "health": config.access.health_port}
    if "metrics" in ports:
        expected["metrics"] = config.metrics.port
        assert config.metrics.metrics_host == "0.0.0.0"  # noqa: S104
    assert ports == expected
    [service] = of(objects, "Service")
    assert {one["targetPort"] for one in service["spec"]["ports"]} == ports.keys() - {"health"}
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    files = [config.access.tls_cert, config.access.tls_key, config.access.tokens]
    for path in [*sources, *filter(None, files)]:
        assert any(path == where or path.startswith(f"{where}/") for where in mounted), path
    assert config.access.insecure != config.access.is_encrypted
    grace = pod["terminationGracePeriodSeconds"]
    assert grace > config.drain_seconds + container["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_probes_ask_the_health_port_and_wait(objects):
    _, container, environment = server(objects)
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]
        assert probe["grpc"] == {"port": int(environment["VQSERVE_HEALTH_PORT"])}
        # Kubernetes' default of a second is too short for a busy server.
        assert probe["timeoutSeconds"] >= 5
        assert probe["failureThreshold"] > 1
    patience = {
        name: container[name]["periodSeconds"] * container[name]["failureThreshold"]
        for name in container
        if "Probe" in name
    }
    assert patience["readinessProbe"] < patience["livenessProbe"] < patience["startupProbe"]


def test_pods_are_restricted(objects):
    """The Pod Security Standard `restricted`, and a root that cannot be written."""
    pod, _, _ = server(objects)
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    used = {mount["name"] for one in [*pod["initContainers"], *pod["containers"]] for mount in one["volumeMounts"]}
    assert used == volumes


def test_a_rollout_and_a_drained_node_need_no_spare_gpu(objects):
    [deployment] = of(objects, "Deployment")
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    [budget] = of(objects, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert deployment["spec"].get("replicas", 2) > 1


def test_all_select_the_same_pods(objects):
    [deployment] = of(objects, "Deployment")
    assert deployment["spec"]["selector"]["matchLabels"] == LABELS
    assert deployment["spec"]["template"]["metadata"]["labels"] == LABELS
    for one in of(objects, "Service"):
        assert one["spec"]["selector"] == LABELS
        assert one["metadata"]["labels"] == LABELS
    for one in of(objects, "NetworkPolicy"):
        assert one["spec"]["podSelector"]["matchLabels"] == LABELS
    for one in [*of(objects, "PodDisruptionBudget"), *of(objects, "ServiceMonitor")]:
        assert one["spec"]["selector"]["matchLabels"] == LABELS
    for spread in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"] == LABELS


def test_every_port_that_is_served_is_named_in_a_network_policy(objects):
    _, container, _ = server(objects)
    policies = of(objects, "NetworkPolicy")
    allowed = {port["port"] for one in policies for rule in one["spec"]["ingress"] for port in rule["ports"]}
    # The node's probes are always let through.
    assert allowed == {one["name"] for one in container["ports"]} - {"health"}
    assert all(rule["from"] for one in policies for rule in one["spec"]["ingress"])


def test_the_gpu_is_asked_for_where_the_server_needs_it():
    for overlay, is_gpu in (("cpu", False), ("gpu", True), ("full", True)):
        pod, container, environment = server(kustomize.build(KUBERNETES / "overlays" / overlay))
        assert environment["VQSERVE_DEVICE"] == ("cuda" if is_gpu else "cpu")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) is is_gpu
        assert ("tolerations" in pod) is is_gpu


def test_the_autoscaler_alone_decides_how_many():
    objects = kustomize.build(KUBERNETES / "overlays" / "full")
    [deployment], [scaled] = of(objects, "Deployment"), of(objects, "ScaledObject")
    assert "replicas" not in deployment["spec"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [trigger] = scaled["spec"]["triggers"]
    docs = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"vqserve_\w+", trigger["metadata"]["query"]))
    assert names
    assert all(f"`{name}`" in docs for name in names)


def test_the_example_serves_the_demo_codebook():
    demo = Path(vqserve_server.__file__).parent / "assets" / "demo.safetensors"
    digest = hashlib.sha256(demo.read_bytes()).hexdigest()
    assert (KUBERNETES / "base" / "codebooks.sha256").read_text() == f"{digest}  demo.safetensors\n"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / "demo.safetensors").write_bytes(b"other"), "computed checksum did NOT match"),
        (lambda folder: (folder / "demo.safetensors").unlink(), "No such file"),
        (lambda folder: (folder / "more.safetensors").write_bytes(b"more"), "does not list"),
        (lambda folder: (folder / "more").mkdir() or (folder / "more" / "1.safetensors").touch(), "does not list"),
    ],
)
def test_codebooks_that_are_not_those_of_the_list_are_not_served(tmp_path, change, error):
    pod, _, _ = server(kustomize.build(KUBERNETES / "overlays" / "cpu"))
    verify = next(one for one in pod["initContainers"] if one["name"] == "verify")
    codebooks = tmp_path / "codebooks"
    codebooks.mkdir()
    shutil.copy2(Path(vqserve_server.__file__).parent / "assets" / "demo.safetensors", codebooks)
    change(codebooks)
    [script] = verify["args"]
    for path, place in (("/codebooks", codebooks), ("/expected", KUBERNETES / "base")):
        script = script.replace(f" {path}", f" {place}")
    done = subprocess.run([*verify["command"], script], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not error), done.stderr
    assert error in done.stderr
