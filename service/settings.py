"""Every option of the service, once: a flag `--max-body-bytes` is the variable `DSFORMER_MAX_BODY_BYTES`.

Flags win over environment variables, which win over the defaults here. `DSFORMER_ISA` is read by `kernels` and is no
option of the service.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

PREFIX = "DSFORMER_"
EXIT_USAGE = 2
# Variables with our prefix that other parts of the project read.
FOREIGN = frozenset({"DSFORMER_ISA"})
KUBERNETES = re.compile(r"DSFORMER_(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")
CGROUP = Path("/sys/fs/cgroup")

Truncation = Literal["error", "right", "left"]
# The last four: what other methods of the compressor made, in ONNX Runtime's own operators like the dense model.
Variant = Literal["dense", "dsformer", "svd", "fwsvd", "drone", "nm"]
Options = TypeVar("Options", bound=BaseSettings)


def cgroup_cpus(root: Path = CGROUP) -> float | None:
    """CPUs that the cgroup's quota allows (v2, then v1); None without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)


def available_cpus(root: Path = CGROUP) -> int:
    """CPUs this process may really use. ONNX Runtime honours affinity but not a quota, hence this function."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus(root)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


class Settings(BaseSettings):
    """Serve DSFormer model folders over HTTP.

    `dsformer-serve doctor` tells what a start would find here; `--print-config` shows the options in force. Both take
    all options and end.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        cli_prog_name="dsformer-serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
    )

    models: Path = Field(
        default=Path("deploy/models"),
        description="Folder of model folders, or one model folder. Relative paths start at the working directory.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    threads: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="CPU threads of one inference. Default: the smaller of CPU affinity and cgroup quota.",
    )
    default_variant: Variant = Field(default="dsformer", description="Variant that answers when a request names none.")
    truncation: Truncation = Field(
        default="error",
        description="What happens to a text longer than the model takes, unless the request says so itself.",
    )
    max_body_bytes: int = Field(default=2 * 1024 * 1024, ge=1, description="Largest request body; above it 413.")
    max_text_chars: int = Field(
        default=2**20, ge=1, description="Most characters of one text, question or context; above it 422."
    )
    max_batch_items: int = Field(default=64, ge=1, description="Most inputs in one request; above it 422.")
    max_windows: int = Field(
        default=256, ge=1, description="Most windows that the contexts of one request may need; above it 422."
    )
    # Larger runs are no faster on a CPU (MiniLM on 2 cores: 1600 tokens/s at 512 tokens a run, 1450 at 2048), and other
    # requests wait behind one run, not behind a whole batch.
    max_batch_tokens: int = Field(
        default=1024, ge=1, description="Most tokens, padding included, in one run of a model; bounds memory."
    )
    max_queue_tokens: int = Field(
        default=65536, ge=1, description="Most tokens of all admitted requests together; above it 429 with Retry-After."
    )
    max_queue_seconds: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Longest wait for inference; then 504. The header X-Request-Timeout shortens it for one request.",
    )
    grace_seconds: float = Field(
        default=1.0,
        ge=0,
        le=600,
        description="After SIGTERM /readyz says 503, and for so long new requests are still served.",
    )
    drain_seconds: float = Field(
        default=20.0,
        ge=0,
        le=3600,
        description="Time for requests in progress after that; those left over get 503, and the process ends with 0.",
    )
    stall_seconds: float = Field(
        default=1.5,
        gt=0,
        description="An inference that takes longer, and 4 times as long as any of the warm-up, makes /readyz say 503.",
    )
    hang_seconds: float = Field(
        default=30.0, gt=0, description="An inference that takes longer than this ends the process with status 4."
    )
    reload_seconds: float = Field(
        default=2.0,
        ge=0,
        description="How often to look whether a model folder has changed; new models are loaded beside the old ones, "
        "tested, and take over. 0: only on SIGHUP.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="Key that requests must send as Authorization: Bearer KEY; probes and /metrics stay open. Better "
        "given by the variable or the file: flags can be read by other users of the computer.",
    )
    api_key_file: Path | None = Field(default=None, description="File with more such keys, one in a line.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line that is written."
    )

    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people, key=value, or one JSON object each for machines."
    )
    traces: bool = Field(
        default=False,
        description="Send OpenTelemetry traces, without any text of a user, to where the variables OTEL_* say. Needs "
        "the extra otel.",
    )

    @model_validator(mode="after")
    def _patience_ends_after_it_begins(self) -> Settings:
        if self.hang_seconds <= self.stall_seconds:
            raise ValueError(
                f"hang_seconds {self.hang_seconds:g} must be more than stall_seconds {self.stall_seconds:g}"
            )
        return self


def read_options(kind: type[Options], argv: list[str] | None) -> Options:
    """Options from the arguments (null: the process's own); a mistake is a sentence for each and exit status 2."""
    try:
        return CliApp.run(kind, cli_args=sys.argv[1:] if argv is None else argv)
    except ValidationError as error:
        print(sentences(error, kind.model_config.get("env_prefix") or ""), file=sys.stderr)
    except SettingsError as error:
        print(error, file=sys.stderr)
    sys.exit(EXIT_USAGE)


def sentences(error: ValidationError, prefix: str = PREFIX) -> str:
    """The validation error of the options, one line each, named as flag and, where they have one, as variable."""
    lines = []
    for problem in error.errors():
        if not problem["loc"]:  # of several options together
            lines.append(f"{problem['msg'].removeprefix('Value error, ')}.")
            continue
        name = str(problem["loc"][0])
        flag = name.replace("_", "-").lower()
        variable = f" ({prefix}{name.upper()})" if prefix else ""
        shown = "" if name.lower() == "api_key" else f", got {problem['input']!r}"
        lines.append(f"--{flag}{variable}: {problem['msg']}{shown}.")
    return "\n".join(lines)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that nobody reads: probably a typing mistake.

    Not those that Kubernetes sets in every pod beside a Service of our name: DSFORMER_SERVICE_HOST and the like.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | FOREIGN
    ours = (name for name in environ if name.startswith(PREFIX) and not KUBERNETES.fullmatch(name))
    return sorted(name for name in ours if name not in known)
