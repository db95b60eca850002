"""Bundles of MIME types as the SDK's `Result` has them."""

FIELDS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}


def result(bundle, main):
    """`main`: it is the value of the cell, and not what the cell displayed."""
    message = {"type": "result", "is_main_result": main}
    extra = {}
    for kind, value in bundle.items():
        if kind == "text/plain" and isinstance(value, str):
            value = unquoted(value)
        if kind in FIELDS:
            message[FIELDS[kind]] = value
        else:
            extra[kind] = value
    if extra:
        message["extra"] = extra
    return message


def unquoted(text):
    """A text's value is the text, and not how a program writes it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
