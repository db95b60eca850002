"""All servers as one: what they have is listed together, and a call goes to the one that has what it names."""

import asyncio

from .pipes import NO_METHOD, PROTOCOL, PipedServer, RpcError

VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
BAD_PARAMS = -32602
PAGES = 100

# Method that lists: (what a server says that it can, the list's name, what names a thing in it).
LISTS = {
    "tools/list": ("tools", "tools", "name"),
    "prompts/list": ("prompts", "prompts", "name"),
    "resources/list": ("resources", "resources", "uri"),
    "resources/templates/list": ("resources", "resourceTemplates", "uriTemplate"),
}
# Method that uses: (the list that knows who has it, the parameter that names it).
USES = {"tools/call": ("tools/list", "name"), "prompts/get": ("prompts/list", "name"), "resources/read": ("resources/list", "uri")}


class Hub:
    def __init__(self, servers):
        self.servers = [PipedServer(s) for s in servers]
        # By the method that lists, what it answered last: a call goes where its name was seen.
        self.known = {}

    async def start(self) -> None:
        await asyncio.gather(*(s.start() for s in self.servers))

    def stop(self) -> None:
        for s in self.servers:
            s.kill()

    async def pages(self, server: PipedServer, method: str) -> list:
        capability, key, _ = LISTS[method]
        if capability not in server.capabilities:
            return []
        found, cursor = [], None
        for _ in range(PAGES):
            answer = await server.call(method, {"cursor": cursor} if cursor else {})
            found += [x for x in answer.get(key) or [] if isinstance(x, dict)]
            cursor = answer.get("nextCursor")
            if not cursor:
                break
        return found

    async def all(self, method: str) -> list:
        """Server, its own name of a thing, and the thing as clients see it. A name that two have is given to the
        first; the other's has its server's in front."""
        _, _, key = LISTS[method]
        # One that has ended or fails takes nothing from the others.
        lists = await asyncio.gather(*(self.pages(s, method) for s in self.servers), return_exceptions=True)
        found, taken = [], set()
        for server, things in zip(self.servers, lists):
            for thing in [] if isinstance(things, BaseException) else things:
                own = thing.get(key)
                name = own if own not in taken or key != "name" else f"{server.name.replace('/', '-')}-{own}"
                if name not in taken:
                    taken.add(name)
                    found.append((server, own, thing | {key: name}))
        self.known[method] = {thing[key]: (server, own) for server, own, thing in found}
        return found

    async def owner(self, method: str, params: dict):
        list_method, parameter = USES[method]
        wanted = params.get(parameter)
        if not isinstance(wanted, str):
            raise RpcError({"code": BAD_PARAMS, "message": f"{parameter} is not a text"})
        if wanted not in self.known.get(list_method, {}):
            await self.all(list_method)
        if wanted in self.known[list_method]:
            return self.known[list_method][wanted]
        if method == "resources/read":
            # One of a template, which only its server understands.
            for server in self.servers:
                if "resources" in server.capabilities:
                    return server, wanted
        raise RpcError({"code": BAD_PARAMS, "message": f"no server has {parameter} '{wanted}'"})

    async def answer(self, method: str, params: dict, on_progress):
        if method == "initialize":
            asked = params.get("protocolVersion")
            can = {c for s in self.servers for c in s.capabilities}
            return {
                "protocolVersion": asked if asked in VERSIONS else PROTOCOL,
                "capabilities": {c: {} for c in ("tools", "resources", "prompts") if c in can},
                "serverInfo": {"name": "nidus-mcp-gateway", "version": "1"},
            }
        if method in ("ping", "logging/setLevel"):
            return {}
        if method in LISTS:
            return {LISTS[method][1]: [thing for _, _, thing in await self.all(method)]}
        if method in USES:
            server, own = await self.owner(method, params)
            return await server.call(method, params | {USES[method][1]: own}, on_progress)
        raise RpcError({"code": NO_METHOD, "message": f"the gateway does not know {method}"})
