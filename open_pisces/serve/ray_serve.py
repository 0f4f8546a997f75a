"""The same application as a Ray Serve deployment: replicas on many machines behind Ray's proxy.

    import ray
    from ray import serve
    from open_pisces.serve.ray_serve import deployment
    from open_pisces.serve.service import ServeSettings

    serve.run(deployment(ServeSettings(model="runs/own/model", keys=("...",), hosts=("*",)), replicas=4))

Each replica has a worker of its own; its requests are batched by its engine. Ray's proxy is in front, so host names and
keys are still checked by the application, and conversations of the Responses API are known to one replica only.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from open_pisces.serve.app import build_app
from open_pisces.serve.service import ServeSettings


def deployment(settings: ServeSettings, replicas: int = 1, **options: Any) -> Any:
    """A Ray Serve application.

    Args:
        settings: as `pisces serve` has them.
        replicas: processes with a model each.
        options: further ones of ``serve.deployment``, such as ``ray_actor_options={"num_gpus": 1}``.
    """

    built: list[Any] = []

    def build() -> Any:  # in the replica: the application cannot be sent to it
        built.append(build_app(settings))
        return built[0]

    @serve.deployment(num_replicas=replicas, max_ongoing_requests=settings.max_queue, **options)
    @serve.ingress(build)
    class Pisces:
        """A replica; its routes are the application's."""

        async def check_health(self) -> None:
            """Ray replaces a replica whose worker gave up."""
            supervisor = built[0].state.service.supervisor
            if supervisor.failed.is_set():
                raise RuntimeError(supervisor.reason)

    application: Any = Pisces
    return application.bind()
