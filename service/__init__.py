"""hessQuik networks over HTTP: the service and its client."""
