"""HTTP/1.1 as the service needs it: bounded requests in, whole replies out, over sockets or over ASGI."""
