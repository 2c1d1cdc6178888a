"""Every header by which another machine could say that it is this one, and a client that sends them from there."""

import json

LOCAL = ("127.0.0.1", "::1", "localhost", '"[::1]:1"', "127.0.0.1, 127.0.0.1", "::ffff:127.0.0.1")
NAMES = (
    "X-Forwarded-For", "X-Real-IP", "X-Client-IP", "Client-IP", "True-Client-IP", "CF-Connecting-IP",
    "X-Cluster-Client-IP", "Fastly-Client-IP", "X-Originating-IP", "X-Remote-IP", "X-Remote-Addr", "Remote-Addr",
    "X-Forwarded-Host", "X-Forwarded-Server", "X-Forwarded-Proto", "X-Host", "X-Original-Host", "Via", "Origin",
    "Referer", "X-Forwarded-User", "X-Request-Timeout-Seconds", "X-ProxyUser-IP", "Base-URL",
)  # fmt: skip


def lies() -> list[dict[str, str]]:
    """Headers of a request, each with a Host that this machine would send."""
    every: list[dict[str, str]] = [{"Host": host} for host in ("localhost", "127.0.0.1", "[::1]", "localhost:8000")]
    for name in NAMES:
        every += [{"Host": "localhost", name: value} for value in LOCAL]
    every += [{"Host": "localhost", "Forwarded": f"for={value};host=localhost;by=127.0.0.1"} for value in LOCAL]
    every.append({"Host": "localhost", "Origin": "http://localhost"})
    every.append({"Host": "localhost", "Authorization": "Bearer "})
    every.append({"Host": "localhost"} | dict.fromkeys(NAMES[:12], "127.0.0.1"))
    return every


PATHS = (
    ("GET", "/"), ("GET", "/app.js"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"), ("POST", "/v1/images/generations"), ("POST", "/v1/likelihood"), ("POST", "/healthz"),
    ("GET", "/nowhere"), ("GET", "/healthz/"), ("GET", "//healthz"), ("GET", "/healthz/../v1/models"),
)  # fmt: skip

# run there with `python -c`: prints [[status, body], ...] of every request of sys.argv[3], JSON
CLIENT = """
import http.client, json, sys
answers = []
for method, path, headers in json.loads(sys.argv[3]):
    connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=30)
    body = b'{"steps": 2}' if method == "POST" else None
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body:
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    answers.append([answer.status, answer.read().decode()])
    connection.close()
print(json.dumps(answers))
"""


def requests() -> list[tuple[str, str, dict[str, str]]]:
    """Every lie to one path, and every path with the plainest."""
    return [("GET", "/v1/models", lie) for lie in lies()] + [(*path, {"Host": "localhost"}) for path in PATHS]


def as_argument(asked: list[tuple[str, str, dict[str, str]]]) -> str:
    return json.dumps(asked)
