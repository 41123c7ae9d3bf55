"""A stand-in for AI Hub on the loopback interface: the messages of its own client, and the parts of its REST interface
that benchmarks.aihub's use of the client leads to. What it is sent it checks, and refuses as a server would."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

from google.protobuf.message import Message
from qai_hub import public_api_pb2 as pb

TOKEN = "a-token-of-40-characters-for-this-stand-in"
PART_BYTES = 1000

STATES = {
    "compile": [pb.JOB_STATE_CREATED, pb.JOB_STATE_OPTIMIZING_MODEL],
    "profile": [pb.JOB_STATE_CREATED, pb.JOB_STATE_PROVISIONING_DEVICE, pb.JOB_STATE_MEASURING_PERFORMANCE],
}


class RefusedError(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass
class Upload:
    """A model: what its creator said of it, and its content once all parts are there."""

    message: Any
    size: int = 0
    parts: dict[int, bytes] = field(default_factory=dict)
    content: bytes | None = None
    producer: str | None = None

    @property
    def sha256(self) -> str:
        assert self.content is not None
        return hashlib.sha256(self.content).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Of a directory model, which comes as an archive."""
        assert self.content is not None
        with zipfile.ZipFile(BytesIO(self.content)) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


@dataclass
class Job:
    kind: str
    """A key of STATES."""
    message: Any
    model: str
    polls: int = 0


