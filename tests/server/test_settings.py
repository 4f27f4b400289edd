import json
import os
from pathlib import Path
from typing import NoReturn

import pytest

from server.arguments import parser
from server.arguments import settings as settings_of
from server.settings import BUNDLED_MODEL, ModelSettings, Settings, load_settings
from tocom import ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TOCOM_")]:
        monkeypatch.delenv(name)


def test_by_default_the_bundled_model_is_served_to_this_machine_only():
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.models == (BUNDLED_MODEL,)
    assert settings.max_wait_ms == 0


@pytest.mark.parametrize("kind", [Settings, ModelSettings])
def test_every_setting_is_described(kind):
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text("port = 1\nmax_batch = 1\nmax_queue = 1\n")
    monkeypatch.setenv("TOCOM_PORT", "2")
    monkeypatch.setenv("TOCOM_MAX_BATCH", "2")
    settings = load_settings(file, port=3)
    assert (settings.port, settings.max_batch, settings.max_queue) == (3, 2, 1)
    assert settings.top_k == 5


def test_the_environment_can_name_the_file(tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text(
        'device = "cpu"\n'
        '[[models]]\nname = "a"\nbackbone = "x"\nbank = "y"\nsource = 4\n'
        '[[models]]\nname = "b"\nbackbone = "z.safetensors"\narchitecture = "vit"\n'
    )
    monkeypatch.setenv("TOCOM_CONFIG", str(file))
    assert load_settings().models == (
        ModelSettings(name="a", backbone="x", bank="y", source=4),
        ModelSettings(name="b", backbone="z.safetensors", architecture="vit"),
    )


def test_models_in_the_environment(monkeypatch):
    monkeypatch.setenv("TOCOM_MODELS", json.dumps([{"name": "a", "backbone": "x"}]))
    assert load_settings().models == (ModelSettings(name="a", backbone="x"),)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no configuration file .*nix\.toml"):
        load_settings(tmp_path / "nix.toml")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "serve.toml"
    file.touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"serve\.toml cannot be read: Permission denied"):
        load_settings(file)


def test_a_file_that_is_not_toml(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("port: 8000")
    with pytest.raises(ConfigError, match=r"serve\.toml cannot be read: .*line 1"):
        load_settings(file)


def test_an_argument_that_is_a_list_may_be_repeated(monkeypatch):
    origins = ["https://a.example", "http://localhost:5173"]
    given = [f"--cors-origins={origin}" for origin in origins]
    assert list(settings_of(parser().parse_args(given)).cors_origins) == origins
    monkeypatch.setenv("TOCOM_CORS_ORIGINS", '["*"]')
    assert load_settings().cors_origins == ("*",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": 65_536}, "setting port must be at most 65535, got 65536"),
        ({"prot": 8000}, "there is no setting prot, did you mean port?"),
        ({"nix": 8000}, "there is no setting nix; tocom-serve --help lists all"),
        ({"models": []}, "setting models must have at least 1 of them"),
        ({"max_pixels": 10**9}, "setting max_pixels must be at most 178956970"),
        (
            {"models": [{"name": "a/b", "backbone": "x"}]},
            r"setting models\.0\.name must match the pattern .*got 'a/b'",
        ),
        (
            {"models": [{"name": "a", "backbone": "x", "bnak": "y"}]},
            r"there is no setting models\.0\.bnak, did you mean bank\?",
        ),
        (
            {"models": [{"name": "a", "backbone": "x", "source": -1}]},
            r"setting models\.0\.source must be at least 0, got -1",
        ),
        ({"models": [{"name": "a", "backbone": "x"}] * 2}, "two models are called 'a'"),
        (
            {"cors_origins": ["https://app.example.org/"]},
            "setting cors_origins.0: an origin is scheme://host or scheme://host:port, without a "
            r"path, or \*, got 'https://app.example.org/'",
        ),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(**arguments)


def test_a_list_in_the_environment_that_is_not_json(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCOM_CORS_ORIGINS", "https://a.example")
    (tmp_path / "serve.toml").write_text("port = 1")
    message = (
        r"^the variable TOCOM_CORS_ORIGINS must be a list as JSON, such as .*, "
        "got 'https://a.example'$"
    )
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path / "serve.toml")
    monkeypatch.delenv("TOCOM_CORS_ORIGINS")
    monkeypatch.setenv("TOCOM_API_KEYS", "secret")
    with pytest.raises(ConfigError, match="TOCOM_API_KEYS must be a list") as fault:
        load_settings()
    assert "secret" not in str(fault.value)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("TOCOM_MAX_QEUE", "max_queue"),
        ("TOCOM_CONFG", "config"),
        ("TOCOM_MODEL__0__NAME", "models"),
        ("TOCOM_API_PORT", "port"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_refused(monkeypatch, variable, meant):
    monkeypatch.setenv(variable, "7")
    message = rf"^the variable {variable} is no setting, did you mean {meant}\?$"
    with pytest.raises(ConfigError, match=message):
        load_settings()


@pytest.mark.parametrize("service", ["TOCOM_SERVE", "TOCOM_API", "TOCOM_MODEL"])
def test_what_kubernetes_tells_of_services_is_ignored(monkeypatch, service):
    for variable, value in {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(f"{service}_{variable}", value)
    monkeypatch.setenv("TOCOM_UNLIKE_ALL", "1")
    assert load_settings().model_dump() == Settings().model_dump()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_settings(tmp_path)


def test_the_largest_bodies_must_find_room():
    with pytest.raises(ConfigError, match="^the settings: .*max_inflight_bytes must be at least"):
        load_settings(max_body_bytes=400_000_000)
    assert load_settings(max_body_bytes=400_000_000, max_inflight_bytes=800_000_000)
