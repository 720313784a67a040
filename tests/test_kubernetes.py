"""The manifests of examples/10_fleet, checked offline: by Kubernetes' own schemas, and what no schema says of them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

FOLDER = Path(__file__).parent.parent / "examples" / "10_fleet" / "kubernetes"
OLDEST, NEWEST = "1.28", "1.34"
MANIFESTS = {f"{file.name}:{one['kind']}": one for file in sorted(FOLDER.glob("*.yaml")) for one in yaml.safe_load_all(file.read_text())}


def templates(found: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "template":
                yield value
            yield from templates(value)
    elif isinstance(found, list):
        for value in found:
            yield from templates(value)


def check(manifest: dict[str, Any], version: str) -> None:
    if manifest["kind"] != "RayJob":
        kubernetes.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, json.loads((FOLDER / "rayjob.schema.json").read_text()))
    for template in templates(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_kubernetes_takes(name: str, version: str) -> None:
    check(MANIFESTS[name], version)


@pytest.mark.parametrize("name", [name for name, manifest in MANIFESTS.items() if list(templates(manifest))])
def test_a_misspelt_key_is_found(name: str) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    for template in templates(manifest):
        template["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes.ValidationError, match="volumeMount"):
        check(manifest, NEWEST)


def test_what_no_schema_says() -> None:
    assert {manifest["kind"] for manifest in MANIFESTS.values()} == {"PersistentVolumeClaim", "Deployment", "Service", "RayJob"}
    (claim,) = (manifest for manifest in MANIFESTS.values() if manifest["kind"] == "PersistentVolumeClaim")
    for manifest in MANIFESTS.values():
        for template in templates(manifest):
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert template["spec"]["securityContext"]["runAsNonRoot"]
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
                assert not container["securityContext"]["allowPrivilegeEscalation"]
                assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    deployment, service, job = (MANIFESTS[name] for name in ("triton.yaml:Deployment", "triton.yaml:Service", "fleet.yaml:RayJob"))
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    named = {port["name"]: port["containerPort"] for container in pod["spec"]["containers"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(named)
    server = pod["spec"]["containers"][0]
    probes = [server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    front = (FOLDER.parents[1] / "04_triton" / "nginx.conf").read_text()  # the probes go through it, to the server behind
    let_through = dict(re.findall(r"location ~ (\S+) \{([^}]*)\}", front))
    for probe in probes:
        assert probe["port"] == named["http"]
        (settings,) = [settings for path, settings in let_through.items() if re.fullmatch(path, probe["path"])]
        assert "limit_conn" not in settings  # however many wait for answers, the server is not dead
    assert f"listen 127.0.0.1:{named['http']}" in front
    assert "server 127.0.0.1:8000" in front
    assert all(word in server["args"][0] for word in ("ulimit -s 262144", "--disable-auto-complete-config", "--http-address=127.0.0.1"))
    grace = int(re.findall(r"--exit-timeout-secs=(\d+)", server["args"][0])[0])
    assert 60 < grace < pod["spec"]["terminationGracePeriodSeconds"]
    assert job["spec"]["entrypoint"].startswith("flora-export fleet /models/plan.yaml --address auto")
