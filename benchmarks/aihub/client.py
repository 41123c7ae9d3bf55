"""AI Hub as profile.py needs it: errors of one line, uploads and jobs that a later run finds, profiles as figures.

Needs the package `qai-hub`, which is imported on first use.
"""

from __future__ import annotations

import configparser
import contextlib
import difflib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meki.bench.output import to_json
from meki.bench.stats import percentiles
from meki.package.files import write_file

if TYPE_CHECKING:
    import qai_hub

HOW_TO_GET_A_TOKEN = (
    "sign up at https://aihub.qualcomm.com, copy the token from Account > Settings > API Token, "
    "then run: qai-hub configure --api_token TOKEN"
)

# AI Hub Workbench documentation, "API documentation": compile options, profile options, common options. What is float32
# in our graphs (rows, hidden states, logits) is computed in float16, as meki-compile does it. An older QAIRT could not
# load our binaries: "latest". The number of runs (100) and the HTP's performance mode (burst) are AI Hub's defaults.
PROFILE_OPTIONS = "--qairt_version latest"
COMPILE_OPTIONS = (
    "--target_runtime qnn_context_binary --qnn_options default_graph_htp_precision=FLOAT16 --qairt_version latest"
)


class HubError(RuntimeError):
    """AI Hub, or the way there, failed."""


class QuotaError(HubError):
    """AI Hub takes no more requests for now."""


class GoneError(HubError):
    """What an id stands for was deleted, or belongs to another account."""


@contextlib.contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Every failure of the client as a HubError that begins with `doing`."""
    from botocore.exceptions import BotoCoreError, ClientError
    from qai_hub.client import Error, RateLimitedError
    from qai_hub.public_rest_api import APIException

    try:
        yield
    except (Error, APIException, BotoCoreError, ClientError, OSError, ValueError) as error:
        text = " ".join(re.sub("[┌─┐└┘|]", " ", str(error)).split())  # the client draws boxes around its messages
        if "Failed to authenticate" in text:
            raise HubError(
                f"{doing}: AI Hub does not accept the API token in {token_file()}; {HOW_TO_GET_A_TOKEN}"
            ) from error
        kind = QuotaError if isinstance(error, RateLimitedError) else HubError
        if "could not be found" in text:
            kind = GoneError
        raise kind(f"{doing}: {text or type(error).__name__}") from error


def token_file() -> str:
    from qai_hub.api_utils import get_config_path

    return str(get_config_path())


def connect() -> qai_hub.Client:
    """A client with the user's configuration. HubError without one, or without the package."""
    try:
        import qai_hub
    except ImportError as error:
        raise HubError(f"AI Hub's client cannot be imported ({error}): pip install 'meki[hub]'") from error
    client = qai_hub.Client()
    try:
        client.set_verbose(False)  # reads the configuration
    except (qai_hub.Error, configparser.Error, ValueError) as error:
        raise HubError(f"no API token for AI Hub in {token_file()}; {HOW_TO_GET_A_TOKEN}") from error
    return client


def list_devices(client: qai_hub.Client) -> list[qai_hub.Device]:
    with hub_errors("list of devices"):
        return client.get_devices()


def find_device(client: qai_hub.Client, name: str, htp_arch: int) -> qai_hub.Device:
    """The device of that name with the latest system, as AI Hub selects it. ValueError if there is none, or if its
    Hexagon processor is not `htp_arch`."""
    from qai_hub import Device

    devices = list_devices(client)
    found = [device for device in devices if device.name == name]
    if not found:
        names = {device.name.lower(): device.name for device in devices}
        near = [names[match] for match in difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)]
        similar = f"similar ones: {', '.join(near)}; " if near else ""
        raise ValueError(f"AI Hub has no device {name!r}; {similar}--list-devices shows all {len(names)}")
    versions = {version for device in found for version in attributes(device, "hexagon")}
    if versions and f"v{htp_arch}" not in versions:
        raise ValueError(
            f"{name} has Hexagon {', '.join(sorted(versions))}, but the package is compiled for v{htp_arch}; choose "
            "another device, or --soc of its chip after meki-compile for it"
        )
    return Device(name)


def attributes(device: qai_hub.Device, kind: str) -> list[str]:
    """Values of attributes such as "chipset:sm8750"."""
    return [value for key, _, value in (text.partition(":") for text in device.attributes) if key == kind]