class StubHub:
    """Serves while the context lasts. Attributes are what it was told, and what it is to answer."""

    def __init__(self) -> None:
        self.models: dict[str, Upload] = {}
        self.jobs: dict[str, Job] = {}
        self.devices: list[Any] = []
        self.profiles: dict[str, Any] = {}
        """ProfileDetail by the last word of a job's name."""
        self.reasons: dict[tuple[str, str], str] = {}
        """Why jobs fail, by kind and the last word of their names."""
        self.job_limit: int | None = None
        self.polls_in_a_state = 1
        self.names_compiled_models = True
        self.bucket: str | None = None
        """Uploads go to this bucket of S3, which is here as well, with credentials."""
        self.bucket_refuses = False
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StubHub:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add_device(self, name: str, os: str, *attributes: str) -> None:
        self.devices.append(pb.Device(name=name, os=os, attributes=attributes))

    def posts(self, path: str) -> int:
        """How often something was created at a path of the interface."""
        return self.requests.count(f"POST /api/v1/{path}")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                url = urlsplit(self.path)
                parts = [part for part in url.path.split("/") if part]
                hub.requests.append(f"{self.command} {url.path.rstrip('/')}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    if parts[:1] == ["parts"]:
                        self._answer(200, b"", etag=hub._take_part(self.command, parts, body, self.headers))
                        return
                    if parts[:1] == [hub.bucket]:
                        hub._take_object(self.command, parts, body, self.headers)
                        self._answer(200, b"", etag='"1"')
                        return
                    if self.headers.get("Authorization") != f"token {TOKEN}":
                        raise RefusedError(401, "Invalid token.")
                    if parts[:2] != ["api", "v1"] or not url.path.endswith("/"):
                        raise RefusedError(404, f"no such path {url.path}")
                    query = {key: values[0] for key, values in parse_qs(url.query).items()}
                    message = hub._answer(self.command, parts[2:], query, body)
                    self._answer(200, message.SerializeToString(), content_type="application/x-protobuf")
                except RefusedError as error:
                    self._answer(error.status, json.dumps({"detail": str(error)}).encode())

            def _answer(
                self, status: int, body: bytes, content_type: str = "application/json", etag: str | None = None
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                if etag is not None:
                    self.send_header("ETag", etag)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = _serve

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler

    def _answer(self, method: str, path: list[str], query: dict[str, str], body: bytes) -> Message:
        routes: dict[tuple[str, ...], Callable[..., Message]] = {
            ("GET", "devices"): lambda: self._list_devices(query),
            ("POST", "models"): lambda: self._create_model(body),
            ("GET", "models", "*"): self._model,
            ("GET", "models", "*", "multipart_upload"): lambda model: self._begin_upload(model, query),
            ("POST", "models", "*", "multipart_upload"): lambda model: self._end_upload(model, body),
            ("POST", "models", "*", "upload_complete"): self._end_transfer,
            ("POST", "jobs"): lambda: self._create_job(body),
            ("GET", "jobs", "*"): self._job,
            ("GET", "jobs", "*", "result"): self._result,
        }
        identity = path[1:2]
        route = routes.get((method, *(part if i != 1 else "*" for i, part in enumerate(path))))
        if route is None:
            raise RefusedError(404, f"no such path {path}")
        return route(*identity)

    def _list_devices(self, query: dict[str, str]) -> Message:
        found = [device for device in self.devices if query.get("name", device.name) == device.name]
        if query["select"] == "True":
            found = sorted(found, key=lambda device: int(device.os))[-1:]
        return pb.DeviceList(devices=found)

    def _create_model(self, body: bytes) -> Message:
        message = pb.Model.FromString(body)
        identity = f"m{len(self.models)}"
        self.models[identity] = Upload(message)
        return pb.CreateUpdateResponse(id=identity)

    def _uploaded(self, identity: str) -> Upload:
        if identity not in self.models:
            raise RefusedError(404, "Not found.")
        return self.models[identity]

    def _model(self, identity: str) -> Message:
        upload = self._uploaded(identity)
        return pb.Model(model_id=identity, name=upload.message.name, model_type=upload.message.model_type)

    def _begin_upload(self, identity: str, query: dict[str, str]) -> Message:
        upload = self._uploaded(identity)
        upload.size = int(query["file_size"])
        if self.bucket is not None and query["supports_s3_credentials"] == "true":
            names = {"access_key_id": "ID", "secret_access_key": "secret", "session_token": "session"}
            return pb.FileUploadResponse(
                credentials=pb.S3Credentials(bucket=self.bucket, key=f"models/{identity}", region="us-west-2", **names)
            )
        count = -(-upload.size // PART_BYTES)
        urls = [f"{self.url}/parts/{identity}/{index}" for index in range(count)]
        multipart = pb.FileMultipartUploadURL(urls=urls, upload_id=f"u-{identity}", max_part_size=PART_BYTES)
        return pb.FileUploadResponse(multipart_url=multipart)

    def _take_part(self, method: str, path: list[str], body: bytes, headers: Any) -> str:
        upload, index = self._uploaded(path[1]), int(path[2])
        if method != "PUT" or "Authorization" in headers:  # the token is not for the storage service
            raise RefusedError(400, "expected PUT without Authorization")
        upload.parts[index] = body
        return f'"{hashlib.md5(body).hexdigest()}"'

    def _take_object(self, method: str, path: list[str], body: bytes, headers: Any) -> None:
        if method != "PUT" or headers.get("X-Amz-Security-Token") != "session":
            raise RefusedError(400, "expected PUT with the credentials of the upload")
        if self.bucket_refuses:
            raise RefusedError(403, "The upload's credentials have expired.")
        self._uploaded(path[2]).parts[0] = body

    def _end_transfer(self, identity: str) -> Message:
        upload = self._uploaded(identity)
        if len(upload.parts.get(0, b"")) != upload.size:
            raise RefusedError(400, f"incomplete upload of {upload.size} bytes")
        upload.content = upload.parts[0]
        return pb.CreateUpdateResponse(id=identity)

    def _end_upload(self, identity: str, body: bytes) -> Message:
        upload, done = self._uploaded(identity), pb.FileMultipartUploadComplete.FromString(body)
        content = b"".join(upload.parts[index] for index in range(len(upload.parts)))
        etags = [f'"{hashlib.md5(upload.parts[index]).hexdigest()}"' for index in range(len(upload.parts))]
        if (done.upload_id, list(done.etags), len(content)) != (f"u-{identity}", etags, upload.size):
            raise RefusedError(400, f"incomplete upload of {upload.size} bytes: {len(content)}")
        upload.content = content
        return pb.CreateUpdateResponse(id=identity)

    def _create_job(self, body: bytes) -> Message:
        message = pb.Job.FromString(body)
        kind = {"compile_job": "compile", "inference_job": "profile"}[message.WhichOneof("job")]
        inner = message.compile_job if kind == "compile" else message.inference_job
        if self.job_limit is not None and len(self.jobs) >= self.job_limit:
            raise RefusedError(429, f"You have reached your limit of {self.job_limit} jobs.")
        upload = self._uploaded(inner.model.model_id)
        if upload.content is None and upload.producer is None:
            raise RefusedError(400, "The model's file is missing.")
        if upload.producer is not None and self._state(self.jobs[upload.producer])[0] == pb.JOB_STATE_FAILED:
            raise RefusedError(400, "The model was not compiled.")
        device = inner.devices.devices[0] if kind == "compile" else inner.device
        if (device.name, device.os) not in [(known.name, known.os) for known in self.devices]:
            raise RefusedError(400, f"No device {device.name} {device.os}.")
        expected = pb.MODEL_TYPE_ONNX if kind == "compile" else pb.MODEL_TYPE_QNN_CONTEXT_BINARY
        if upload.message.model_type != expected or (kind == "profile" and not inner.is_profiling_on):
            raise RefusedError(400, "Wrong type of model or job.")
        identity = f"j{len(self.jobs)}"
        if kind == "compile":
            inner.compile_job_id = identity
            inner.device.CopyFrom(device)
            target = pb.Model(name=inner.name, model_type=pb.MODEL_TYPE_QNN_CONTEXT_BINARY, producer_id=identity)
            target.model_id = f"m{len(self.models)}"
            self.models[target.model_id] = Upload(target, producer=identity)
            if self.names_compiled_models:
                inner.target_model.CopyFrom(target)
        else:
            inner.inference_job_id = identity
        self.jobs[identity] = Job(kind, message, inner.model.model_id)
        return pb.CreateUpdateResponse(id=identity)

    def _state(self, job: Job) -> tuple[int, str]:
        states, passed = STATES[job.kind], job.polls // self.polls_in_a_state
        if passed < len(states):
            return states[passed], ""
        reason = self.reasons.get((job.kind, self._stage(job)))
        return (pb.JOB_STATE_DONE, "") if reason is None else (pb.JOB_STATE_FAILED, reason)

    def _stage(self, job: Job) -> str:
        inner = job.message.compile_job if job.kind == "compile" else job.message.inference_job
        return str(inner.name).split()[-1]

    def _known(self, identity: str) -> Job:
        if identity not in self.jobs:
            raise RefusedError(404, "Not found.")
        return self.jobs[identity]

    def _job(self, identity: str) -> Message:
        job = self._known(identity)
        inner = job.message.compile_job if job.kind == "compile" else job.message.inference_job
        inner.job_state, inner.failure_reason = self._state(job)
        job.polls += 1
        return job.message

    def _result(self, identity: str) -> Message:
        job = self._known(identity)
        if self._state(job)[0] != pb.JOB_STATE_DONE:
            raise RefusedError(400, "The job has no results.")
        detail = self.profiles[self._stage(job)]
        return pb.JobResult(inference_job_result=pb.InferenceJobResult(inference_job_id=identity, detail=detail))


def profile_detail(times: list[int], npu: int = 5, cpu: int = 0) -> Any:
    """A profile of these times in microseconds. The estimate is the fastest, as AI Hub has it."""
    units = [pb.COMPUTE_UNIT_NPU] * npu + [pb.COMPUTE_UNIT_CPU] * cpu
    layers = [pb.LayerDetail(name=f"layer{i}", compute_unit=unit) for i, unit in enumerate(units)]
    memory = pb.ProfileDetail.MemoryUsage(peak=pb.Range(lower=1_000_000, upper=3_000_000))
    return pb.ProfileDetail(
        major_version=1,
        minor_version=2,
        execution_time=min(times, default=0),
        all_execution_times=times,
        cold_load_time=70_000,
        warm_load_time=20_000,
        execution_memory=memory,
        layer_details=layers,
    )
