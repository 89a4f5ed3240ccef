"""The server: mlx-lm's own, with prompts that survive it.

memory.py keeps caches in RAM, prompt_cache.py puts the store on disk behind them; provider.py loads models and opens their
prompts; generation.py, handler.py and http.py are mlx-lm's classes with what they lack; server.py starts and stops it all.
"""