class Ledger:
    """Ids of what was uploaded and submitted, in a JSON file, so that a later run need not do it again.

    A file that two runs change at the same moment may lose an id, which costs an upload.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """HubError if the file is not a ledger."""
        if not self.path.is_file():
            return {}
        try:
            ids = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise HubError(
                f"{self.path}: expected the ids of earlier uploads and jobs, got {error}; delete it"
            ) from error
        if not isinstance(ids, dict):
            raise HubError(f"{self.path}: expected a JSON object, got {type(ids).__name__}; delete it")
        return ids

    def put(self, key: str, identity: str | None) -> None:
        """None: forgets the key."""
        ids = {known: value for known, value in (self.read() | {key: identity}).items() if value is not None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, to_json(ids))


Jobs = list[tuple[str, Any]]
"""The jobs of one stage with their keys in the ledger, in the order in which they run. The last one profiles."""


class Hub:
    """Uploads and jobs on one device, each done once and then found in the ledger."""

    def __init__(self, client: qai_hub.Client, device: qai_hub.Device, ledger: Ledger) -> None:
        self.client, self.device, self.ledger = client, device, ledger

    def submit(self, name: str, content: str, source: AbstractContextManager[Path], compiling: bool) -> Jobs:
        """Uploads a model, if AI Hub does not have it, and submits the jobs that profile it.

        content: identifies the model, whatever it is called; source: gives its path, is entered only to upload it;
        compiling: AI Hub compiles it first. HubError; QuotaError if it makes no sense to go on.
        """
        client, device = self.client, self.device
        model = self._once(f"model {content}", "model_id", client.get_model, partial(self._upload, source))
        jobs: Jobs = []
        make: Callable[[], Any]
        if compiling:
            key = f"compile {model.model_id} for {device.name}, {COMPILE_OPTIONS}"
            make = partial(client.submit_compile_job, model, device, name, options=COMPILE_OPTIONS, retry=False)
            job = self._once(key, "job_id", client.get_job, make)
            jobs.append((key, job))
            with hub_errors(f"job {job.job_id}"):
                model = job.get_target_model()  # is named before the job has run: AI Hub chains the two
            if model is None:
                self._check(jobs, wait=False)  # if it failed, it says why
                self.ledger.put(key, None)
                raise HubError(f"compile job {job.job_id} names no compiled model ({job.url})")
        key = f"profile {model.model_id} on {device.name}, {PROFILE_OPTIONS}"
        make = partial(
            client.submit_inference_job, model, device, name=name, options=PROFILE_OPTIONS, profile=True, retry=False
        )
        try:
            return [*jobs, (key, self._once(key, "job_id", client.get_job, make))]
        except HubError:
            self._check(jobs, wait=False)  # a compile job that failed meanwhile says more
            raise

    def _once(self, key: str, attribute: str, get: Callable[[str], Any], make: Callable[[], Any]) -> Any:
        """What `get` finds for the id that the ledger knows, or what `make` makes, whose `attribute` is its id."""
        if (known := self.ledger.read().get(key)) is not None:
            with contextlib.suppress(GoneError), hub_errors(key):
                return get(known)
        with hub_errors(key):
            made = make()
        self.ledger.put(key, getattr(made, attribute))
        return made

    def _upload(self, source: AbstractContextManager[Path]) -> Any:
        previous = tempfile.tempdir
        with (
            source as path,
            tempfile.TemporaryDirectory(prefix="meki-hub-") as scratch,
            contextlib.redirect_stdout(sys.stderr),
        ):
            try:
                # The client packs a directory into an archive in the temporary directory, and leaves it there.
                tempfile.tempdir = scratch
                self.client.set_verbose(sys.stderr.isatty())  # the client's own progress bars
                return self.client.upload_model(str(path))
            finally:
                tempfile.tempdir = previous
                self.client.set_verbose(False)

    def _check(self, jobs: Jobs, *, wait: bool) -> None:
        """HubError if one of the jobs failed: it is forgotten with those behind it, which fail with it, so that the
        next run submits these again. wait: until all have ended."""
        for i, (_, job) in enumerate(jobs):
            with hub_errors(f"job {job.job_id}"):
                status = job.wait() if wait else job.get_status()
            if status.failure:
                for key, _ in jobs[i:]:
                    self.ledger.put(key, None)
                kind = "profile" if job.job_type == "inference" else job.job_type
                raise HubError(f"{kind} job {job.job_id} failed: {status.message or 'without a reason'} ({job.url})")

    def profile(self, jobs: Jobs) -> dict[str, Any]:
        """Waits for a stage's jobs. What `figures` makes of its profile; HubError if a job failed or it lacks times."""
        self._check(jobs, wait=True)
        _, job = jobs[-1]
        with hub_errors(f"results of job {job.job_id}"):
            return figures(job.download_profile())


def figures(profile: dict[str, Any]) -> dict[str, Any]:
    """Times in microseconds, memory in bytes, layers by compute unit. ValueError if there are no times.

    AI Hub's own "estimated_inference_time" is the fastest run; ours is the median of all.
    """
    summary = profile.get("execution_summary", {})
    samples = summary.get("all_inference_times")
    if not samples:
        raise ValueError("the profile has no inference times")
    median, p10, p90 = percentiles(samples, 50, 10, 90)
    memory = summary.get("inference_memory_peak_range")
    return {
        "samples_us": list(samples),
        "median_us": median,
        "p10_us": p10,
        "p90_us": p90,
        "estimated_inference_time_us": summary["estimated_inference_time"],
        "memory_peak_range_bytes": None if memory is None else list(memory),
        "first_load_us": summary["first_load_time"],
        "warm_load_us": summary["warm_load_time"],
        "layers": dict(Counter(layer["compute_unit"] for layer in profile["execution_detail"])),
    }
