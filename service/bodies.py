"""The body of a request, read once and up to a cap, before anything parses it; compressed bodies too."""

from __future__ import annotations

import zlib

from fastapi import Request

from service.errors import Malformed, PayloadTooLarge, UnsupportedMedia

# A client that is still sending when its connection closes may never read the 413, so a little more is read first.
DRAIN_FACTOR = 8
# Content-Encoding -> window bits of zlib.
ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMedia("Send the body as JSON, with the header Content-Type: application/json.")


def plain(request: Request, content: bytes, cap: int) -> bytes:
    """The body decompressed; PayloadTooLarge where it then has more than `cap` bytes."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        content = decompress(content, encoding, cap)
    if not content.strip():
        raise Malformed("The body is empty; send a JSON object.")
    return content


async def read_raw(request: Request, cap: int) -> bytes:
    """The body as it was sent; PayloadTooLarge where it has more than `cap` bytes."""
    too_large = PayloadTooLarge(f"The body is larger than {cap} bytes, the most this service takes.")
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    # With Expect: 100-continue the client has sent nothing yet and waits for our word.
    if size > cap and (size > DRAIN_FACTOR * cap or "expect" in request.headers):
        raise too_large
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > DRAIN_FACTOR * cap:
            raise too_large
        if total <= cap:
            chunks.append(chunk)
    if total > cap:
        raise too_large
    return b"".join(chunks)


def decompress(content: bytes, encoding: str, cap: int) -> bytes:
    """At most `cap` bytes are ever made, however many are promised."""
    bits = ENCODINGS.get(encoding)
    if bits is None:
        raise UnsupportedMedia(f"The Content-Encoding is none of {', '.join(ENCODINGS)}; send the body as it is.")
    stream = zlib.decompressobj(bits)
    try:
        plain = stream.decompress(content, cap + 1)
    except zlib.error as error:
        raise Malformed("The body is not what its Content-Encoding says.") from error
    if len(plain) > cap:
        raise PayloadTooLarge(f"The body is larger than {cap} bytes when decompressed, the most this service takes.")
    if not stream.eof or stream.unused_data:
        raise Malformed("The compressed body is cut off, or something follows it.")
    return plain
