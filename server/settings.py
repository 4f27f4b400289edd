"""What a server is told before it starts: by arguments, environment and a TOML file.

The first that says something wins: arguments, then `TOCOM_` variables, then the file, then
the defaults, which serve the bundled model.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from server.access_settings import ApiKey, FetchHost, Key, Origin
from tocom import ConfigError
from tocom.wording import did_you_mean, value_fault


class ModelSettings(BaseModel):
    """One model to serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # No slash: clients put names into addresses unquoted.
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="how requests call it"
    )
    backbone: str = Field(
        description="bundled:NAME, a model folder, a .safetensors file or a name that timm loads"
    )
    architecture: str | None = Field(
        default=None, description="timm's name of the model, for a .safetensors file"
    )
    task: str | None = Field(
        default=None,
        description="a task folder that was tuned on the backbone, or bundled:NAME; models on one "
        "backbone share its weights",
    )
    bank: str | None = Field(
        default=None,
        description="bundled:NAME, a bank folder, hf://ORG/NAME or a reference into the store; "
        "without one, nothing makes up for what merging costs",
    )
    source: int | None = Field(
        default=None,
        ge=0,
        description="rate that the model was tuned at; default: what its folder says, else 0",
    )
    ladders: tuple[str, ...] = Field(
        default=(),
        description="what rates may mean, the default first: ladder.json files or their folders, "
        "`tome` (r tokens merge in every block at rate r), `around-mlp` (its paper's 16 rungs) or "
        "`bank`, the bank's own; default: the bank's; without a bank the one that the model was "
        "tuned on, mostly `tome`",
    )
    cascade: str | None = Field(
        default=None,
        description="a cascade.json, its folder or bundled:NAME, for rate=cascade; default: that "
        "in the folder of the task or else of the backbone, if there is one",
    )


BUNDLED_MODEL = ModelSettings(
    name="imagenet",
    backbone="bundled:deit_tiny",
    bank="bundled:deit_tiny_bank",
)


#: Settings of which no message may show a part.
SECRET = ("admin_key", "api_keys")


