"""A pretended Google Cloud Storage: a server with the objects, and epath's way to them.

The server speaks as much of the JSON API as tensorstore does, so that what Orbax and
the manifest write is sent as it is to the real one. `Client` stands in for gcsfs; it
has only what an object store has: no folders, no renames, nothing to append to.

    python bucket.py full --run-dir gs://BUCKET/FOLDER

is a small experiment over it; at the batch that KILL_AT names it ends as if killed.
"""

import dataclasses
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.parse import parse_qs, quote, unquote, urlsplit
from urllib.request import Request, urlopen

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
from fsspec.spec import AbstractBufferedFile
from jax.sharding import PartitionSpec

from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.plots import curves, panels
from jaxzoo.training.record import Claim, Report
from jaxzoo.training.step import init_state, update_step

URL = "TENSORSTORE_GCS_HTTP_URL"


class _Handler(BaseHTTPRequestHandler):
    """Objects by name, each with its generation: the number of the write it is from."""

    objects: dict[str, tuple[int, bytes]]
    lock: threading.Lock
    generations: list[int]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms an answer otherwise

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self._change(self._query["name"], content)

    def do_DELETE(self):
        self._change(self._name, None)

    def do_GET(self):
        path = urlsplit(self.path).path
        if path.endswith("/o"):
            return self._list()
        generation, content = self.objects.get(self._name, (0, b""))
        if not generation:
            return self._answer(404)
        if self._query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if self._query.get("alt") != "media":
            return self._tell(self._name)
        return self._answer(200, content, generation)

    @property
    def _query(self):
        return {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}

    @property
    def _name(self):
        return unquote(urlsplit(self.path).path.split("/o/", 1)[1])

    def _change(self, name, content):
        with self.lock:
            found = self.objects.get(name, (0, b""))[0]
            if int(self._query.get("ifGenerationMatch", found)) != found:
                return self._answer(412)
            if content is None:
                return self._answer(204 if self.objects.pop(name, None) else 404)
            self.generations[0] += 1
            self.objects[name] = self.generations[0], content
        return self._tell(name)

    def _list(self):
        query = self._query
        names = sorted(
            name
            for name in list(self.objects)
            if name.startswith(query.get("prefix", ""))
            and query.get("startOffset", "") <= name < query.get("endOffset", "\xff")
        )
        return self._json({"items": [self._facts(name) for name in names]})

    def _facts(self, name):
        generation, content = self.objects[name]
        return {"name": name, "generation": generation, "size": str(len(content))}

    def _tell(self, name):
        self._json(self._facts(name))

    def _json(self, value):
        self._answer(200, json.dumps(value).encode())

    def _answer(self, status, content=b"", generation=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(content)


class Client(fsspec.AbstractFileSystem):
    """What gcsfs is to epath, over the server that the environment names."""

    protocol = ("gs", "gcs")
    cachable = False

    def _call(self, method, path, content=None, **query):
        bucket, _, name = str(self._strip_protocol(path)).partition("/")
        upload = "/upload" if method == "POST" else ""
        where = f"{os.environ[URL]}{upload}/storage/v1/b/{bucket}/o"
        if method == "POST":
            query |= {"uploadType": "media", "name": name}
        elif name:
            where += "/" + quote(name, safe="")
        words = "&".join(f"{k}={quote(v, safe='')}" for k, v in query.items())
        request = Request(f"{where}?{words}", content, method=method)
        try:
            with urlopen(request) as answer:
                return answer.read()
        except HTTPError as error:
            raise FileNotFoundError(path) from error  # it answers 404 alone

    def ls(self, path, detail=True, **_):
        path = str(self._strip_protocol(path))
        bucket, _, name = path.partition("/")
        told = json.loads(self._call("GET", bucket, prefix=name))["items"]
        found = {}
        for item in told:
            rest = item["name"].removeprefix(name)
            if not rest:
                found[path] = {"name": path, "size": int(item["size"]), "type": "file"}
            elif rest.startswith("/") or not name:
                entry = f"{path}/{rest.strip('/').split('/')[0]}"
                whole = entry == f"{bucket}/{item['name']}"
                kind = "file" if whole else "directory"
                size = int(item["size"]) if whole else 0
                found[entry] = {"name": entry, "size": size, "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path, mode="rb", **_):
        if mode == "ab":
            mode = "wb"  # as gcsfs does it: what was there is gone
        return _Object(self, path, mode)

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.find(path) if recursive else [path]:
            self._call("DELETE", name)

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Object(AbstractBufferedFile):
    """Sent whole when it is closed."""

    def _fetch_range(self, start, end):
        return self.fs._call("GET", self.path, alt="media")[start:end]

    def _upload_chunk(self, final=False):
        if final:
            self.buffer.seek(0)
            self.fs._call("POST", self.path, self.buffer.read())
        return final


def use():
    """Lets epath reach the server that the environment names."""
    fsspec.register_implementation("gcs", Client, clobber=True)
    fsspec.register_implementation("gs", Client, clobber=True)


@contextmanager
def serve():
    """A server with an empty bucket of any name; yields (its URL, its objects)."""
    objects = {}
    state = {"objects": objects, "lock": threading.Lock(), "generations": [0]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), state))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 23
    save_every: float = 1e9  # seconds


PRESETS = {"full": Config()}
OPTIMIZER = optax.adam(0.1)


def loss(params, key, batch):
    noise = jax.random.normal(key, params["w"].shape)
    value = jnp.sum((params["w"] - batch.mean() + 0.1 * noise) ** 2)
    return value, {"loss": value}


def batches(t):
    if str(t) == os.environ.get("KILL_AT"):
        os._exit(137)
    return np.random.default_rng(t).normal(size=(8, 3)).astype(np.float32)


def main(config, run):
    state = init_state(jax.random.key(7), {"w": jnp.ones((4, 3))}, OPTIMIZER)
    train(
        run,
        "fit",
        update_step(loss, OPTIMIZER),
        state,
        batches,
        num_steps=config.steps,
        log_every=5,
        save_every=config.save_every,
        # In parts where there are several devices.
        specs=lambda _, shape: PartitionSpec("fsdp") if shape == (4, 3) else None,
    )
    history = run.history("fit")
    figure, (axis,) = panels(1)
    series = {"loss": (history["step"], history["loss"][:, None])}
    curves(axis, series, xlabel="step", ylabel="loss")
    picture = run.figure("loss", figure, title="Loss", caption="It falls.")
    last = float(history["loss"][-1])
    claim = Claim("The loss falls.", last, "< 12", last < 12)
    return Report([claim], {"loss": last}, [picture])


if __name__ == "__main__":
    use()
    experiment(main, PRESETS)
