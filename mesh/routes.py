"""Where the events of a topic go in an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mesh.handlers import Handler, HandlerPriority

if TYPE_CHECKING:
    from mesh.handlers import EventHandlerRegistry

_LANE_OF = {priority: lane for lane, priority in enumerate(HandlerPriority)}


class Route(NamedTuple):
    """The way of a topic's events."""

    handlers: tuple[Handler, ...]
    #: The most urgent of them decides.
    lane: int
    #: The class that all handlers want the payload in, when they agree.
    schema: type[Any] | None


class Routes:
    """The ways of one agent's topics, as its registry has them now."""

    def __init__(self, registry: EventHandlerRegistry, agent_name: str) -> None:
        """Begin with none."""
        self._registry = registry
        self._agent_name = agent_name
        self._routes: dict[str, Route] = {}

    def of(self, topic: str) -> Route:
        """Give the way of a topic; nobody may hear it."""
        route = self._routes.get(topic)
        handlers = self._registry.handlers_of(topic, self._agent_name)
        if route is None or route.handlers is not handlers:
            route = self._routes[topic] = _route(handlers)
        return route


def _route(handlers: tuple[Handler, ...]) -> Route:
    if not handlers:
        return Route(handlers, 0, None)
    schemas = {handler.schema for handler in handlers}
    schema = handlers[0].schema if len(schemas) == 1 else None
    return Route(handlers, _LANE_OF[handlers[0].priority], schema)
