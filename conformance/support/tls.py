"""TLS in front of an HTTP port: `python -m support.tls ADDRESS:PORT CERT KEY TARGET_PORT`.

It says so in X-Forwarded-Proto, as reverse proxies do, and has each connection end with its first answer, since it looks at
no further requests on it.
"""

import asyncio
import contextlib
import ssl
import sys


async def copy(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()


async def main(listen: str, cert: str, key: str, target: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["http/1.1"])

    async def client(reader, writer):
        try:
            line = await reader.readuntil(b"\r\n")
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(target))
        far_writer.write(line + b"X-Forwarded-Proto: https\r\nConnection: close\r\n")
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    host, port = listen.rsplit(":", 1)
    async with await asyncio.start_server(client, host, int(port), ssl=context) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
