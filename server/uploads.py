"""Reading the image out of a request: a form field or the body itself."""

from starlette.requests import Request

from server.errors import BadRequestError, UnsupportedTypeError

FIELD = "file"

_HOW = (
    f"send the image as the form field {FIELD!r} (curl -F {FIELD}=@photo.jpg) or as the body "
    "(image/jpeg, image/png, image/webp or application/octet-stream)"
)

#: The request body in OpenAPI's words; routes that read it themselves must say so.
OPENAPI = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "string", "format": "binary"}},
            }
        },
        **{
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
        },
    },
}


async def read_image(request: Request) -> bytes:
    """Return the bytes of the image that a request holds.

    Raises:
        BadRequestError: if there is none, or the form is not as it should be.
        UnsupportedTypeError: if the body is something else by its Content-Type.
    """
    if request.headers.get("Content-Length") == "0":
        raise BadRequestError(f"the request body is empty: {_HOW}")
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        data = await _read_form(request)
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        # Not request.body(): it would keep the bytes for as long as the request lives.
        data = b"".join([chunk async for chunk in request.stream()])
    else:
        raise UnsupportedTypeError(f"a body of type {kind[:100]} is not read here: {_HOW}")
    if not data:
        raise BadRequestError(f"the image is empty: {_HOW}")
    return data


async def _read_form(request: Request) -> bytes:
    async with request.form(max_files=1) as form:
        for name in form:
            if name != FIELD:
                raise BadRequestError(
                    f"the form has a field {name[:100]!r}, only {FIELD!r} is read; parameters go "
                    "into the address: /v1/classify?rate=8"
                )
        upload = form.get(FIELD)
        if upload is None:
            raise BadRequestError(f"the form has no field {FIELD!r}: {_HOW}")
        if isinstance(upload, str):
            raise BadRequestError(f"the form field {FIELD!r} holds text instead of a file: {_HOW}")
        return await upload.read()
