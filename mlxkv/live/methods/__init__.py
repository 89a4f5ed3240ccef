"""Live methods, one per file: a `Config` and a `LayerCache` that registers itself with `live_methods`."""
