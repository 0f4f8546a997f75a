"""The HTTP application: OpenAI's chat and images routes over one worker."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from open_pisces.serve.access import Gate
from open_pisces.serve.answers import ChatAnswer, image_event, images_usage, sse
from open_pisces.serve.errors import ApiError
from open_pisces.serve.responses import Conversations
from open_pisces.serve.responses import Response as OneResponse
from open_pisces.serve.schemas import (
    MOST_PICTURES,
    ChatMessage,
    ChatRequest,
    Drawing,
    ImagesRequest,
    ImageUrl,
    InputMessage,
    Part,
    ResponsesRequest,
    StreamOptions,
    Tool,
    preset_of,
)
from open_pisces.serve.service import Conversation, Picture, ServeSettings, Service, side_of, unless_gone
from open_pisces.serve.supervisor import Told

Events = AsyncGenerator[Told]
STATIC = Path(__file__).parent / "static"
FILES = ("page.css", "page.js")
PAGE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}
Asked = TypeVar("Asked", bound=BaseModel)
NOT_TRAINED = (
    "this model was not trained to draw from a picture (its mixtures hold no task `reconstruct`): ask "
    "/v1/images/generations for a picture of what you describe"
)


def build_app(settings: ServeSettings) -> FastAPI:
    """The application; its worker starts with it.

    ``app.state.service`` is the `Service` behind the routes.
    """
    service = Service(settings)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="open_pisces", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    _add_errors(app, service)
    _add_state(app, service)
    _add_page(app)
    _add_chat(app, service)
    _add_images(app, service)
    _add_responses(app, service)
    app.add_middleware(Counting, service=service)
    app.add_middleware(
        Gate, keys=settings.keys, hosts=settings.hosts, origins=settings.origins, max_body=settings.max_body
    )
    return app


class Counting:
    """ASGI middleware that counts answers by route and status."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                # The route's own pattern: paths that clients make up would fill the memory.
                route = getattr(scope.get("route"), "path", "unknown")
                self.service.counts.answers.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, sending)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error in OpenAI's form."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_explained(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        told = {404: f"no route {request.url.path}", 405: f"{request.method} is not served at {request.url.path}"}
        message = told.get(error.status_code, str(error.detail))
        return answer(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "a fault of the server; its log says more"))


def _explained(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, at the place that goes deepest: a text that should be a list is less telling."""
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    # Besides fields and indices pydantic names the types that it tried: list[Part], constrained-str, ImageUrl.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part in _fields()]
    field = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        field = ".".join(path if path[-1:] == [unknown] else [*path, unknown])
        return ApiError(400, f"{field}: unknown field; leave it out", field, "unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    return ApiError(400, f"{field}: {message}" if field else message, field or None)


@cache
def _fields() -> set[str]:
    """All names of fields in requests."""
    bodies = (ChatRequest, ImagesRequest, ResponsesRequest)
    known: tuple[type[BaseModel], ...] = (
        *bodies,
        ChatMessage,
        InputMessage,
        Part,
        ImageUrl,
        StreamOptions,
        Drawing,
        Tool,
    )
    return {name for model in known for name in model.model_fields}


def read_form(model: type[Asked], fields: dict[str, Any]) -> Asked:
    """The request that a form's fields make.

    Raises:
        RequestValidationError: as for a body of JSON.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _add_state(app: FastAPI, service: Service) -> None:
    """What is here, and how it is."""

    def entry() -> dict[str, Any]:
        found = {"id": service.settings.name, "object": "model", "created": service.created, "owned_by": "open_pisces"}
        # Ours: whether it was trained on conversations of several turns.
        return {**found, "converses": bool(service.supervisor.about.get("converses"))}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if service.healthy else "unavailable"}, 200 if service.healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return entry()

    @app.get("/metrics")
    async def metrics() -> Response:
        service.counts.worker_ready.set(service.supervisor.ready)
        service.counts.worker_restarts.set(service.supervisor.restarts)
        return PlainTextResponse(generate_latest(service.counts.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    """The playground: three files, which ask for nothing from elsewhere."""

    @app.get("/")
    async def index() -> Response:
        return FileResponse(STATIC / "index.html", headers=PAGE)

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, f"no file {name!r}")
        return FileResponse(STATIC / name, headers=PAGE)


# --------------------------------------------------------------------------------------------------------- chat


def _add_chat(app: FastAPI, service: Service) -> None:
    """``POST /v1/chat/completions``."""

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        service.check_model(asked.model)
        conversation = await service.conversation(asked.messages)
        limit = asked.max_completion_tokens or asked.max_tokens
        settings = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "stop": asked.stops,
            "seed": asked.seed or 0,
        }
        settings |= {"max_new_tokens": limit} if limit else {}
        settings |= {"n": asked.n_images, "previews": asked.partial_images if asked.stream else 0}
        written = side_of(asked.size, service.about()["image_size"])
        events = service.ask(conversation, asked.mode, settings | asked.drawing(), written)
        answer = ChatAnswer(service.settings.name)
        if not asked.stream:
            return JSONResponse(await unless_gone(request, _whole_chat(events, answer)))
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await _stream(request, events, lambda told: _chat_pieces(told, answer, with_usage))


async def _whole_chat(events: Events, answer: ChatAnswer) -> dict[str, Any]:
    text = ""
    files: list[bytes] = []
    async with aclosing(events):
        async for message, blobs in events:
            if message["kind"] == "text":
                text += message["text"]
            elif message["kind"] == "picture":
                files += blobs
    return answer.whole(text, files, message)


