"""As much of the Hugging Face hub's protocol as downloads and uploads of models need, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id: the contents of their files by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.address = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_HEAD

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append(f"{request.command} {path}")
        words = path.split("/")
        if not path:
            send(request, b"")
        elif path == "api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            self.repositories.setdefault(name, {})
            send_json(request, {"url": f"{self.address}/{name}", "name": name, "id": name})
        elif path == "api/validate-yaml":
            send_json(request, {"errors": [], "warnings": []})
        elif words[:2] == ["api", "models"]:
            self.answer_api("/".join(words[2:4]), words[4:], request, body)
        elif len(words) > 4 and words[2] == "resolve":
            self.answer_file("/".join(words[:2]), "/".join(words[4:]), request)
        else:
            send_json(request, {"error": "not here"}, 404)

    def answer_api(self, name: str, rest: list[str], request: BaseHTTPRequestHandler, body: bytes) -> None:
        files = self.repositories.get(name)
        if files is None:
            send_json(request, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif name in self.gated:
            send_json(request, {"error": "restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            send_json(request, {"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] in ([], ["revision"]):
            send_json(request, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        elif rest[0] == "tree":
            rows = [{"type": "file", "path": f, "size": len(c), "oid": etag(c)} for f, c in files.items()]
            send_json(request, rows)
        elif rest[0] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            send_json(request, {"files": answers})
        else:
            assert rest[0] == "commit"
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            url = f"{self.address}/{name}/commit/{COMMIT}"
            send_json(request, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def answer_file(self, name: str, file: str, request: BaseHTTPRequestHandler) -> None:
        files = self.repositories.get(name, {})
        if file not in files:
            send_json(request, {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{etag(files[file])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        send(request, files[file], headers=headers)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def send_json(
    request: BaseHTTPRequestHandler, value: object, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    send(request, json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def send(
    request: BaseHTTPRequestHandler, content: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    request.send_response(status)
    for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
