"""An object store on localhost with just as much of the APIs of GCS (JSON) and S3 as TensorStore's drivers use.

    with FakeStore("bucket") as store:       store.objects: {key: bytes}; store.url: http://127.0.0.1:PORT
        store.before = function              called with (method, key) before each request is answered: may wait, or
                                             return an HTTP status to answer with instead
        store.pause() ... store.go_on()      nothing listens in between

Lists come in pages of 5.
"""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

PAGE = 5


class FakeStore:
    def __init__(self, bucket):
        self.bucket, self.objects, self.requests = bucket, {}, []
        self.before = lambda method, key: None
        self._port = 0

    def __enter__(self):
        self.go_on()
        return self

    def __exit__(self, *_):
        if self._server:
            self.pause()

    def go_on(self):
        store = self

        class Handler(_Handler):
            fake = store

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def pause(self):
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def page(self, first, last, token):
        after = bytes.fromhex(token).decode()
        names = sorted(key for key in self.objects if first <= key and (not last or key < last) and key > after)
        return names[:PAGE], names[PAGE - 1].encode().hex() if len(names) > PAGE else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: in two it would wait for the first one's acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fake._server is None:  # a connection from before the pause
            self.close_connection = True
            return
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        is_gcs = "/storage/v1/b/" in parts.path
        path = parts.path.partition("/b/")[2] if is_gcs else parts.path.lstrip("/")
        bucket, _, rest = path.partition("/")
        key = urllib.parse.unquote(query.get("name") or (rest.removeprefix("o").removeprefix("/") if is_gcs else rest))
        self.fake.requests.append((self.command, key))
        status = self.fake.before(self.command, key)
        if status or bucket != self.fake.bucket:
            self._send(status or 404, b'{"error": {}}')
        elif self.command in ("POST", "PUT"):
            self.fake.objects[key] = body
            self._send(200, self._metadata(key) if is_gcs else b"", ETag='"1"')
        elif self.command == "DELETE":
            self._send(204 if self.fake.objects.pop(key, None) is not None else 404, b"")
        elif not key:
            self._send(200, self._gcs_list(query) if is_gcs else self._s3_list(query))
        elif key in self.fake.objects:
            self._send(200, self.fake.objects[key], ETag='"1"', **{"x-goog-generation": "1"})
        else:
            self._send(404, b"")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer

    def _metadata(self, key):
        return json.dumps({"name": key, "generation": "1", "size": str(len(self.fake.objects[key]))}).encode()

    def _gcs_list(self, query):
        names, token = self.fake.page(query.get("startOffset", ""), query.get("endOffset"), query.get("pageToken", ""))
        found = {"items": [json.loads(self._metadata(name)) for name in names]}
        return json.dumps(found | ({"nextPageToken": token} if token else {})).encode()

    def _s3_list(self, query):
        prefix = query.get("prefix", "")
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else None
        names, token = self.fake.page(prefix, end, query.get("continuation-token", ""))
        items = "".join(f"<Contents><Key>{escape(name)}</Key><Size>1</Size></Contents>" for name in names)
        more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
        return (f"<ListBucketResult><IsTruncated>{str(bool(token)).lower()}</IsTruncated><KeyCount>{len(names)}"
                f"</KeyCount>{items}{more}</ListBucketResult>").encode()

    def _send(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
