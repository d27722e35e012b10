"""A bucket of an S3 server on this machine, which other processes reach by their environment."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


@contextmanager
def served_bucket(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket, as long as the block lasts; skips where moto or s3fs are not installed."""
    server = pytest.importorskip("moto.server", reason="needs the extra dev, whose moto is the server")
    s3fs = pytest.importorskip("s3fs", reason="needs the extra dev, whose s3fs speaks to it")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it says a line for each request
    served = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    served.start()
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        patch.setenv(f"AWS_{name}", value)
    host, port = served.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    urlopen(
        Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    ).close()  # servers of a process share buckets
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    served.stop()
