"""
Middleware: coroutine functions around a handler or a publish, one verb a file.

A middleware gets the event and what comes next: ``async def layer(event, proceed)``. It may change
the event (events are immutable: pass on another), refuse it (do not call `proceed`), or act before
and after. Layers are composed once, when a handler is registered or a publisher made, the first
outermost; none costs nothing.
"""
