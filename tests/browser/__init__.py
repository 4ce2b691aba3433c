"""The pages in a browser; a package, so that the browser is closed after its tests."""
