"""What is deployed beside the server knows it: its routes, settings and metrics."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.arguments import parser
from server.arguments import settings as settings_of
from server.settings import Settings, load_settings
from server.web.status import State

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "operating.md").read_text("utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text("utf-8"))
MANIFEST = {
    each["kind"]: each
    for each in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8"))
}
KSERVE = {
    each["kind"]: each
    for each in yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text("utf-8"))
}
DEPLOYMENT = MANIFEST["Deployment"]["spec"]
POD = DEPLOYMENT["template"]
(CONTAINER,) = POD["spec"]["containers"]
RUNTIME = KSERVE["ServingRuntime"]["spec"]
(KSERVE_CONTAINER,) = RUNTIME["containers"]
#: Of each manifest: what becomes a pod, the container and the seconds that it has to end.
PODS = {
    "kubernetes": (POD["spec"], CONTAINER, POD["spec"]["terminationGracePeriodSeconds"]),
    "kserve": (RUNTIME, KSERVE_CONTAINER, 30),  # what pods have unless told otherwise
}
EXPRESSIONS = [
    (panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]
]
METRIC = r"\b(?:tocom|process)_\w+"


@pytest.fixture(scope="module")
def app(settings):
    return create_app(settings)


@pytest.fixture(scope="module")
def series(app):
    """The labels of every series of a server to which everything has happened."""
    serving = app.state.serving
    metrics, model = serving.metrics, serving.models.get(None)
    metrics.answered(model.name, model.ladder.name, 0, 200, 0.1)
    metrics.ran(model.at(0, True), "quality", (1, *model.input_size), 0.1, [0])
    metrics.rejected("queue_full")
    metrics.passed([model.at(0, True)], "sure")
    text = generate_latest(metrics.registry) + generate_latest(State(serving))
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def paths(app):
    return set(app.openapi()["paths"])


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_the_dashboard_shows_what_there_is(series, title, expression):
    used = re.findall(METRIC, expression)
    assert used
    labels = set.intersection(*(series[name] for name in used)) | {"instance"}
    assert set(re.findall(r"(\w+)=", expression)) <= labels
    for group in re.findall(r"by \((.+?)\)", expression):
        assert set(group.split(", ")) <= labels


def test_the_dashboard_can_be_imported_anywhere():
    (source,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    for panel in DASHBOARD["panels"]:
        for part in (panel, *panel["targets"]):
            assert part["datasource"]["uid"] == f"${{{source['name']}}}"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_no_panel_covers_another():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_guide_lists_every_metric_with_its_labels(series):
    listed = {
        name: set(labels.split(",")) if labels else set()
        for name, labels in re.findall(r"^\| `(tocom_\w+)(?:\{(.+?)\})?` \|", GUIDE, re.MULTILINE)
    }
    there = {
        re.sub(r"_(bucket|sum|count)$", "", name): labels - {"le"}
        for name, labels in series.items()
        if name.startswith("tocom_")
    }
    assert listed == there


def test_the_guide_uses_metrics_that_there_are(series):
    used = set(re.findall(r"\btocom_\w+", GUIDE))
    histograms = {name.removesuffix("_bucket") for name in series if name.endswith("_bucket")}
    assert used - {"tocom_auto_rate_mean"} <= set(series) | histograms


def test_the_autoscaler_scales_the_deployment_on_metrics_that_it_gets(series):
    scaler = MANIFEST["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == MANIFEST["Deployment"]["metadata"]["name"]
    (rules,) = (
        yaml.safe_load(block)["rules"]
        for block in re.findall(r"^```yaml\n(rules:.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    )
    for rule in rules:
        assert set(re.findall(METRIC, rule["seriesQuery"] + rule["metricsQuery"])) <= set(series)
    given = {
        rule.get("name", {}).get("as") or rule["seriesQuery"].partition("{")[0] for rule in rules
    }
    assert {metric["pods"]["metric"]["name"] for metric in scaler["metrics"]} == given


def test_the_service_finds_the_pods():
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["selector"]["matchLabels"].items() <= labels.items()
    assert MANIFEST["Service"]["spec"]["selector"].items() <= labels.items()
    (port,) = CONTAINER["ports"]
    assert MANIFEST["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_no_service_sets_a_setting():
    assert POD["spec"]["enableServiceLinks"] is False


def test_probes_ask_routes_that_there_are(paths):
    (port,) = CONTAINER["ports"]
    probes = [CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [probe["path"] for probe in probes] == ["/readyz", "/readyz", "/healthz"]
    assert {probe["path"] for probe in probes} <= paths
    assert {probe["port"] for probe in probes} == {port["name"]}
    notes = POD["metadata"]["annotations"]
    assert notes["prometheus.io/path"] in paths
    assert notes["prometheus.io/port"] == str(port["containerPort"])


@pytest.fixture(params=PODS)
def deployed(request):
    """What `PODS` has of a manifest."""
    return PODS[request.param]


@pytest.fixture
def configured(deployed, monkeypatch):
    """The settings of a server in the container."""
    for variable in deployed[1]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    return load_settings()


def test_the_environment_consists_of_settings(deployed, configured):
    _, container, _ = deployed
    names = {variable["name"].removeprefix("TOCOM_").lower() for variable in container["env"]}
    assert names <= set(Settings.model_fields)
    assert configured.port == container["ports"][0]["containerPort"]
    assert configured.threads == int(container["resources"]["requests"]["cpu"])


def test_the_last_request_is_answered_before_the_pod_is_killed(deployed, configured):
    _, _, grace = deployed
    assert grace >= (configured.drain_delay_ms + configured.timeout_ms) / 1000 + 10


def test_requests_are_taken_until_the_service_knows_better(deployed, configured):
    _, container, _ = deployed
    probe = container["readinessProbe"]
    assert configured.drain_delay_ms / 1000 > probe["periodSeconds"] * probe["failureThreshold"]


def test_the_container_may_do_no_more_than_it_has_to(deployed):
    pod, container, _ = deployed
    allowed = pod.get("securityContext", {}) | container["securityContext"]
    assert allowed["runAsNonRoot"]
    assert f"USER {allowed['runAsUser']}" in DOCKERFILE
    assert not allowed["allowPrivilegeEscalation"]
    assert allowed["capabilities"] == {"drop": ["ALL"]}
    assert allowed["seccompProfile"] == {"type": "RuntimeDefault"}
    # Nothing is written but to /tmp.
    assert allowed["readOnlyRootFilesystem"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/tmp"}
    assert "emptyDir" in volume


def test_the_runtime_of_kserve_serves_the_model_by_its_service_s_name(paths, monkeypatch):
    runtime, service = KSERVE["ServingRuntime"], KSERVE["InferenceService"]
    container = KSERVE_CONTAINER
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    name = service["metadata"]["name"]
    given = [each.replace("{{.Name}}", name) for each in container["args"]]
    settings = settings_of(parser().parse_args(given))
    (model,) = settings.models
    assert (model.name, model.backbone) == (name, "/mnt/models/model")
    assert model.bank == "/mnt/models/bank"
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        assert probe["httpGet"]["path"] in paths
        assert probe["httpGet"]["port"] == settings.port
    notes = runtime["spec"]["annotations"]
    assert notes["prometheus.kserve.io/path"] in paths
    assert notes["prometheus.kserve.io/port"] == str(settings.port)
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [each["name"] for each in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats


@pytest.mark.parametrize(
    ("torch", "extras", "options"),
    [
        ("cpu", "", "--torch-backend cpu --requirements pyproject.toml"),
        ("", "otel", "--requirements pyproject.toml --extra otel"),
        (
            "cu128", "otel,ray",
            "--torch-backend cu128 --requirements pyproject.toml --extra otel --extra ray",
        ),
    ],
)  # fmt: skip
def test_the_image_gets_the_torch_and_the_extras_that_are_asked_for(torch, extras, options):
    (command,) = re.findall(r"^RUN (uv .*--requirements (?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", f'uv() {{ printf "%s\\n" "$@"; }}\n{command}'],
        env=os.environ | {"TORCH": torch, "EXTRAS": extras},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["pip", "install", *options.split()]
