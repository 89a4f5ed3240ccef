"""Live methods, one a file: a `Config` and a `LayerCache` that registers itself with `live_methods`."""
