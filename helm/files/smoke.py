"""What `helm test` runs inside the cluster: a red picture goes in, some words must come out."""

import base64
import http.client
import json
import os
import ssl
import struct
import zlib
from pathlib import Path

KEYS = Path(os.environ.get("API_KEYS", "/etc/internvl/keys/keys"))


def connect():
    address = os.environ["SERVER_HOST"], int(os.environ["SERVER_PORT"])
    if not os.environ.get("SERVER_TLS"):
        return http.client.HTTPConnection(*address, timeout=120)
    # The certificate is for the name that clients use, not for the service's.
    trusting = ssl._create_unverified_context()  # noqa: S323
    return http.client.HTTPSConnection(*address, timeout=120, context=trusting)


def call(method, path, body=None):
    link = connect()
    headers = {"Content-Type": "application/json"}
    key = KEYS.read_text().split(",")[0].strip() if KEYS.exists() else ""
    if key:
        headers["Authorization"] = f"Bearer {key}"
    link.request(method, path, json.dumps(body) if body else None, headers)
    answer = link.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise SystemExit(f"{method} {path} answered {answer.status}: {text[:500]}")
    return text


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


side = 112
rows = (b"\0" + b"\xdc\x1e\x1e" * side) * side
png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
url = "data:image/png;base64," + base64.b64encode(png).decode()

call("GET", "/ready")
if os.environ.get("NO_KEY_KNOWN"):
    raise SystemExit(0)
model = json.loads(call("GET", "/v1/models"))["data"][0]["id"]
content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": "What colour is this picture?"},
]
question = {
    "model": model,
    "messages": [{"role": "user", "content": content}],
    "max_completion_tokens": 32,
    "temperature": 0,
}
answer = json.loads(call("POST", "/v1/chat/completions", question))
words = answer["choices"][0]["message"]["content"]
print(f"{model}: {words}")  # noqa: T201
if not words.strip():
    raise SystemExit("the answer is empty")
