"""A Hub on this machine: what huggingface_hub asks for of a few models, and what goes wrong where a test says so."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """models: by name, by revision, the folder's files. gated: names that need a token. broken: a file of which half is sent, once or more.

    asked: the lines of all requests.
    """

    def __init__(self):
        self.models, self.gated, self.broken, self.asked = {}, set(), {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, with_body=False)

            def do_GET(self):
                hub.answer(self, with_body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, folder, revision="main"):
        self.models.setdefault(name, {})[revision] = {path.name: path.read_bytes() for path in folder.iterdir()}

    def commit(self, name, revision):
        return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.close()
            thread.join()

    def close(self):
        """From here on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, with_body):
        self.asked.append(f"{request.command} {request.path}")
        path = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        owner, model, kind, revision, *rest = [*path[2 * is_api :], "revision", "main"][:5] if len(path) < 5 else path[2 * is_api :]
        name = f"{owner}/{model}"
        if name in self.gated and "Authorization" not in request.headers:
            return self.refuse(request, 401, "GatedRepo", f"Access to model {name} is restricted")
        if name not in self.models:
            return self.refuse(request, 401, "RepoNotFound", "Repository not found")
        revisions = {self.commit(name, each): files for each, files in self.models[name].items()}
        commit = revision if revision in revisions else self.commit(name, revision)
        if (files := revisions.get(commit)) is None:
            return self.refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if is_api and kind == "tree":
            entries = [{"type": "file", "path": file, "size": len(data), "oid": _etag(data)} for file, data in sorted(files.items())]
            return self.send(request, json.dumps(entries).encode(), with_body)
        if is_api:
            told = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files], "tags": [], "private": False}
            return self.send(request, json.dumps(told).encode(), with_body)
        file = "/".join(rest)
        if file not in files:
            return self.refuse(request, 404, "EntryNotFound", f"Entry not found: {file}")
        return self.send(request, files[file], with_body, file, {"X-Repo-Commit": commit, "ETag": f'"{_etag(files[file])}"'})

    def refuse(self, request, status, code, message):
        request.send_response(status)
        for key, value in (("X-Error-Code", code), ("X-Error-Message", message), ("Content-Length", "0")):
            request.send_header(key, value)
        request.end_headers()

    def send(self, request, data, with_body, file=None, headers=None):
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        request.send_response(206 if start else 200)
        for key, value in {**(headers or {}), "Content-Length": str(len(data) - start), "Accept-Ranges": "bytes"}.items():
            request.send_header(key, value)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if not with_body:
            return
        is_broken = self.broken.get(file, 0) > 0
        if is_broken:
            self.broken[file] -= 1
            data = data[: start + (len(data) - start) // 2]
            request.close_connection = True
        request.wfile.write(data[start:])


def _etag(data):
    return hashlib.sha1(data).hexdigest()