async def _chat_pieces(events: Events, answer: ChatAnswer, with_usage: bool) -> AsyncIterator[str]:
    yield answer.piece({"role": "assistant", "content": ""})
    async for message, blobs in events:
        if message["kind"] == "text":
            yield answer.piece({"content": message["text"]})
        elif message["kind"] == "picture":
            yield answer.picture(blobs[0], message["index"])
        elif message["kind"] == "preview":
            yield answer.preview(blobs[0], message["index"])
        elif message["kind"] == "done":
            yield answer.piece({}, message["finish_reason"])
            if with_usage:
                yield answer.usage(message)
    yield "data: [DONE]\n\n"


async def _stream(request: Request, events: Events, pieces: Any) -> StreamingResponse:
    """A streamed answer. Its first event is waited for, so that a request that fails at once has its own status."""
    first = await unless_gone(request, anext(events))

    async def joined() -> Events:
        yield first
        async for event in events:
            yield event

    async def told() -> AsyncIterator[str]:
        async with aclosing(events):
            try:
                async for piece in pieces(joined()):
                    yield piece
            except ApiError as error:  # too late for a status
                yield sse(error.body(), "error")

    return StreamingResponse(told(), media_type="text/event-stream", headers={"cache-control": "no-store"})


# ------------------------------------------------------------------------------------------------------- images


def _add_images(app: FastAPI, service: Service) -> None:
    """``POST /v1/images/generations``."""

    async def draw(asked: ImagesRequest, request: Request, pictures: list[Picture]) -> Response:
        service.check_model(asked.model)
        if not asked.prompt.strip():
            raise ApiError(400, "the prompt is empty: say in words what to draw", "prompt")
        native: int = service.about()["image_size"]
        side = side_of(asked.size, native)
        conversation = Conversation([("user", [*range(len(pictures)), asked.prompt.strip()])], pictures)
        previews = asked.partial_images or 0 if asked.stream else 0
        settings = {"n": asked.n, "seed": asked.seed or 0, "variety": asked.temperature, "previews": previews}
        written = {"kind": asked.output_format, "quality": asked.output_compression, **side}
        events = service.ask(conversation, "image", settings | asked.drawing(), written)
        size: int = side.get("side") or native
        if asked.stream:
            name = "image_edit" if pictures else "image_generation"
            return await _stream(request, events, lambda told: _image_pieces(told, name, size, asked.output_format))
        return JSONResponse(await unless_gone(request, _whole_images(events, size, asked)))

    @app.post("/v1/images/generations")
    async def generations(asked: ImagesRequest, request: Request) -> Response:
        return await draw(asked, request, [])

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        async with request.form(max_files=MOST_PICTURES, max_part_size=service.settings.max_picture) as form:
            fields: dict[str, Any] = {}
            files: list[UploadFile] = []
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields[name] = value
                elif name in ("image", "image[]"):
                    files.append(value)
                else:
                    raise ApiError(400, f"{name}: only pictures to draw again are taken, as image or image[]", name)
            asked = read_form(ImagesRequest, fields)
            if not files:
                raise ApiError(400, "a picture to draw again is missing: send it as the file image", "image")
            if not service.about()["redraws"]:
                raise ApiError(400, NOT_TRAINED, "image", "not_trained")
            pictures = [await service.read_picture(await file.read(), "image") for file in files]
        return await draw(asked, request, pictures)


async def _whole_images(events: Events, size: int, asked: ImagesRequest) -> dict[str, Any]:
    files: dict[int, bytes] = {}
    async with aclosing(events):
        async for message, blobs in events:
            if message["kind"] == "picture":
                files[message["index"]] = blobs[0]
    data = [{"b64_json": base64.b64encode(files[index]).decode()} for index in sorted(files)]
    head = {"created": int(time.time()), "data": data, "usage": images_usage(message)}
    return {**head, "size": f"{size}x{size}", "output_format": asked.output_format, "background": "opaque"}


async def _image_pieces(events: Events, name: str, size: int, kind: str) -> AsyncIterator[str]:
    shown: dict[int, int] = {}
    finished: list[tuple[int, bytes]] = []
    async for message, blobs in events:
        if message["kind"] == "preview":
            index = message["index"]
            number = shown[index] = shown.get(index, -1) + 1
            yield image_event(
                f"{name}.partial_image", blobs[0], size, kind, partial_image_index=number, image_index=index
            )
        elif message["kind"] == "picture":
            finished.append((message["index"], blobs[0]))
        elif message["kind"] == "done":
            for index, raw in sorted(finished):
                yield image_event(f"{name}.completed", raw, size, kind, usage=images_usage(message), image_index=index)


# ---------------------------------------------------------------------------------------------------- responses


def _add_responses(app: FastAPI, service: Service) -> None:
    """``POST /v1/responses``."""
    kept = Conversations()

    @app.post("/v1/responses")
    async def responses(asked: ResponsesRequest, request: Request) -> Response:
        service.check_model(asked.model)
        messages = kept.messages(asked)
        told = [ChatMessage(role="system", content=asked.instructions)] if asked.instructions else []
        conversation = await service.conversation([*told, *messages])
        named = {"temperature": asked.temperature, "top_p": asked.top_p, "max_new_tokens": asked.max_output_tokens}
        settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        settings["seed"] = asked.seed or 0
        written: dict[str, Any] = {}
        if asked.tools:
            tool = asked.tools[0]
            settings |= {"previews": tool.partial_images if asked.stream else 0, **preset_of(tool.quality)}
            written = {"kind": tool.output_format, "quality": tool.output_compression}
            written |= side_of(tool.size, service.about()["image_size"])
        events = service.ask(conversation, asked.mode, settings, written)
        response = OneResponse(service.settings.name, asked, messages, kept)
        if asked.stream:
            return await _stream(request, events, response.pieces)
        return JSONResponse(await unless_gone(request, response.whole(events)))
