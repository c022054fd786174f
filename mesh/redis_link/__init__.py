"""The way to Redis: RESP, connections that come back, one server, Sentinel or a cluster."""
