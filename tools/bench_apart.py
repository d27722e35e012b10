"""Measure what `prepare --on ray` moves between nodes that share no disk and a store of objects, by kind of file.

python tools/bench_apart.py CORPUS TOKENIZER [MB [NODES]]                      4 MB of the corpus, 2 nodes

The text is cut into documents of about a kilobyte, each tenth is a near duplicate of one before it, and all is put into
a bucket of a server on this machine, which counts. Exact and near duplicates are sought, the documents shuffled.
"""

import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import yaml

from megatron_sep.files import read_json
from megatron_sep.prepare.readings import expand
from megatron_sep.prepare.text import Limits, read_documents

FILES, DOCUMENT, NEAR = 8, 1_000, 0.1
KINDS = {
    "text": r"/text/",
    "statuses, digests": r"/scan\.(status|digests)\.",
    "signatures": r"/scan\.signatures\.",
    "codes, decisions": r"/(codes|drops)$",
    "buckets of keys": r"/keys-\d+",
    "who shares a band": r"/shared/",
    "tokens, lengths": r"/encode\.(bin|lengths)\.",
}
"""By a part of the path; what is left is states, the tokenizer, sums and the lock."""


class Counting:
    """A WSGI application with the bytes and requests that each kind of file took, by method."""

    def __init__(self, application: Any) -> None:
        self._application, self.bytes, self.requests = application, Counter[tuple[str, str]](), Counter[str]()

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        kind = next((name for name, found in KINDS.items() if re.search(found, path)), "other")
        self.requests[method] += 1
        if method == "PUT":
            self.bytes["put", kind] += int(environment.get("CONTENT_LENGTH") or 0)

        def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            length = next((value for name, value in headers if name.lower() == "content-length"), "0")
            self.bytes["fetched", kind] += int(length) if method == "GET" else 0
            return start(status, headers, *rest)

        found: Iterable[bytes] = self._application(environment, started)
        return found


@contextmanager
def served() -> Iterator[Counting]:
    """A server with an empty bucket, which processes started in the block reach by their environment."""
    servers = import_module("moto.moto_server.threaded_moto_server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made: list[Counting] = []
    make = servers.make_server

    def counted(host: str, port: int, application: Any, *rest: Any, **more: Any) -> Any:
        made.append(Counting(application))
        return make(host, port, made[0], *rest, **more)

    with patch.object(servers, "make_server", counted):
        server = servers.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    fsspec.filesystem("s3").mkdir("bucket")
    yield made[0]
    server.stop()


def documents(corpus: str, size: int) -> Iterator[str]:
    generator, before = random.Random(0), list[str]()
    for file in expand([corpus], "corpus"):
        for document in read_documents(file, Limits(on_bad="skip")):
            for at in range(0, len(document.text), DOCUMENT):
                text = document.text[at : at + DOCUMENT]
                if before and generator.random() < NEAR:
                    text = f"{generator.choice(before)} {generator.random()}"
                before.append(text)
                yield text
                size -= len(text)
                if size <= 0:
                    return


def put_text(texts: list[str]) -> None:
    for number in range(FILES):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::FILES])
        fsspec.filesystem("s3").pipe_file(f"bucket/text/{number}.jsonl", lines.encode())


def prepare(tokenizer: str, folder: Path, nodes: int) -> dict[str, Any]:
    """The receipt of a shard that a cluster has made."""
    from ray.cluster_utils import Cluster

    wanted = {"output": str(folder / "out"), "tokenizer": {"path": str(Path(tokenizer).resolve())}, "shuffle": True}
    wanted |= {"sources": [{"paths": ["s3://bucket/text/*.jsonl"]}], "deduplicate": {"exact": True, "near": True}}
    (folder / "prepare.yaml").write_text(yaml.safe_dump({**wanted, "work": {"address": "s3://bucket/work"}}))
    disks = [folder / f"disk{number}" for number in range(nodes)]
    for disk in disks:
        disk.mkdir()
    head = {"num_cpus": 1, "include_dashboard": False, "env_vars": {"TMPDIR": str(disks[0])}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for disk in disks[1:]:
        cluster.add_node(num_cpus=1, env_vars={"TMPDIR": str(disk)})
    command = [sys.executable, "-m", "megatron_sep", "prepare", str(folder / "prepare.yaml")]
    subprocess.run([*command, "--on", f"ray://{cluster.address}"], check=True)
    cluster.shutdown()
    found: dict[str, Any] = read_json(folder / "out.manifest.json")
    return found


def main(corpus: str, tokenizer: str, megabytes: str = "4", nodes: str = "2") -> None:
    with tempfile.TemporaryDirectory() as name, served() as counts:
        put_text(list(documents(corpus, int(float(megabytes) * 10**6))))
        counts.bytes.clear()
        counts.requests.clear()
        before = time.perf_counter()
        receipt = prepare(tokenizer, Path(name), int(nodes))
        read, clock = receipt["documents"]["read"], time.perf_counter() - before
        total = sum(file["bytes"] for source in receipt["sources"] for file in source["files"])
    print(f"{nodes} nodes, {read:,} documents of {total / read:.0f} bytes, {clock:.0f} s, {receipt['documents']}")
    print(f"requests: {dict(counts.requests)}, load {os.getloadavg()[0]:.1f}")
    for kind in [*KINDS, "other"]:
        put, fetched = (counts.bytes[way, kind] / read for way in ("put", "fetched"))
        print(f"| {kind} | {put:.1f} | {fetched:.1f} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores", flush=True)
    main(*sys.argv[1:])