class Settings(BaseSettings):
    """All settings of a server."""

    model_config = SettingsConfigDict(
        env_prefix="TOCOM_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # some of it is secret
    )

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    models: tuple[ModelSettings, ...] = Field(
        default=(BUNDLED_MODEL,),
        min_length=1,
        description="models to serve; requests that name none get the first",
    )
    device: str = Field(
        default="auto", description="where models run: cpu, cuda, cuda:1, ...; auto: a GPU if any"
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="threads of a forward; default: as many as the process may use processors, by "
        "its affinity and its container's CPU limit",
    )
    decode_threads: int = Field(
        default=2, ge=1, description="threads that decode images beside the forward"
    )
    max_body_bytes: int = Field(
        default=20 * 2**20, ge=1, description="bytes that a request body may have"
    )
    # The upper bound is where Pillow itself refuses.
    max_pixels: int = Field(
        default=64_000_000, ge=1, le=178_956_970, description="pixels that an image may have"
    )
    reduce_jpegs: bool = Field(
        default=True,
        description="decode large JPEGs at 1/2, 1/4 or 1/8 of their size, still twice as large as "
        "the model wants them",
    )
    fast_resize: bool = Field(
        default=False,
        description="resize pictures by torch, four times as fast as by Pillow: under 1 % "
        "of the values differ, usually by 1 of 255",
    )
    warmup: Literal["all", "first", "none"] = Field(
        default="all",
        description="what is prepared before the server is ready; all: the weights of every rate "
        "of every model, of which some are run; first: rate 0 of each; none: nothing. What has not "
        "run yet is slow the first time",
    )
    max_batch: int = Field(default=16, ge=1, description="images in one forward")
    max_graphs: int = Field(
        default=16,
        ge=0,
        description="how many compiled forwards OpenVINO keeps, if it is installed, of those that "
        "run often and are faster compiled; 60 to 150 MB each; 0: none",
    )
    graph_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        default="float32",
        description="what compiled forwards compute in; bfloat16 is about twice as fast on "
        "CPUs that have it, and answers differ by as much as bfloat16 rounds; int8, of linear "
        "layers alone, likewise on CPUs with VNNI or AMX",
    )
    int8_pictures: Path | None = Field(
        default=None,
        description="folder or tar file of pictures such as will be sent, without labels, that "
        "int8 is fitted to: 64 of them are taken; default: the bundled samples",
    )
    max_folded_bytes: int = Field(
        default=768 * 2**20,
        ge=0,
        description="bytes of weights into which deltas are folded ahead, for each bank on each "
        "backbone; a delta that has no room there is added while a forward runs",
    )
    max_inflight_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="bytes of all uploads that are being read or worked on; beyond: 503. A "
        "/v1/classify/batch counts as two of the largest bodies; several have half of it at most",
    )
    max_queue: int = Field(
        default=256, ge=1, description="images taken and not yet answered; beyond: 503"
    )
    max_images: int = Field(
        default=64, ge=1, description="images in a request that is answered as a whole"
    )
    batch_window: int | None = Field(
        default=None,
        ge=1,
        description="images of a /v1/classify/batch that are worked on at once; default: twice "
        "max_batch",
    )
    max_wait_ms: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="milliseconds that an idle server lets an image wait for others to fill a "
        "batch; 0: not at all",
    )
    timeout_ms: int = Field(
        default=30_000,
        ge=1,
        description="milliseconds from a request's arrival to its answer; beyond: 504",
    )
    slo_ms: int = Field(
        default=500,
        ge=1,
        description="milliseconds within which requests without a deadline should be answered; "
        "rate=auto plans for this",
    )
    auto: bool = Field(default=True, description="whether requests may ask for rate=auto")
    auto_min_rate: int = Field(default=0, ge=0, description="lowest rate that auto may choose")
    auto_max_rate: int | None = Field(
        default=None, ge=0, description="highest rate that auto may choose; default: the model's"
    )
    auto_policy: Literal["arrivals", "slackfit"] = Field(
        default="arrivals",
        description="how auto chooses: `arrivals`, by what waits and what arrives; `slackfit`, by "
        "the time that the most urgent image has left, as SuperServe does: to be compared with",
    )
    drain_delay_ms: int = Field(
        default=0,
        ge=0,
        description="milliseconds that a server still takes requests after SIGTERM, while /readyz "
        "fails already, so that load balancers notice",
    )
    stall_ms: int = Field(
        default=60_000,
        ge=1000,
        description="milliseconds; a batch that runs longer makes /healthz fail",
    )
    top_k: int = Field(default=5, ge=1, description="predictions in an answer if it asks for none")
    max_top_k: int = Field(default=1000, ge=1, description="predictions that may be asked for")
    store: Path | None = Field(
        default=None,
        description="folder of published banks; default: ~/.local/share/tocom/store",
    )
    max_bank_bytes: int = Field(
        default=256 * 2**20, ge=1, description="bytes that an uploaded bank may have"
    )
    admin_key: Key | None = Field(
        default=None,
        description="secret for changing banks over HTTP; without it they cannot be changed",
    )
    api_keys: tuple[ApiKey, ...] = Field(
        default=(),
        description="keys for inference: each request needs one of them; none: open to all",
    )
    priority_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the time that the images of each lower priority keep while those of "
        "higher ones wait",
    )
    cache_bytes: int = Field(
        default=0,
        ge=0,
        description="bytes of answers to keep: the same request for the same picture is then "
        "answered without running; 0: none",
    )
    cache_shared: bool = Field(
        default=False,
        description="whether keys share kept answers; a fast answer then tells a client that "
        "somebody else has sent the same picture",
    )
    fetch_hosts: tuple[FetchHost, ...] = Field(
        default=(),
        description="hosts from which images may be fetched if a request gives an address, such as "
        "`images.example.org` or `*.example.org`; none: nothing is fetched",
    )
    fetch_timeout_ms: int = Field(
        default=5000, ge=1, description="milliseconds that fetching an image may take"
    )
    cors_origins: tuple[Origin, ...] = Field(
        default=(),
        description="web origins whose pages may call this server from a browser, such as "
        "`https://app.example.org`; `*`: any",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        default="info", description="least severe message that is logged; info logs each request"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="text, for people, or json, one object a line, for programs"
    )
    otel: bool | None = Field(
        default=None,
        description="send traces by OTLP, as the OTEL_ variables say; default: if "
        "OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set",
    )

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}")
        return models

    @model_validator(mode="after")
    def _room_for_the_largest(self) -> "Settings":
        largest = max(2 * self.max_body_bytes, self.max_bank_bytes)
        if self.max_inflight_bytes < largest:
            raise ValueError(
                f"max_inflight_bytes must be at least {largest}: twice max_body_bytes, and "
                f"max_bank_bytes; got {self.max_inflight_bytes}"
            )
        return self

    @field_validator("api_keys")
    @classmethod
    def _keys_differ(cls, keys: tuple[ApiKey, ...], info: ValidationInfo) -> tuple[ApiKey, ...]:
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two keys have the same name")
        secrets = [key.key for key in keys]
        if admin := info.data.get("admin_key"):
            secrets.append(admin)
        if len(set(secrets)) < len(secrets):
            raise ValueError("two keys are the same; the admin key must also be one of its own")
        return keys

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Say which sources there are, the strongest first."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(config: str | Path | None = None, **arguments: Any) -> Settings:
    """Read the settings.

    Args:
        config: a TOML file; default: the one that TOCOM_CONFIG names, if it does.
        arguments: settings that win over all other sources.

    Raises:
        ConfigError: naming the setting and what is wrong with it.
    """
    _check_variables()
    if path := config or os.environ.get("TOCOM_CONFIG"):
        _check_file(Path(path))

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    try:
        return FromFile(**arguments)
    except ValidationError as error:
        raise ConfigError(_fault(error.errors()[0])) from error
    except SettingsError as error:
        raise ConfigError(_variable_fault(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path or 'the environment'} cannot be read: {error}") from error


def _check_variables() -> None:
    """Raise ConfigError if a variable is nearly a setting; what is like none is not for us."""
    known, host = ["config", *Settings.model_fields], "_SERVICE_HOST"
    # For a Service called tocom-api Kubernetes sets TOCOM_API_SERVICE_HOST, TOCOM_API_PORT, ...
    services = tuple(each.removesuffix(host) for each in os.environ if each.endswith(host))
    for variable in os.environ:
        if variable.startswith("TOCOM_") and not variable.startswith(services):
            name = variable.removeprefix("TOCOM_").lower().partition("__")[0]
            if name not in known and (meant := did_you_mean(name, known)):
                raise ConfigError(f"the variable {variable} is no setting{meant}")


def _check_file(path: Path) -> None:
    """Raise ConfigError unless a file is there and can be read."""
    try:
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {path}")
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _variable_fault(error: SettingsError) -> str:
    """Say which variable is not the JSON that a list must be; pydantic names its setting."""
    for name in Settings.model_fields:
        if f'"{name}"' in str(error):
            variable = f"TOCOM_{name.upper()}"
            text = os.environ.get(variable)
            got = "" if text is None or name in SECRET else f", got {text!r}"
            return f'the variable {variable} must be a list as JSON, such as ["a", "b"]{got}'
    return f"the environment cannot be read: {error}"


def _fault(fault: Any) -> str:
    """Say what is wrong with a setting."""
    where = ".".join(str(part) for part in fault["loc"])
    what = f"setting {where}" if where else "the settings"
    if fault["type"] == "extra_forbidden":
        kinds: dict[str, type[BaseModel]] = {"models": ModelSettings, "api_keys": ApiKey}
        kind = kinds.get(fault["loc"][0], Settings)
        meant = did_you_mean(str(fault["loc"][-1]), kind.model_fields)
        return f"there is no {what}{meant or '; tocom-serve --help lists all'}"
    # A fault of no single setting has all of them as its input.
    secret = not where or fault["loc"][0] in SECRET
    got = "" if secret or fault["type"] == "missing" else f", got {fault['input']!r}"
    if fault["type"] == "value_error":
        return f"{what}: {fault['ctx']['error']}{got}"
    return f"{what} {value_fault(fault)}{got}"
