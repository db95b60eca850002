"""An MCP server over pipes, in a guest, that does what a gateway must bear: tools that take time and tell of it, end the server, or print what is no message."""

import json
import os
import sys
import threading
import time

NAME = os.environ.get("SERVER_NAME", "server")
cancelled = set()
lock = threading.Lock()


def say(message):
    with lock:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0"} | message) + "\n")
        sys.stdout.flush()


def text(said):
    return {"content": [{"type": "text", "text": said}]}


def slow(id, params):
    token = (params.get("_meta") or {}).get("progressToken")
    for n in range(1, params["arguments"]["steps"] + 1):
        time.sleep(0.1)
        if id in cancelled:
            with open(f"/tmp/{NAME}-cancelled", "a") as f:
                f.write(f"{n}\n")
            return
        if token is not None:
            say({"method": "notifications/progress", "params": {"progressToken": token, "progress": n}})
    say({"id": id, "result": text("done")})


def answer(id, method, params):
    tools = [{"name": n, "inputSchema": {"type": "object"}} for n in ("who", f"only-{NAME}", "slow", "die", "fail")]
    if method == "initialize":
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}, "resources": {}, "prompts": {}},
                "serverInfo": {"name": NAME, "version": "1"}}
    if method == "tools/list":
        # In pages of two.
        at = int(params.get("cursor") or 0)
        more = {"nextCursor": str(at + 2)} if at + 2 < len(tools) else {}
        return {"tools": tools[at:at + 2]} | more
    if method == "tools/call":
        if params["name"] == "who":
            return text(f"{NAME} as {os.environ.get('USER')} {os.getuid()} with {os.environ.get('KEY')} of {params.get('arguments')}")
        if params["name"].startswith("only"):
            return text("x" * (1 << 20))
    if method == "resources/list":
        return {"resources": [{"uri": f"test://{NAME}", "name": "r"}]}
    if method == "resources/read":
        return {"contents": [{"uri": params["uri"], "text": f"{NAME} has {params['uri']}"}]}
    if method == "resources/templates/list":
        return {"resourceTemplates": []}
    if method == "prompts/list":
        return {"prompts": [{"name": "hello"}]}
    if method == "prompts/get":
        return {"messages": [{"role": "user", "content": {"type": "text", "text": NAME}}]}
    raise LookupError(method)


print("a greeting that is no message", flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if message.get("method") == "notifications/cancelled":
        cancelled.add(message["params"]["requestId"])
    if "id" not in message or "method" not in message:
        continue
    params = message.get("params") or {}
    if message["method"] == "tools/call" and params["name"] == "die":
        os._exit(7)
    if message["method"] == "tools/call" and params["name"] == "slow":
        threading.Thread(target=slow, args=(message["id"], params)).start()
        continue
    try:
        say({"id": message["id"], "result": answer(message["id"], message["method"], params)})
    except LookupError as e:
        say({"id": message["id"], "error": {"code": -32601, "message": f"{NAME} does not know {e}"}})
