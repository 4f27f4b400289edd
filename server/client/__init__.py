"""Clients of the server, which need no torch: `Client` and, for asyncio, `AsyncClient`."""

from server.client.calls import Image, SegmentedImage, ToComServerError
from server.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Image", "SegmentedImage", "ToComServerError"]
