"""A real S3 server for tests: SeaweedFS on an address of this machine, started and stopped at will, ports kept."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ACCESS_KEY, SECRET_KEY = "mill-test", "mill-test-secret"
BUCKET = "mill"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
START_S = 60


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class SeaweedFS:
    """The server and its data folder."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._folder, self._host = folder, host
        self.process: subprocess.Popen[bytes] | None = None
        self._choose_ports()
        try:
            self.start()
        except (BotoCoreError, ClientError):  # a port was taken between its choice and its use
            self._choose_ports()
            self.start()
        self.client().create_bucket(Bucket=BUCKET)

    def _choose_ports(self) -> None:
        names = (
            "s3", "s3.grpc", "master", "master.grpc", "filer", "filer.grpc", "volume", "volume.grpc", "admin",
            "admin.grpc",
        )  # fmt: skip
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.endpoint = f"http://{self._host}:{self._ports['s3']}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        weed = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
        ports = self._ports
        command = [
            weed, "mini", f"-dir={self._folder}", f"-ip={self._host}", f"-ip.bind={self._host}",
            f"-s3.port={ports['s3']}", f"-s3.port.grpc={ports['s3.grpc']}", f"-master.port={ports['master']}",
            f"-master.port.grpc={ports['master.grpc']}", f"-filer.port={ports['filer']}",
            f"-filer.port.grpc={ports['filer.grpc']}", f"-volume.port={ports['volume']}",
            f"-volume.port.grpc={ports['volume.grpc']}", f"-admin.port={ports['admin']}",
            f"-admin.port.grpc={ports['admin.grpc']}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false",
            "-admin.ui=false", "-master.telemetry=false", "-s3.autoCreateBucket=false",
        ]  # fmt: skip
        log = (self._folder / "weed.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **CREDENTIALS}, cwd=self._folder
        )
        log.close()
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.client().list_buckets()
                return
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.kill()
                    raise
                time.sleep(0.2)

    def kill(self) -> None:
        """End the server at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    def client(self) -> "S3Client":
        """Return a plain boto3 client with the right keys."""
        return boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=2),
        )  # fmt: skip

    @property
    def storage(self) -> dict[str, object]:
        """The `storage` section of a run file that reaches the server."""
        return {"endpoint": self.endpoint, "path_style": True, "region": "us-east-1", "timeout_s": 5}
