"""A proxy between a client and the server that counts requests and, where told to, answers in the server's place.

    with FaultProxy(server.url) as proxy:
        proxy.fail("get_info", status=503, times=2)
        ... use proxy.url ...
        assert proxy.count("get_info") == 3
"""

import http.client
import http.server
import json
import threading
import urllib.parse

FOREVER = 1 << 30


class Fault:
    """What one path is answered. kind: only polls of this X-Tinker-Request-Type."""

    def __init__(self, path, status, body, headers, times, kind):
        self.path, self.status, self.body, self.headers, self.left, self.kind = path, status, body, headers or {}, times, kind


class FaultProxy:
    def __init__(self, upstream):
        url = urllib.parse.urlsplit(upstream)
        self.upstream = (url.hostname, url.port)
        self.lock, self.faults, self.counts = threading.Lock(), [], {}
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, path, status, body=None, headers=None, times=FOREVER, kind=None):
        """Answers requests whose path ends so with status and body (JSON); status None drops the connection."""
        if body is None:
            body = {"detail": f"fault {status}", "message": f"fault {status}", "category": "server"}
        with self.lock:
            self.faults.append(Fault(path, status, json.dumps(body).encode(), headers, times, kind))
            self.counts = {}

    def clear(self):
        with self.lock:
            self.faults, self.counts = [], {}

    def count(self, path, kind=None):
        """Requests since the last fail() or clear() whose path ends so."""
        with self.lock:
            return sum(n for (p, k), n in self.counts.items() if p.endswith(path) and kind in (None, k))

    def _match(self, path, kind):
        with self.lock:
            self.counts[path, kind] = self.counts.get((path, kind), 0) + 1
            for fault in self.faults:
                if path.endswith(fault.path) and fault.left > 0 and fault.kind in (None, kind):
                    fault.left -= 1
                    return fault
        return None

    def _handler(self):
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urllib.parse.urlsplit(self.path).path
                fault = proxy._match(path, self.headers.get("X-Tinker-Request-Type"))
                if fault is None:
                    self.reply(*self.forward(body))
                elif fault.status is None:
                    self.close_connection = True
                else:
                    self.reply(fault.status, {"Content-Type": "application/json", **fault.headers}, fault.body)

            def forward(self, body):
                connection = http.client.HTTPConnection(*proxy.upstream, timeout=120)
                try:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "accept-encoding")}
                    connection.request(self.command, self.path, body or None, headers)
                    answer = connection.getresponse()
                    data = answer.read()
                finally:
                    connection.close()
                drop = ("connection", "content-length", "transfer-encoding")
                return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in drop}, data

            def reply(self, status, headers, body):
                head = f"HTTP/1.1 {status} {http.client.responses.get(status, '')}\r\n"
                head += "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + f"Content-Length: {len(body)}\r\n\r\n"
                try:
                    self.wfile.write(head.encode() + body)
                except ConnectionError:
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_DELETE = serve

        return Handler
